"""What SLURM says by environment variables, and which of them a new job may not inherit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

# Of the job that submits, or of a launcher: in another job they are wrong, and some of them hang it.
_FOREIGN = (
    *("SLURM_", "SBATCH_", "SRUN_", "SALLOC_", "PMI_", "PMI2_", "PMIX_", "OMPI_", "PRTE_", "MPI_LOCAL", "I_MPI_PMI"),
    *("SIGNSCALE_", "TORCHELASTIC_", "PET_", "GROUP_", "ROLE_", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_"),
    *("ACCELERATE_", "FSDP_", "PYTHONPATH", "PYTHONHOME"),
    *("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE"),
)
_FOREIGN_NAMES = frozenset(("RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "MKL_NUM_THREADS"))


def clean(environ: Mapping[str, str]) -> dict[str, str]:
    """Return what a new job may inherit: all but what belongs to another job, save where the cluster is."""
    return {
        name: value
        for name, value in environ.items()
        if name == "SLURM_CONF" or not (name.startswith(_FOREIGN) or name in _FOREIGN_NAMES)
    }


def attempt_name(environ: Mapping[str, str]) -> str:
    """Name this attempt: JOBID[_TASK].RESTARTS."""
    return f"{job_name(environ)}.{environ.get('SLURM_RESTART_COUNT', '0')}"


def job_name(environ: Mapping[str, str]) -> str:
    """Name this job as squeue does: JOBID, or ARRAYJOB_TASK."""
    task = environ.get("SLURM_ARRAY_TASK_ID")
    return environ["SLURM_JOB_ID"] if task is None else f"{environ['SLURM_ARRAY_JOB_ID']}_{task}"


def task_number(environ: Mapping[str, str]) -> int | None:
    """Return this job's number in its array."""
    task = environ.get("SLURM_ARRAY_TASK_ID")
    return None if task is None else int(task)


def ports(attempt: str, count: int = 64) -> Iterator[int]:
    """Yield the ports that an attempt may use, in its own order: below the ephemeral range, above common services."""
    seed = int.from_bytes(hashlib.sha256(attempt.encode()).digest()[:8], "big")
    for number in range(count):
        yield 20000 + (seed + number * 7919) % 12000
