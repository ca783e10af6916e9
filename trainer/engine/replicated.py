"""Every rank holds the whole model: one process, or data parallelism.

Gradients lie end to end in one flat buffer. It is summed in chunks, in a fixed order, while the last backward pass
still computes what is missing (Li et al. 2020). torch's DistributedDataParallel does the same; ours can also end a pass
that ran out of memory half-way: the chunks that are left go out as they are, all ranks stay in step, and the gradient
is discarded by all.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.engine.engine import Engine, State, Update, named_slots, to_host
from trainer.engine.precision import PreciseModel
from trainer.layout import TimeLayout
from trainer.models.temporal_head import Outputs
from trainer.optimization import make_optimizer, plain_step
from trainer.recipe import OptimizationRecipe

_CHUNK_BYTES = 25 << 20


class FlatGradients:
    """The gradients of a model's parameters in one buffer, summed over ranks chunk by chunk."""

    def __init__(self, parameters: list[nn.Parameter], world_size: int, chunk_bytes: int = _CHUNK_BYTES) -> None:
        # Backward passes end with the first parameters.
        self._parameters = parameters[::-1]
        self._world_size = world_size
        self.buffer = torch.zeros(
            sum(p.numel() for p in parameters), dtype=parameters[0].dtype, device=parameters[0].device
        )
        self._chunks: list[tuple[int, int]] = []
        self._missing: list[int] = []
        self._first_missing: list[int] = []
        self._pending: list[dist.Work] = []
        self._sent = 0
        self._listening = False
        start = offset = members = 0
        for parameter in self._parameters:
            parameter.grad = self.buffer[offset : offset + parameter.numel()].view_as(parameter)
            parameter.register_post_accumulate_grad_hook(self._make_hook(len(self._chunks)))
            offset, members = offset + parameter.numel(), members + 1
            if (offset - start) * self.buffer.element_size() >= chunk_bytes or parameter is self._parameters[-1]:
                self._chunks.append((start, offset))
                self._first_missing.append(members)
                start, members = offset, 0

    def listen(self) -> None:
        """Send each chunk as soon as the pass that begins now has computed it."""
        self._missing = list(self._first_missing)
        self._sent, self._listening = 0, self._world_size > 1

    def send_rest(self) -> None:
        """Send what was not sent yet, whatever it holds."""
        if self._world_size > 1:
            if not self._listening:
                self.listen()
            self._send(len(self._chunks))

    def finish(self) -> None:
        """Wait for all chunks of all ranks."""
        for work in self._pending:
            work.wait()
        self._pending, self._listening = [], False

    def norm(self) -> float:
        """Return the norm of all gradients; summed in float64, chunk by chunk, since a whole copy may not fit."""
        norms = [torch.linalg.vector_norm(self.buffer[start:stop]) for start, stop in self._chunks]
        return float(torch.stack(norms).double().square().sum().sqrt())

    def zero(self) -> None:
        """Forget all gradients."""
        self.buffer.zero_()

    def _make_hook(self, chunk: int):  # type: ignore[no-untyped-def]
        def arrived(parameter: nn.Parameter) -> None:
            if self._listening:
                self._missing[chunk] -= 1
                # In the order of chunks, so that all ranks send them in the same one.
                ready = self._sent
                while ready < len(self._chunks) and self._missing[ready] == 0:
                    ready += 1
                self._send(ready)

        return arrived

    def _send(self, until: int) -> None:
        for start, stop in self._chunks[self._sent : until]:
            work = dist.all_reduce(self.buffer[start:stop], async_op=True)
            assert work is not None
            self._pending.append(work)
        self._sent = max(self._sent, until)


class ReplicatedEngine(Engine):
    """One process, or several that hold the whole model each."""

    name = "data parallel"
    rung = "replicated"

    @property
    def sends_in_last_pass(self) -> bool:  # type: ignore[override]
        """Tell whether there is another rank to send gradients to."""
        return self.world_size > 1

    def _prepare(self, model: PreciseModel, recipe: OptimizationRecipe | None) -> None:
        self._model = model
        if recipe is None:
            return
        if self.world_size > 1:
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, src=0)
        self.optimizer = make_optimizer(self.module, recipe)
        self._gradients = FlatGradients(list(self.module.parameters()), self.world_size)

    def forward(self, features: Tensor, layout: TimeLayout) -> Outputs:
        """Return float32 logits `[M, V]` of a micro-batch, and what else training asks of the model."""
        outputs: Outputs = self._model(features, layout)
        return outputs

    def backward(self, loss_sum: Tensor, denominator: float, *, is_last: bool) -> None:
        """Add the gradient of `loss_sum / denominator` to that of the global batch."""
        if is_last:
            self._gradients.listen()
        (loss_sum * (self.loss_scale.value / denominator)).backward()

    def end_passes(self) -> None:
        """Send the chunks that a pass which broke off has left."""
        self._gradients.send_rest()

    def forget_passes(self) -> None:
        """Forget this rank's passes of the step so far."""
        self._gradients.zero()

    def discard(self) -> None:
        """Forget the step's gradient, once all ranks have sent theirs."""
        self._gradients.finish()
        self._gradients.zero()

    def update(self, learning_rate: float, max_norm: float) -> Update:
        """Sum the gradient over ranks, clip it, and step, or skip if it is not finite."""
        self._gradients.finish()
        flat = self._gradients.buffer
        if self.loss_scale.value != 1.0:
            flat.div_(self.loss_scale.value)
        # The sum is the same on every rank, to the bit, and so is what follows from it.
        norm = self._gradients.norm()
        applied = math.isfinite(norm)
        self.loss_scale.update(overflowed=not applied)
        if applied:
            if 0 < max_norm < norm:
                flat.mul_(max_norm / (norm + 1e-6))
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            plain_step(self.optimizer)
        self._gradients.zero()
        return Update(grad_norm=norm if applied else math.inf, applied=applied)

    def full_state(self) -> tuple[State, State]:
        """Return the whole model's and optimizer's tensors by name, on rank 0's host."""
        if not self.is_main:
            return {}, {}
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        slots = {
            f"{names[id(parameter)]}/{slot}": to_host(value)
            for parameter, state in self.optimizer.state.items()
            for slot, value in state.items()
        }
        return {name: to_host(tensor) for name, tensor in self.module.state_dict().items()}, slots

    def load(self, slots: State) -> None:
        """Restore the optimizer."""
        by_name = dict(self.module.named_parameters())
        fused = any(group.get("fused") for group in self.optimizer.param_groups)
        for name, slot, value in named_slots(slots):
            parameter = by_name[name]
            # Adam's step counter stays on the host, as the optimizer made it.
            on_host = slot == "step" and not fused
            self.optimizer.state[parameter][slot] = value.clone() if on_host else value.to(parameter.device).clone()
