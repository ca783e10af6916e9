"""What a backend offers to the step: passes, one update, and the whole state by name."""

from __future__ import annotations

import abc
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.data.batch import MicroBatch
from trainer.engine.precision import LossScale, PreciseModel, make_loss_scale, watch_overflow
from trainer.engine.processes import Processes
from trainer.errors import TrainingFailedError
from trainer.layout import TimeLayout
from trainer.memory.exhaustion import is_exhaustion
from trainer.models.recognizer import Recognizer
from trainer.models.temporal_head import Outputs
from trainer.recipe import OptimizationRecipe, RunRecipe

State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Update:
    """What became of a step's gradient, on all ranks alike."""

    grad_norm: float
    """Norm of the global gradient before clipping; infinite if it was not finite."""
    applied: bool
    """False: it was not finite, and the step was skipped."""


class Engine(abc.ABC):
    """Passes and updates of one model on this rank, under one backend.

    A step is any number of `forward` and `backward` passes, as many on every rank, then `update` or `discard`. What
    this rank found out about a step must have been shared before: both are decided by all ranks alike.
    """

    name: str
    """Backend, as a log names it."""
    rung: str
    """Backend, as the ladder of memory relief knows it."""
    communicates_in_passes = False
    """Whether forward and backward need the other ranks: then all of them must make the same passes in step."""

    sends_in_last_pass = False
    """Whether the last backward pass of a step already sends gradients to other ranks, beyond recall."""

    def __init__(self, processes: Processes, recipe: RunRecipe) -> None:
        self.processes = processes
        self.rank, self.world_size, self.device = processes.rank, processes.world_size, processes.device
        self.is_main = processes.is_main
        self.all_reduce, self.gather_objects = processes.all_reduce, processes.gather_objects
        self.on_main, self.together = processes.on_main, processes.together
        self.loss_scale: LossScale = make_loss_scale(recipe.mixed_precision)
        self._precision = recipe.mixed_precision
        self._checkpoints_activations = recipe.activation_checkpointing
        self._compiles = recipe.compile
        self._wrapped: PreciseModel | None = None

    def prepare(self, model: Recognizer, recipe: OptimizationRecipe | None) -> None:
        """Take over a model whose weights are the same on every rank; without a recipe, for evaluation alone.

        Raises `TrainingFailedError`, on this rank alone, if it does not fit into memory.
        """
        try:
            self._wrapped = PreciseModel(model.to(self.device), self._precision, self.device)
            if self._compiles:
                compile_blocks(self._wrapped.blocks())
            if self._checkpoints_activations:
                checkpoint_activations(self._wrapped.blocks())
            self._prepare(self._wrapped, recipe)
        except Exception as error:
            if not is_exhaustion(error):
                raise
            message = str(error).partition("\n")[0][:200] or type(error).__name__
            failure = TrainingFailedError(
                f"the model does not fit into the memory of rank {self.rank} under {self.name} ({message}); use a "
                "smaller one (--width, --rnn_size), a backend that parts or moves more of it (see signscale estimate), "
                "or hardware with more memory"
            )
            failure.local = True
            raise failure from None

    @property
    def module(self) -> nn.Module:
        """Return the bare model, whose parameters may be parts of the whole."""
        assert self._wrapped is not None, "no model was prepared"
        return self._wrapped.model

    @abc.abstractmethod
    def _prepare(self, model: PreciseModel, recipe: OptimizationRecipe | None) -> None:
        """Wrap the model and make the optimizer."""

    @abc.abstractmethod
    def forward(self, features: Tensor, layout: TimeLayout) -> Outputs:
        """Return float32 logits `[M, V]` of a micro-batch, and what else training asks of the model."""

    @abc.abstractmethod
    def backward(self, loss_sum: Tensor, denominator: float, *, is_last: bool) -> None:
        """Add the gradient of `loss_sum / denominator` to that of the global batch; `is_last` of this step."""

    def end_passes(self) -> None:  # noqa: B027
        """Send what the last pass would have sent, if it broke off; every rank calls this before it shares anything."""

    @abc.abstractmethod
    def forget_passes(self) -> None:
        """Forget this rank's passes of the step so far, to make them again; only before the last one."""

    @abc.abstractmethod
    def discard(self) -> None:
        """Forget the step's gradient on all ranks."""

    @abc.abstractmethod
    def update(self, learning_rate: float, max_norm: float) -> Update:
        """Sum the gradient over ranks, clip its norm to `max_norm` (0: not), and step, or skip if it is not finite."""

    @abc.abstractmethod
    def full_state(self) -> tuple[State, State]:
        """Return the whole model's and optimizer's tensors by name, on rank 0's host; empty on the other ranks.

        All ranks must ask. Optimizer tensors are named `<parameter>/<slot>`, whatever the backend, so that any of them
        can go on from any other's. No rank but the first ever holds more than one whole tensor.
        """

    @abc.abstractmethod
    def load(self, slots: State) -> None:
        """Restore the optimizer that `full_state` returned, under any backend and on any number of ranks.

        All ranks pass it whole; the weights came with the model that was prepared.
        """

    def first_overflow(self, cell: MicroBatch) -> str:
        """Name the first module whose output is not finite on a cell; empty if there is none. All ranks must ask."""
        found: list[str] = []
        with torch.no_grad(), watch_overflow(self.module, found):
            self.forward(cell.features, cell.layout)
        return found[0] if found else ""

    def training(self, mode: bool) -> None:
        """Switch the model to training or to evaluation."""
        assert self._wrapped is not None
        self._wrapped.train(mode)

    def close(self) -> None:
        """Leave the process group."""
        self.processes.close()


def compile_blocks(blocks: list[nn.Module]) -> None:
    """Compile the blocks without a recurrent layer, whose kernels are compiled already, for inputs of any length."""
    for block in blocks:
        if not any(isinstance(module, nn.RNNBase) for module in block.modules()):
            block.forward = torch.compile(block.forward, dynamic=True)


def count_graphs() -> int:
    """Count the graphs that torch.compile has made in this process."""
    # Imported where it is used: it takes a second that a run without compiling need not spend.
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def checkpoint_activations(blocks: list[nn.Module]) -> None:
    """Let blocks keep their inputs alone until the backward pass computes the rest again (Chen et al. 2016)."""
    for block in blocks:
        # The call of the module, and with it the hooks of a backend that gathers its weights, stays outside. Dropout
        # draws from no generator, so that there is no state to restore.
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def named_slots(slots: State) -> Iterator[tuple[str, str, Tensor]]:
    """Take optimizer tensors apart into parameter, slot and tensor."""
    for key, value in slots.items():
        name, slot = key.rsplit("/", 1)
        yield name, slot, value


def to_host(value: Any) -> Tensor:
    """Return a contiguous copy on the host."""
    return torch.as_tensor(value).detach().cpu().contiguous().clone()
