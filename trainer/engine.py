"""The engine: the one room that knows how a sum becomes a gradient on this hardware.

Plain and DDP here, through Accelerate. Every gradient is that of `sum over the global batch / denominator`, whatever
the number of ranks or of micro-batches; nothing else in the code asks what the backend is.
"""

from __future__ import annotations

import contextlib
import os
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType
from torch import Tensor, nn

from trainer.errors import InputError, TrainingFailedError
from trainer.recipe import RunRecipe

Result = TypeVar("Result")

_UNSUPPORTED = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_FSDP": "FSDP"}


class Engine:
    """Processes, devices and gradients of a run."""

    def __init__(self, recipe: RunRecipe) -> None:
        """Join the ranks that the launcher started.

        Raises `InputError` if the launcher's configuration asks for what the engine does not offer, or for another
        precision than the recipe.
        """
        _check_launcher(recipe)
        _silence_libraries()
        seed_everything(recipe.seed)
        if recipe.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true"),
            mixed_precision=recipe.mixed_precision,
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if self.world_size != started:
            # Each rank would train alone on all data and call it a success.
            raise InputError(
                f"accelerate sees {self.world_size} process(es), the launcher started {started}; without GPUs launch "
                "with accelerate_configs/multi_cpu.yaml"
            )
        allowed = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        if self.accelerator.distributed_type not in allowed:
            raise InputError(
                f"accelerate runs {self.accelerator.distributed_type}, which this engine does not drive; launch with "
                "one of accelerate_configs/"
            )
        self.model: nn.Module = nn.Identity()
        self.optimizer: Any = None

    @property
    def pins_memory(self) -> bool:
        """Tell whether host memory should be pinned for copies to the device."""
        return self.device.type == "cuda"

    @property
    def is_main(self) -> bool:
        """Tell whether this rank writes what is shared."""
        return self.rank == 0

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Wrap model and optimizer for this backend; rank 0's weights become everyone's."""
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    @property
    def module(self) -> nn.Module:
        """Return the model without its wrapper, for evaluation and for its state."""
        return self.accelerator.unwrap_model(self.model)

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Enclose a forward pass in the recipe's precision."""
        return self.accelerator.autocast()

    @contextlib.contextmanager
    def micro_batch(self, *, is_last: bool) -> Iterator[None]:
        """Enclose forward and backward of a micro-batch; only the last one of a step communicates."""
        with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.model):
            yield

    def backward(self, loss_sum: Tensor, denominator: float) -> None:
        """Add the gradient of `loss_sum / denominator` to that of the global batch."""
        # DDP averages over ranks; the sum wants them added.
        self.accelerator.backward(loss_sum * (self.world_size / denominator))

    def clip(self, max_norm: float) -> float:
        """Clip the global gradient to `max_norm` (0: leave it) and return its norm before that."""
        limit = max_norm if max_norm > 0 else float("inf")
        return float(self.accelerator.clip_grad_norm_(self.model.parameters(), limit))

    def step(self, learning_rate: float) -> None:
        """Apply the gradient and forget it."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()

    def skip_step(self) -> None:
        """Forget the gradient."""
        self.optimizer.zero_grad()

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

    def full_state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the whole model's and the whole optimizer's tensors by name, on the host.

        Optimizer tensors are named `<parameter>/<slot>`, so that they do not depend on the order of parameters.
        """
        model = {name: tensor.detach().cpu().contiguous() for name, tensor in self.module.state_dict().items()}
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        slots = {
            f"{names[id(parameter)]}/{slot}": torch.as_tensor(value).detach().cpu().contiguous()
            for parameter, state in self._torch_optimizer().state.items()
            for slot, value in state.items()
        }
        return model, slots

    def load(self, model: dict[str, Tensor], slots: dict[str, Tensor]) -> None:
        """Restore what `full_state` returned."""
        self.module.load_state_dict(model)
        optimizer = self._torch_optimizer()
        by_name = dict(self.module.named_parameters())
        for key, value in slots.items():
            name, slot = key.rsplit("/", 1)
            parameter = by_name[name]
            # Adam's step counter stays on the host, as the optimizer made it.
            target = value.clone() if slot == "step" and not _is_fused(optimizer) else value.to(parameter.device)
            optimizer.state[parameter][slot] = target.clone()

    def _torch_optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer.optimizer

    def close(self) -> None:
        """Leave the process group."""
        self.accelerator.end_training()


def seed_everything(seed: int) -> None:
    """Seed the generators that weights are drawn from; training draws from none of them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _silence_libraries() -> None:
    """Keep warnings off the screen that tell a user of this trainer nothing."""
    warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")
    if not torch.cuda.is_available():
        # DeepSpeed, which accelerate imports where it finds it, otherwise warns about the missing GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _is_fused(optimizer: torch.optim.Optimizer) -> bool:
    return any(group.get("fused") for group in optimizer.param_groups)


def _check_launcher(recipe: RunRecipe) -> None:
    problems = [
        f"{variable}: the launch configuration asks for {name}, which this engine does not drive yet; launch with one "
        "of accelerate_configs/"
        for variable, name in _UNSUPPORTED.items()
        if os.environ.get(variable, "false").lower() in ("1", "true")
    ]
    if os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") not in ("", "1"):
        # Accelerate would divide every gradient by it.
        problems.append(
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS: accumulation belongs to the recipe "
            "(--gradient_accumulation_steps); remove it from the launch configuration and the environment"
        )
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", recipe.mixed_precision):
        problems.append(
            f"mixed_precision: the launch configuration says {asked}, the recipe {recipe.mixed_precision}; say it in "
            "the recipe alone (--mixed_precision)"
        )
    if problems:
        raise InputError(problems)
