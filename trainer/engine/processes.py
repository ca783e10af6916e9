"""The processes of a run: which rank this is, and how ranks tell each other what they must agree on."""

from __future__ import annotations

import hashlib
import os
import platform
import random
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from trainer.errors import InputError, TrainingFailedError
from trainer.job.rank import find_job
from trainer.recipe import RunRecipe

Result = TypeVar("Result")

RESTARTS = "SIGNSCALE_RESTARTS"
"""Environment variable that counts how often the processes of a launch have started themselves again."""
_EXPECTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class Processes:
    """The ranks that the launcher started."""

    def __init__(self, recipe: RunRecipe) -> None:
        """Join the other ranks. Raises `InputError` if accelerate sees other ranks than the launcher started."""
        _silence_libraries()
        seed_everything(recipe.seed)
        if recipe.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        if recipe.detect_anomaly:
            torch.autograd.set_detect_anomaly(True)
        meet_again()
        self._accelerator = Accelerator(cpu=runs_on_cpu(), step_scheduler_with_optimizer=False)
        self.rank: int = self._accelerator.process_index
        self.world_size: int = self._accelerator.num_processes
        self.device: torch.device = self._accelerator.device
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if self.world_size != started:
            # Each rank would train alone on all data and call it a success.
            raise InputError(
                f"accelerate sees {self.world_size} process(es), the launcher started {started}; without GPUs launch "
                "with accelerate_configs/multi_cpu.yaml"
            )
        if self._accelerator.distributed_type not in _EXPECTED:
            raise InputError(
                f"accelerate runs {self._accelerator.distributed_type}, which this engine does not drive; launch with "
                "one of accelerate_configs/"
            )
        self._check_token()

    def _check_token(self) -> None:
        """Raise `TrainingFailedError`, on every rank, if they are not all of one job.

        Ranks meet at an address and a port, and a launcher lets whoever comes there in.
        """
        job = find_job()
        mine = (hashlib.sha256(job.token.encode()).hexdigest(), job.attempt or "a plain command", platform.node())
        all_of_them = self.gather_objects(mine)
        if len({token for token, _, _ in all_of_them}) == 1:
            return
        met = {(attempt, host): [] for _, attempt, host in all_of_them}  # type: dict[tuple[str, str], list[str]]
        for rank, (_, attempt, host) in enumerate(all_of_them):
            met[attempt, host].append(str(rank))
        groups = "; ".join(
            f"rank {', '.join(ranks)}: {attempt} on {host}" for (attempt, host), ranks in sorted(met.items())
        )
        error = TrainingFailedError(
            f"rank {self.rank}: ranks of different jobs have met at {os.environ.get('MASTER_ADDR')}:"
            f"{os.environ.get('MASTER_PORT')} ({groups}); none of them trains. The port belongs to one of the jobs: "
            "launch the other one again"
        )
        # Each launcher has its own log, and each of them should say it; the next attempt has another port.
        error.local = error.passing = True
        raise error

    @property
    def is_main(self) -> bool:
        """Tell whether this rank writes what is shared."""
        return self.rank == 0

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum a host tensor over the ranks, in place."""
        if self.world_size > 1:
            moved = values.to(self.device)
            dist.all_reduce(moved)
            values.copy_(moved)
        return values

    def gather_objects(self, item: Any) -> list[Any]:
        """Return the items of all ranks, in their order, on every rank."""
        if self.world_size == 1:
            return [item]
        items: list[Any] = [None] * self.world_size
        dist.all_gather_object(items, item)
        return items

    def on_main(self, act: Callable[[], Result]) -> Result:
        """Run `act` on rank 0 and return its result on every rank.

        An `InputError` is raised on all ranks; after any other failure of rank 0 the others leave too.
        """
        outcome: list[Any] = [None, None]
        failure: Exception | None = None
        if self.is_main:
            try:
                outcome[0] = act()
            except InputError as error:
                outcome[1] = error
            except TrainingFailedError as error:
                failure, outcome[1] = error, TrainingFailedError(str(error))
            except Exception as error:
                failure = error
                outcome[1] = TrainingFailedError(f"rank 0: {type(error).__name__}: {error}")
        if self.world_size > 1:
            dist.broadcast_object_list(outcome, src=0)
        if failure is not None:
            raise failure
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def together(self, act: Callable[[], Result]) -> Result:
        """Run `act` on every rank; an `InputError` of any of them is raised on all, once for what several found."""
        result: Result | None = None
        problems: tuple[str, ...] = ()
        try:
            result = act()
        except InputError as error:
            problems = error.problems
        found = dict.fromkeys(problem for part in self.gather_objects(problems) for problem in part)
        if found:
            raise InputError(found)
        return result  # type: ignore[return-value]

    def close(self) -> None:
        """Leave the process group."""
        self._accelerator.end_training()


def restarts() -> int:
    """Count how often this launch's processes have started themselves again."""
    return int(os.environ.get(RESTARTS, "0"))


def meeting_store(name: str, *, may_serve: bool = False) -> dist.Store:
    """Connect anew to the store in which the ranks met; what an earlier attempt left there is out of sight."""
    serves = may_serve and os.environ.get("RANK") == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=serves,
        wait_for_workers=False,
        timeout=timedelta(minutes=5),
    )
    return dist.PrefixStore(f"{name}_{restarts()}", store)


def meet_again() -> None:
    """Join the ranks of a run that started itself again: torch would read what the last attempt wrote of them."""
    if restarts() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group(
            "gloo" if runs_on_cpu() else "nccl",
            store=meeting_store("ranks", may_serve=True),
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
        )


def runs_on_cpu() -> bool:
    """Tell whether the launcher wants CPUs, or there is nothing else."""
    return not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")


def seed_everything(seed: int) -> None:
    """Seed the generators that weights are drawn from; training draws from none of them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _silence_libraries() -> None:
    """Keep warnings off the screen that tell a user of this trainer nothing."""
    warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")
    if runs_on_cpu():
        # DeepSpeed, which accelerate imports where it finds it, otherwise warns about the missing GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
