"""SLURM's states and reasons in words that say what to do."""

from __future__ import annotations

from launch.slurm.squeue import QueuedJob

ENDED = frozenset(
    {
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "LAUNCH_FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "RECONFIG_FAIL",
        "REVOKED",
        "TIMEOUT",
    }
)
"""States that a job does not leave any more."""

WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"})
"""States without nodes that a job leaves again."""

_ENDS = {
    "BOOT_FAIL": "its nodes did not boot",
    "CANCELLED": "it was cancelled",
    "COMPLETED": "the job script ended",
    "DEADLINE": "its deadline passed",
    "FAILED": "the job script failed",
    "NODE_FAIL": "a node went down",
    "OUT_OF_MEMORY": "it used more memory than it asked for (--mem)",
    "PREEMPTED": "another job took its nodes",
    "TIMEOUT": "the time limit (--time) ended it",
}

_WAITS = {
    "": "SLURM has not looked at it yet",
    "BeginTime": "waits for its time to begin (after a requeue SLURM waits two minutes)",
    "BadConstraints": "no node can ever meet what it asks for; cancel it and ask for less",
    "Cleaning": "its last attempt is still being cleared away",
    "Dependency": "waits for other jobs",
    "DependencyNeverSatisfied": "waits for a job that failed, in vain; cancel it",
    "InactiveLimit": "SLURM's limit for inactive jobs was reached",
    "InvalidAccount": "the account (--account) is not valid; cancel it and give another",
    "InvalidQOS": "the quality of service (--qos) is not valid; cancel it and give another",
    "JobArrayTaskLimit": "as many tasks of the array run as may at a time",
    "JobHeldAdmin": "held by an administrator; ask them",
    "JobHeldUser": "held; `scontrol release {job_id}` lets it go on",
    "Licenses": "waits for licences",
    "NodeDown": "a node it needs is down",
    "PartitionDown": "the partition (--partition) is down",
    "PartitionInactive": "the partition (--partition) is inactive",
    "PartitionNodeLimit": "asks for more nodes than the partition allows, or none is up; see `sinfo`",
    "PartitionTimeLimit": "asks for more time (--time) than the partition allows; cancel it and ask for less",
    "Priority": "jobs of higher priority come first",
    "Prolog": "the nodes are being prepared",
    "ReqNodeNotAvail": "a node it asks for is not available (down, drained or reserved)",
    "Reservation": "waits for its reservation to begin",
    "ReservationDeleted": "its reservation is gone; cancel it and launch again",
    "Resources": "waits for free nodes",
    "job requeued in held state": "requeued and held; `scontrol release {job_id}` lets it go on",
    "launch failed requeued held": "its nodes could not start it, so SLURM holds it; "
    "`scontrol release {job_id}` tries again",
    "JobLaunchFailure": "its nodes could not start it",
}

_WAIT_PREFIXES = {
    "Assoc": "your account's limit is reached ({reason})",
    "QOS": "the limit of your quality of service is reached ({reason})",
    "MaxCpuPer": "your limit of CPUs is reached ({reason})",
    "MaxGRESPer": "your limit of GPUs is reached ({reason})",
    "MaxMemPer": "asks for more memory than allowed ({reason})",
    "MaxRequeue": "requeued as often as the cluster allows; `scontrol release {job_id}` lets it go on",
    "Nodes required for job are DOWN": "nodes it could have are down, drained, or kept for jobs of higher priority",
    "ReqNodeNotAvail": "a node it asks for is not available ({reason})",
}

_HELD = frozenset({"JobHeldUser", "JobHeldAdmin", "job requeued in held state", "launch failed requeued held"})


def has_ended(job: QueuedJob) -> bool:
    """Tell whether SLURM is done with the job."""
    return job.state.split()[0] in ENDED


def is_waiting(job: QueuedJob) -> bool:
    """Tell whether the job is in the queue without nodes."""
    return job.state in WAITING


def is_held(job: QueuedJob) -> bool:
    """Tell whether the job waits for somebody to release it."""
    reason = job.reason.strip("()").replace("_", " ")
    return is_waiting(job) and (
        job.state == "REQUEUE_HOLD" or job.reason in _HELD or reason in _HELD or reason.startswith("MaxRequeue")
    )


def explain_wait(job: QueuedJob) -> str:
    """Say why a job waits; a reason that is not known here is shown as SLURM writes it."""
    # squeue prints some reasons with spaces, scontrol the same ones with underscores.
    for reason in (job.reason, job.reason.replace("_", " ")):
        if reason in _WAITS:
            return _WAITS[reason].format(job_id=job.job_id)
        for prefix, words in _WAIT_PREFIXES.items():
            if reason.startswith(prefix):
                return words.format(job_id=job.job_id, reason=job.reason)
    return f"SLURM's reason: {job.reason}"


def explain_end(job: QueuedJob) -> str:
    """Say how SLURM ended a job."""
    if job.state == "CANCELLED" and job.reason == "DependencyNeverSatisfied":
        return "it was cancelled because a job before it failed"
    return _ENDS.get(job.state, f"SLURM says {job.state}")
