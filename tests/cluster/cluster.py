"""A real SLURM cluster of a few nodes on this machine: mini_slurm.sh, as a test uses it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

SCRIPT = Path(__file__).with_name("mini_slurm.sh")
ROOT = Path(__file__).parents[2]
DEADLINE = 90.0
"""Seconds a test waits for anything; far more than it takes, since all cores may be busy."""

ENDED = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "OUT_OF_MEMORY"}


def missing() -> str | None:
    """Say why no cluster can be started here; None where it can."""
    mode = subprocess.run([SCRIPT, "mode"], capture_output=True, text=True, check=True).stdout.strip()
    if mode != "netns":
        return "this user may not make network namespaces (needs root)"
    probe = subprocess.run(["sh", "-c", "command -v slurmctld slurmd munged sbatch"], capture_output=True)
    return "SLURM is not installed (tests/cluster/mini_slurm.sh install)" if probe.returncode else None


@dataclass(frozen=True, kw_only=True)
class JobState:
    """What `scontrol show job` says of a job."""

    state: str
    reason: str
    nodes: str
    """As SLURM abbreviates them, for example node[1-2]."""
    batch_host: str
    restarts: int
    exit_code: str


class Cluster:
    """N nodes named node1, node2, … with their own network, host name and processes each. A context manager."""

    def __init__(self, folder: Path, *, nodes: int = 2, conf: str = "", options: tuple[str, ...] = ()) -> None:
        """Describe a cluster in `folder`; `conf` is appended to slurm.conf, `options` go to mini_slurm.sh."""
        self.folder = folder
        self.nodes = tuple(f"node{number}" for number in range(1, nodes + 1))
        self._conf = conf
        self._options = options

    def __enter__(self) -> Self:
        options = ["--nodes", str(len(self.nodes)), "--mode", "netns", "--with", str(os.getpid()), *self._options]
        if self._conf:
            self.folder.mkdir(parents=True, exist_ok=True)
            extra = self.folder.with_name(f"{self.folder.name}.extra.conf")
            extra.write_text(self._conf)
            options += ["--conf", str(extra)]
        self._script("start", *options, timeout=180)
        return self

    def __exit__(self, *_: object) -> None:
        self._script("stop", "--purge")

    def env(self, **more: str) -> dict[str, str]:
        """Return the environment of a login node: this project's code, this cluster, nothing of an outer job."""
        outer = ("SLURM_", "SBATCH_", "PMI", "ACCELERATE_", "WANDB_", "RANK", "WORLD_SIZE", "SIGNSCALE_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
        kept["PATH"] = f"{Path(sys.executable).parent}:{kept.get('PATH', os.defpath)}"
        fixed = {"SLURM_CONF": str(self.folder / "slurm.conf"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return kept | fixed | more

    def run(
        self, *command: str | Path, check: bool = True, timeout: float = DEADLINE, cwd: Path = ROOT, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node."""
        done = subprocess.run(
            [str(part) for part in command],
            env=self.env(**env),
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )
        if check and done.returncode:
            raise AssertionError(f"{command} left with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return done

    def sbatch(self, *arguments: str | Path, cwd: Path = ROOT) -> str:
        """Submit a job by plain sbatch and return its id."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd).stdout.strip().partition(";")[0]

    def job(self, job_id: str) -> JobState:
        """Ask what a job, or an array's task such as 7_1, is doing."""
        # Of a task that has not started and shares its record with others there is more than one line.
        line = self.run("scontrol", "--oneliner", "show", "job", job_id).stdout.splitlines()[0]
        fields = dict(re.findall(r"(\w+)=(\S*)", line))
        return JobState(
            state=fields["JobState"],
            reason=fields["Reason"],
            nodes=fields.get("NodeList", ""),
            batch_host=fields.get("BatchHost", ""),
            restarts=int(fields["Restarts"]),
            exit_code=fields["ExitCode"],
        )

    def wait_until(self, condition: Callable[[], object], what: str, timeout: float = DEADLINE) -> None:
        """Wait until something is so; a test that waits in vain shows what the cluster knows."""
        end = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > end:
                raise AssertionError(f"after {timeout:.0f} s still not: {what}\n{self.report()}")
            time.sleep(0.1)

    def wait_for_state(self, job_id: str, *states: str, timeout: float = DEADLINE) -> JobState:
        """Wait for one of these states, and for none of the final ones among the others."""
        seen: list[JobState] = []

        def reached() -> bool:
            seen.append(self.job(job_id))
            assert seen[-1].state in states or seen[-1].state not in ENDED, f"{job_id}: {seen[-1]}\n{self.report()}"
            return seen[-1].state in states

        self.wait_until(reached, f"{job_id} is {' or '.join(states)}", timeout)
        return seen[-1]

    def wait_for_requeue(self, job_id: str, timeout: float = DEADLINE) -> JobState:
        """Wait until a job sits out the two minutes after its requeue."""
        self.wait_until(lambda: self._held(self.job(job_id)), f"{job_id} is requeued", timeout)
        return self.job(job_id)

    def wait_for_end(self, job_id: str, *, releasing: bool = True, timeout: float = 2 * DEADLINE) -> JobState:
        """Wait for a job's end, however often it is requeued, sparing it the two minutes' hold each time."""
        seen: list[JobState] = []

        def ended() -> bool:
            seen.append(self.job(job_id))
            if releasing and self._held(seen[-1]):
                self.release(job_id)
            return seen[-1].state in ENDED

        self.wait_until(ended, f"{job_id} has ended", timeout)
        return seen[-1]

    def release(self, job_id: str) -> None:
        """Start a requeued job now."""
        self._script("release", job_id)

    def kill_node(self, node: str) -> None:
        """Cut a node's power."""
        self._script("kill-node", node)

    def boot_node(self, node: str) -> None:
        """Switch a node on again."""
        self._script("boot-node", node)

    def cut_node(self, node: str) -> None:
        """Unplug a node's network; its processes live on."""
        self._script("cut-node", node)

    def heal_node(self, node: str) -> None:
        """Plug a node's network in again."""
        self._script("heal-node", node)

    def exec_on(self, node: str, *command: str | Path) -> str:
        """Run a command on a node, as over ssh, and return what it says."""
        return self._script("exec", node, *map(str, command))

    def report(self) -> str:
        """Return what a test's failure needs: the queue, the nodes, the ends of the daemons' logs."""
        parts = [
            self.run(*command, check=False).stdout
            for command in (("scontrol", "show", "job"), ("sinfo", "-N", "-l"), (SCRIPT, "logs", "-d", self.folder))
        ]
        return "\n".join(parts)[-12000:]

    @staticmethod
    def _held(job: JobState) -> bool:
        return (job.state, job.reason) == ("PENDING", "BeginTime")

    def _script(self, command: str, *arguments: str, timeout: float = DEADLINE) -> str:
        # exec passes all that follows the node on, so the folder comes first.
        done = subprocess.run(
            [SCRIPT, command, "-d", self.folder, *arguments],
            env=self.env(),
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode:
            said = f"{done.stdout}\n{done.stderr}"
            raise AssertionError(f"mini_slurm.sh {command} {arguments} left with {done.returncode}\n{said}")
        return done.stdout
