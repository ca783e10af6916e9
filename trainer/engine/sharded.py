"""torch's FSDP2: weights, gradients and optimizer states lie in parts on the ranks, block by block."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from trainer.engine.engine import Engine, State, Update, named_slots, to_host
from trainer.engine.precision import PreciseModel
from trainer.engine.processes import Processes
from trainer.layout import TimeLayout
from trainer.models.temporal_head import Outputs
from trainer.optimization import make_optimizer
from trainer.recipe import OptimizationRecipe, RunRecipe


class ShardedEngine(Engine):
    """FSDP2, optionally with its shards on the host."""

    communicates_in_passes = True

    def __init__(self, processes: Processes, recipe: RunRecipe, *, offload: bool, reshard: bool) -> None:
        super().__init__(processes, recipe)
        self._offload, self._reshard = offload, reshard
        self.name = "FSDP2" + (", on the host" if offload else "")
        self.rung = "fsdp2" + ("_offload" if offload else "")

    def _prepare(self, model: PreciseModel, recipe: OptimizationRecipe | None) -> None:
        self._model: Any = model
        if recipe is None:
            return
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        policy: OffloadPolicy = (
            CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if self._offload else OffloadPolicy()
        )
        for block in model.blocks():
            fully_shard(block, mesh=mesh, reshard_after_forward=self._reshard, offload_policy=policy)
        fully_shard(model, mesh=mesh, offload_policy=policy)
        self.optimizer = make_optimizer(model.model, recipe)

    def forward(self, features: Tensor, layout: TimeLayout) -> Outputs:
        """Return float32 logits `[M, V]` of a micro-batch, and what else training asks of the model."""
        outputs: Outputs = self._model(features, layout)
        return outputs

    def backward(self, loss_sum: Tensor, denominator: float, *, is_last: bool) -> None:
        """Add the gradient of `loss_sum / denominator` to that of the global batch."""
        # FSDP2 averages over ranks; the sum wants them added.
        (loss_sum * (self.world_size * self.loss_scale.value / denominator)).backward()

    def forget_passes(self) -> None:
        """Forget the passes of the step so far, which all ranks made together."""
        self.optimizer.zero_grad()

    def discard(self) -> None:
        """Forget the step's gradient on all ranks."""
        self.optimizer.zero_grad()

    def update(self, learning_rate: float, max_norm: float) -> Update:
        """Clip the gradient, which the passes have summed already, and step, or skip if it is not finite."""
        parameters = [p for p in self._model.parameters() if p.grad is not None]
        if self.loss_scale.value != 1.0:
            for parameter in parameters:
                parameter.grad.div_(self.loss_scale.value)
        total = nn.utils.get_total_norm([p.grad for p in parameters])
        norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
        applied = math.isfinite(norm)
        self.loss_scale.update(overflowed=not applied)
        if applied:
            if 0 < max_norm < norm:
                for parameter in parameters:
                    parameter.grad.mul_(max_norm / (norm + 1e-6))
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
        self.optimizer.zero_grad()
        return Update(grad_norm=norm if applied else math.inf, applied=applied)

    def full_state(self) -> tuple[State, State]:
        """Return the whole model's and optimizer's tensors by name, on rank 0's host; gathered one by one."""
        model = {name: self._whole(value) for name, value in self.module.state_dict().items()}
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        slots = {
            f"{names[id(parameter)]}/{slot}": self._whole(value)
            for parameter, state in self.optimizer.state.items()
            for slot, value in state.items()
        }
        return (model, slots) if self.is_main else ({}, {})

    def load(self, slots: State) -> None:
        """Restore the optimizer, of whatever backend it was."""
        parameters = dict(self.module.named_parameters())
        for name, slot, value in named_slots(slots):
            parameter = parameters[name]
            self.optimizer.state[parameter][slot] = value.clone() if not value.ndim else self._part(value, parameter)

    def _whole(self, value: Any) -> Tensor:
        """Gather a tensor, on all ranks; only rank 0 keeps it."""
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        return to_host(whole) if self.is_main else torch.empty(0)

    def _part(self, whole: Tensor, like: nn.Parameter) -> Tensor:
        """Return this rank's part of a tensor that every rank holds."""
        if not isinstance(like, DTensor):
            return whole.to(like.device)
        local = distribute_tensor(whole.to(self.device), like.device_mesh, like.placements)
        return local.to(like.device) if self._offload else local
