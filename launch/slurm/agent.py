"""The node agent: one process a node under srun, which finds its place among the others and becomes their launcher."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.jobs.plan import Plan
from launch.jobs.ranks import SIGNALS
from launch.slurm.environment import attempt_name, task_number
from launch.slurm.limit import LIMIT
from launch.slurm.meeting import Meeting, UnfitError, meet
from trainer.exits import EXIT_INPUT_ERROR, exit_on_input_error
from trainer.job.directory import ATTEMPT, END_TIME, JOB, TOKEN, JobDirectory

_SECONDS_TO_SAVE = 3600
"""How long a launcher waits for its ranks after a signal; the scheduler's own limits are shorter."""


def main(argv: Sequence[str] | None = None) -> int:
    """Meet the other nodes, then turn into the launcher of this node's ranks."""
    parser = argparse.ArgumentParser(prog="python -m launch.slurm.agent", description=__doc__)
    parser.add_argument("--job", type=Path, required=True, help="RUN/job")
    folder = parser.parse_args(argv).job
    plan = Plan.load(JobDirectory(folder).plan)
    node, nodes = int(os.environ["SLURM_NODEID"]), int(os.environ["SLURM_NNODES"])
    task = task_number(os.environ)
    job, attempt = plan.job_of(task), attempt_name(os.environ)
    try:
        if nodes != plan.nodes:
            raise UnfitError(f"{job.plan}: the job has {nodes} nodes, its plan {plan.nodes}; launch it again")
        noted = plan.job.folder / f"nodes-{attempt}"
        meeting = meet(job, attempt, node=node, nodes=nodes, seconds=plan.meeting_seconds, unfit=noted)
    except UnfitError as error:
        # Without a word a job goes on, until it has made no progress too often: nodes may be late, ports taken.
        if node == 0:
            job.leave_word(
                "FAILED", attempt=attempt, step=None, reason="; ".join(error.problems), code=EXIT_INPUT_ERROR
            )
        raise
    if (cancelled := plan.cancellation_of(task)) is not None:
        # Before minutes are spent on starting ranks that would leave at their first step; srun ends the other nodes.
        print(f"signscale: {meeting.host}: {cancelled.reason}; starting no ranks", flush=True)
        return 1
    command = launcher_command(plan, job, attempt, task=task, meeting=meeting)
    print(f"signscale: node {node} of {nodes}, {meeting.host}: {plan.ranks_per_node} rank(s)", flush=True)
    return os.execve(sys.executable, command, os.environ | rank_environment(plan, job, attempt, meeting=meeting))


def _goes_on(plan: Plan, job: JobDirectory) -> bool:
    """Tell whether an attempt looks for the newest checkpoint of the run; the first one may have been told another."""
    told = (plan.recipe or {}).get("resume", "")
    return told in ("", "auto") or (job.folder.parent / "checkpoints" / "last.json").exists()


def launcher_command(plan: Plan, job: JobDirectory, attempt: str, *, task: int | None, meeting: Meeting) -> list[str]:
    """Return the command that starts this node's ranks."""
    logs = job.logs / attempt / f"node-{meeting.node}"
    logs.mkdir(parents=True, exist_ok=True)
    arguments = list(plan.arguments_of(task))
    if plan.module == "trainer.train" and _goes_on(plan, job):
        # Whatever the last attempt saved is where this one begins.
        arguments += ["--resume", "auto"]
    start = [sys.executable, "-m", "launch.jobs.ranks"]
    if plan.launcher == "plain":
        return [*start, "plain", str(plan.ranks_per_node), str(logs), plan.module, *arguments]
    assert plan.accelerate_config is not None
    return [
        *(*start, "accelerate", "--config_file", plan.accelerate_config),
        *(
            "--num_machines",
            str(plan.nodes),
            "--num_processes",
            str(plan.world_size),
            "--machine_rank",
            str(meeting.node),
        ),
        *("--main_process_ip", meeting.address, "--main_process_port", str(meeting.port)),
        *("--deepspeed_multinode_launcher", "standard", "--num_cpu_threads_per_process", str(plan.cpus_per_rank)),
        *("--tee", "3", "--log_dir", str(logs), "-m", plan.module, *arguments),
    ]


def rank_environment(plan: Plan, job: JobDirectory, attempt: str, *, meeting: Meeting) -> dict[str, str]:
    """Return what the ranks learn by their environment."""
    found = {
        JOB: str(job.folder),
        ATTEMPT: attempt,
        TOKEN: meeting.token,
        END_TIME: os.environ.get(LIMIT, ""),
        "SIGNSCALE_NODE": str(meeting.node),
        "PET_SIGNALS_TO_HANDLE": ",".join(SIGNALS),
        "PET_SHUTDOWN_TIMEOUT": str(_SECONDS_TO_SAVE),
        "OMP_NUM_THREADS": str(plan.cpus_per_rank),
        # The cluster's own choice goes before ours.
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", meeting.interface),
        "NCCL_SOCKET_IFNAME": os.environ.get("NCCL_SOCKET_IFNAME", f"={meeting.interface}"),
        # Warnings about names of addresses, which nobody needs.
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        "WORLD_SIZE": str(plan.world_size),
        "MASTER_ADDR": meeting.address,
        "MASTER_PORT": str(meeting.port),
    }
    if plan.use_cpu:
        found["ACCELERATE_USE_CPU"] = "true"
    return found


if __name__ == "__main__":
    exit_on_input_error(main)
