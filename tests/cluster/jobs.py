"""Batch jobs of the stub trainer, and what became of them."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.cluster import stub
from tests.cluster.cluster import ROOT, Cluster
from trainer.files import write_json
from trainer.job.directory import JobDirectory


class StubJob:
    """One job of the stub trainer, submitted to a cluster."""

    def __init__(
        self,
        cluster: Cluster,
        run: Path,
        *,
        nodes: int = 2,
        ranks_per_node: int = 2,
        arguments: Sequence[str] = (),
        sbatch: Sequence[str] = (),
        tasks: int = 0,
        preflight: Sequence[str] = (),
        limit: int = 3,
    ) -> None:
        """Submit it; `tasks` makes it an array whose runs lie in RUN/0, RUN/1, …"""
        self.cluster, self.run = cluster, run
        self.world_size = nodes * ranks_per_node
        job = JobDirectory.of(run)
        job.logs.mkdir(parents=True)
        runs = [{"run": str(run / str(task)), "overrides": {}} for task in range(tasks)] or None
        write_json(job.plan, {"run": str(run), "tasks": runs, "max_attempts_without_progress": limit})
        srun = f"srun --kill-on-bad-exit=1 --wait=60 --label -N{nodes} --ntasks-per-node={ranks_per_node}"
        inner = 'exec "$0" -u -m tests.cluster.stub --output_dir "$(dirname "$SIGNSCALE_JOB")" "$@"'
        words = [sys.executable, *arguments]
        check = f"--preflight {shlex.join(preflight)}" if preflight else ""
        job.script.write_text(
            f"""#!/bin/bash
#SBATCH --nodes={nodes} --ntasks-per-node={ranks_per_node} --mem=100 --open-mode=append
#SBATCH --job-name={run.name} --output={shlex.quote(str(job.logs))}/slurm-%A_%a.out
export PYTHONPATH={shlex.quote(str(ROOT))}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + (SLURM_JOB_ID * 10 + ${{SLURM_RESTART_COUNT:-0}}) % 10000))
cd {shlex.quote(str(ROOT))}
exec {shlex.quote(sys.executable)} -m launch.slurm.director --job {shlex.quote(str(job.folder))} {check} -- \\
    {srun} bash -c {shlex.quote(inner)} {shlex.join(words)}
"""
        )
        array = [f"--array=0-{tasks - 1}"] if tasks else []
        self.job_id = cluster.sbatch(*array, *sbatch, job.script)

    @property
    def job(self) -> JobDirectory:
        """The job directory."""
        return JobDirectory.of(self.run)

    def saved(self, run: Path | None = None) -> int:
        """Return the step of the last checkpoint."""
        pointer = (run or self.run) / "checkpoints" / "last.json"
        return int(json.loads(pointer.read_text())["checkpoint"][5:]) if pointer.exists() else 0

    def wait_for_step(self, step: int, run: Path | None = None) -> None:
        """Wait until a step is saved."""
        self.cluster.wait_until(lambda: self.saved(run) >= step, f"step {step} is saved ({self.output(run)})")

    def output(self, run: Path | None = None) -> str:
        """Return all that was said."""
        logs = sorted(JobDirectory.of(run or self.run).logs.glob("*.log"), key=lambda path: path.stat().st_mtime)
        return "\n".join(path.read_text() for path in [*self.job.logs.glob("slurm*.out"), *logs])

    def check_complete(self, steps: int, run: Path | None = None) -> None:
        """Assert that every step was done exactly once, and that no older attempt published beside a newer one."""
        run = run or self.run
        job = JobDirectory.of(run)
        word = job.last_word()
        assert word is not None, self.output(run)
        assert (word.word, word.step) == ("DONE", steps), self.output(run)
        weights = json.loads((run / "checkpoints" / f"step-{steps:09d}" / "weights.json").read_text())
        assert weights == stub.expected(steps, self.world_size), stub.saves(run)
        history = job.history()
        assert all(record.ended is not None for record in history), history
        order = [record.attempt for record in history]
        published = [str(save["attempt"]) for save in stub.saves(run) if save["published"]]
        assert published == sorted(published, key=order.index), stub.saves(run)
