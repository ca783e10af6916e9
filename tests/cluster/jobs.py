"""Batch jobs of the stub trainer, and what became of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from launch.jobs.options import parse_options
from launch.jobs.plan import Task
from launch.prepare import prepare, write
from tests.cluster import stub
from tests.cluster.cluster import Cluster
from trainer.job.directory import JobDirectory, read_lines


class StubJob:
    """One job of the stub trainer, launched as a trainer would be."""

    def __init__(
        self,
        cluster: Cluster,
        run: Path,
        *,
        nodes: int = 2,
        ranks_per_node: int = 2,
        stub_options: Sequence[str] = (),
        options: Sequence[str] = (),
        sbatch: Sequence[str] = (),
        tasks: int = 0,
    ) -> None:
        """Launch it; `options` are those of `signscale launch slurm`, `sbatch` overrules the script's own.

        `tasks` makes it an array whose runs lie in RUN/0, RUN/1, …
        """
        self.cluster, self.run = cluster, run
        self.world_size = nodes * ranks_per_node
        size = ["--nodes", str(nodes), "--ranks_per_node", str(ranks_per_node), "--cpus_per_task", "1", "--mem", "100"]
        command = ["-m", "tests.cluster.stub", "--output_dir", str(run), *stub_options]
        for task in range(tasks):
            (run / str(task)).mkdir(parents=True, exist_ok=True)
        made = [Task(run=run / str(task), overrides={"output_dir": str(run / str(task))}) for task in range(tasks)]
        launched = parse_options("slurm", ["--run", str(run), "--launcher", "plain", *size, *options])
        plan = write(prepare("slurm", launched, command, tasks=made or None))
        self.job_id = cluster.sbatch(*sbatch, plan.job.script)
        self.job.add_submission(self.job_id)

    @property
    def job(self) -> JobDirectory:
        """The job directory."""
        return JobDirectory.of(self.run)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # A job that a test leaves behind would take the nodes from the next.
        self.cluster.run("scancel", *self.submissions())

    def warn(self, job_id: str = "") -> None:
        """Give the warning that SLURM gives before the time limit."""
        self.cluster.run("scancel", "--batch", "--signal=USR2", job_id or self.job_id)

    def submissions(self) -> list[str]:
        """Return the ids under which it was submitted."""
        return [str(line["job_id"]) for line in read_lines(self.job.submissions)]

    def words(self, run: Path | None = None) -> list[str | None]:
        """Return the last word of each attempt."""
        return [record.word for record in JobDirectory.of(run or self.run).history()]

    def saved(self, run: Path | None = None) -> int:
        """Return the step of the last checkpoint."""
        pointer = (run or self.run) / "checkpoints" / "last.json"
        return int(json.loads(pointer.read_text())["checkpoint"][5:]) if pointer.exists() else 0

    def wait_for_step(self, attempt: int = 1, run: Path | None = None) -> None:
        """Wait until the n-th attempt has saved a step."""

        def saved() -> bool:
            history = JobDirectory.of(run or self.run).history()
            return len(history) >= attempt and any(
                save["attempt"] == history[attempt - 1].attempt for save in stub.saves(run or self.run)
            )

        try:
            self.cluster.wait_until(saved, f"attempt {attempt} has saved a step")
        except AssertionError as error:
            raise AssertionError(f"{self.output(run)}\n{error}") from error

    def finish(self, job_id: str = "", run: Path | None = None) -> None:
        """Let the next step be the last, and wait for the job's end, which must be a good one."""
        (run or self.run).joinpath(stub.FINISH).touch()
        end = self.cluster.wait_for_end(job_id or self.job_id)
        assert end.state == "COMPLETED", f"{end}\n{self.output()}"

    def output(self, run: Path | None = None) -> str:
        """Return all that was said."""
        logs = sorted(JobDirectory.of(run or self.run).logs.glob("*.log"), key=lambda path: path.stat().st_mtime)
        return "\n".join(path.read_text() for path in [*self.job.logs.glob("slurm*.out"), *logs])

    def check_complete(self, run: Path | None = None) -> None:
        """Assert that every step was done exactly once, and that no older attempt published beside a newer one."""
        run = run or self.run
        job = JobDirectory.of(run)
        word = job.last_word()
        assert word is not None, self.output(run)
        assert (word.word, word.step) == ("DONE", self.saved(run)), self.output(run)
        weights = json.loads((run / "checkpoints" / f"step-{word.step:09d}" / "weights.json").read_text())
        assert weights == stub.expected(self.saved(run), self.world_size), stub.saves(run)
        history = job.history()
        assert all(record.ended is not None for record in history), history
        order = [record.attempt for record in history]
        published = [str(save["attempt"]) for save in stub.saves(run) if save["published"]]
        assert published == sorted(published, key=order.index), stub.saves(run)
