"""DeepSpeed's ZeRO: optimizer states, and from stage 3 on the weights, lie in parts on the ranks.

DeepSpeed is driven below its own notion of accumulation. Under stages 1 and 2 passes go past its engine: gradients add
up on this rank, whatever the number of passes and however often one of them broke off, and one coalesced reduction
follows at the update. By itself stage 2 reduces in every pass, beyond recall. Stage 3 communicates in every pass in any
case; there `managed_gradient_accumulation` is off, so that `step` is the boundary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from trainer.engine.engine import Engine, State, Update, named_slots, to_host
from trainer.engine.precision import PreciseModel
from trainer.engine.processes import Processes, runs_on_cpu
from trainer.layout import TimeLayout
from trainer.models.temporal_head import Outputs
from trainer.optimization import make_optimizer
from trainer.recipe import OptimizationRecipe, RunRecipe


class ZeroEngine(Engine):
    """ZeRO stages 1 to 3, offloaded or not, as the configuration says."""

    def __init__(self, processes: Processes, recipe: RunRecipe, config: dict[str, Any]) -> None:
        super().__init__(processes, recipe)
        self._config = config
        self.stage = int(config["zero_optimization"]["stage"])
        offload = config["zero_optimization"].get("offload_optimizer", {}).get("device", "none")
        self.name = f"ZeRO-{self.stage}" + ("" if offload == "none" else f", optimizer on {offload}")
        self.rung = f"zero{self.stage}" + ("" if offload == "none" else "_offload")
        self.communicates_in_passes = self.stage == 3

    def _prepare(self, model: PreciseModel, recipe: OptimizationRecipe | None) -> None:
        deepspeed = import_deepspeed()
        if recipe is None:
            self._deepspeed: Any = model
            self._plain = model
            return
        optimizer = make_optimizer(model.model, recipe)
        config = {
            **self._config,
            "gradient_clipping": float(recipe.gradient_clip),
            "managed_gradient_accumulation": not self.communicates_in_passes,
        }
        self._plain = model
        self._deepspeed, self._zero, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
        if not self.communicates_in_passes:
            self._zero._coalesce_grad_reduction = True
        self._forced = False
        original = self._zero.has_overflow
        # All ranks skip where one of them says so, by DeepSpeed's own way of skipping.
        self._zero.has_overflow = lambda *args, **kwargs: True if self._forced else original(*args, **kwargs)

    def forward(self, features: Tensor, layout: TimeLayout) -> Outputs:
        """Return float32 logits `[M, V]` of a micro-batch, and what else training asks of the model."""
        outputs: Outputs = (self._deepspeed if self.communicates_in_passes else self._plain)(features, layout)
        return outputs

    def backward(self, loss_sum: Tensor, denominator: float, *, is_last: bool) -> None:
        """Add the gradient of `loss_sum / denominator` to that of the global batch."""
        # DeepSpeed averages over ranks; the sum wants them added. It applies its own loss scale, which is ours.
        self._zero.loss_scaler.cur_scale = self.loss_scale.value
        loss = loss_sum * (self.world_size / denominator)
        if self.communicates_in_passes:
            self._deepspeed.backward(loss)
        else:
            (loss * self.loss_scale.value).backward()

    def forget_passes(self) -> None:
        """Forget this rank's passes of the step so far."""
        for parameter in self.module.parameters():
            parameter.grad = None

    def discard(self) -> None:
        """Forget the step's gradient on all ranks."""
        if self.communicates_in_passes:
            self._forced = True
            self._deepspeed.step()
            self._forced = False
        else:
            self.forget_passes()

    def update(self, learning_rate: float, max_norm: float) -> Update:
        """Sum the gradient over ranks, clip it, and step, or skip if it is not finite."""
        for group in self._zero.param_groups:
            group["lr"] = learning_rate
        if not self.communicates_in_passes:
            with self._deepspeed.coalesce_grad_reduction():
                pass
        self._deepspeed.step()
        self._zero._coalesce_grad_reduction = not self.communicates_in_passes
        applied = not bool(self._zero.overflow)
        norm = float(self._deepspeed.get_global_grad_norm()) if applied else math.inf
        self.loss_scale.update(overflowed=not applied)
        return Update(grad_norm=norm, applied=applied)

    def full_state(self) -> tuple[State, State]:
        """Return the whole model's and optimizer's tensors by name, on rank 0's host; gathered one by one."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        self._link_states()
        model: State = {}
        slots: State = {}
        steps = dict(self._scalars())
        for name, parameter in self.module.named_parameters():
            whole = safe_get_full_fp32_param(parameter)
            if self.is_main:
                model[name] = to_host(whole).view(self._shape(parameter))
            for slot in self._slots():
                state = safe_get_full_optimizer_state(parameter, slot)
                if self.is_main and state is not None:
                    slots[f"{name}/{slot}"] = to_host(state).view(self._shape(parameter))
            if self.is_main:
                slots |= {f"{name}/{slot}": value.clone() for slot, value in steps.items()}
        if self.is_main:
            model |= {name: to_host(buffer) for name, buffer in self.module.named_buffers()}
        return model, slots

    def load(self, slots: State) -> None:
        """Restore the optimizer, of whatever backend it was."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        scalars = {slot: value for _, slot, value in named_slots(slots) if value.ndim == 0}
        vectors = {slot for _, slot, value in named_slots(slots) if value.ndim}
        for group, flat in enumerate(self._flat_parts()):
            # On a disk, a part is empty here until it is read; what was not there yet is written with it.
            on_disk = self.stage == 3 and self._zero._swappable_optimizer_subgroup(group)
            if on_disk:
                self._zero._optimizer_states_and_gradient_swap_in(group)
            state = self._zero.optimizer.state[flat]
            for slot in vectors:
                state.setdefault(slot, torch.zeros_like(flat))
            for slot, value in scalars.items():
                state[slot] = value.clone()
            if on_disk:
                self._zero._optimizer_states_and_gradient_swap_out(group)
        self._link_states()
        parameters = dict(self.module.named_parameters())
        for name, slot, value in named_slots(slots):
            if slot not in vectors:
                continue
            if self.stage < 3:
                safe_set_full_optimizer_state(parameters[name], value.to(self.device), slot)
            else:
                # The whole-tensor call fails where the weights do not divide evenly among the ranks.
                safe_set_local_optimizer_state(parameters[name], self._part(value, parameters[name]), slot)

    def _part(self, whole: Tensor, parameter: Any) -> Tensor:
        """Return this rank's part of a tensor, padded with zeros as stage 3 parts weights."""
        size = int(parameter.ds_tensor.ds_numel)
        part = torch.zeros(size, dtype=whole.dtype, device=self.device)
        mine = whole.flatten()[self.rank * size : (self.rank + 1) * size]
        part[: len(mine)] = mine
        return part

    def _link_states(self) -> None:
        """Let DeepSpeed find the states of all weights: by itself it looks once, when only some of them are there."""
        if self.stage < 3:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _flat_parts(self) -> list[Tensor]:
        """Return this rank's parts of the weights, which the optimizer's states belong to."""
        parts = (
            self._zero.fp32_partitioned_groups_flat if self.stage == 3 else self._zero.single_partition_of_fp32_groups
        )
        return list(parts)

    def _states(self) -> Iterable[dict[str, Any]]:
        return (self._zero.optimizer.state[flat] for flat in self._flat_parts())

    def _slots(self) -> list[str]:
        """Name the slots that have a value per weight, in the same order on all ranks."""
        found = {
            slot for state in self._states() for slot, value in state.items() if torch.is_tensor(value) and value.ndim
        }
        return sorted(set().union(*self.gather_objects(found)))

    def _scalars(self) -> Iterator[tuple[str, Tensor]]:
        for state in self._states():
            for slot, value in state.items():
                if not torch.is_tensor(value) or not value.ndim:
                    yield slot, to_host(value)

    def _shape(self, parameter: nn.Parameter) -> torch.Size:
        return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def import_deepspeed() -> Any:
    """Import DeepSpeed without what it would compile for itself and this trainer does not use."""
    import deepspeed

    if runs_on_cpu():
        # Compiled at start for inference alone, in a minute or two.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
