"""What a rank holds whatever its cells: weights, gradients, optimizer states, and buffers, under each backend.

Each figure follows what the engine does (`trainer/engine/`), and what DeepSpeed 0.19 and torch's FSDP2 do under it with
float32 weights; `benchmarks/memory.py` compares them with measured peaks. All sizes in bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["replicated", "zero", "fsdp2"]

_FLOAT32 = 4
_SLOTS = {"adamw": 2, "adam": 2, "sgd": 1}
"""Optimizer states per weight, as large as it."""
# DeepSpeed's defaults, in elements.
_BUCKET, _PERSISTENCE, _REUSE = 500_000_000, 100_000, 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Elements of a model's weights."""

    total: int
    largest_block: int
    """Weights of the largest of `model.blocks()`, which is gathered as a whole where weights lie in parts."""
    largest_weight: int
    auxiliary: int = 0
    """Of the total, weights that training alone needs."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A backend as far as memory is concerned; sizes of buffers in elements."""

    kind: Kind
    stage: int = 0
    """ZeRO stage."""
    offload_optimizer: bool = False
    """Optimizer states and gradients on the host (under FSDP2 the weights too)."""
    offload_weights: bool = False
    """Weights on the host between their uses (ZeRO-3)."""
    bucket: int = _BUCKET
    """Gradients that one reduction sends."""
    overlaps: bool = False
    """Whether there are two of those buffers."""
    reuse: int = _REUSE
    """ZeRO-3 keeps gathered weights that are needed again before so many others."""
    persistence: int = _PERSISTENCE
    """Weights smaller than this stay whole under ZeRO-3."""
    reshards: bool = True
    """FSDP2 parts a block's weights after its forward pass."""


@dataclass(frozen=True, kw_only=True)
class StaticMemory:
    """Bytes on one rank."""

    parameters: int
    gradients: int
    optimizer: int
    in_passes: int
    """Beyond these, while passes are made: gathered weights and their gradients."""
    in_update: int
    """Beyond these, in the update, when no activations are there: buffers of the reduction and of the optimizer."""
    host: int
    """On the host, beside a process's own code, where the device is another."""
    teacher: int = 0
    """Weights of an online teacher, which every rank holds whole, whatever the backend does with the student."""

    @property
    def kept(self) -> int:
        """Return what is there throughout a step."""
        return self.parameters + self.gradients + self.optimizer + self.teacher

    def peak(self, activations: float) -> float:
        """Return the peak of a step whose passes take `activations`."""
        return self.kept + max(self.in_passes + activations, self.in_update)


def zero_backend(config: Mapping[str, Any]) -> Backend:
    """Read what matters from a DeepSpeed configuration, with DeepSpeed's own defaults."""
    zero = config["zero_optimization"]
    stage = int(zero["stage"])

    def size(name: str, default: int) -> int:
        value = zero.get(name, default)
        return default if value == "auto" else int(value)

    def on_host(name: str) -> bool:
        return str((zero.get(name) or {}).get("device", "none")) != "none"

    return Backend(
        kind="zero",
        stage=stage,
        offload_optimizer=on_host("offload_optimizer"),
        offload_weights=on_host("offload_param"),
        bucket=size("reduce_bucket_size", _BUCKET),
        # DeepSpeed's default hangs on the stage.
        overlaps=bool(zero.get("overlap_comm", stage == 3)) and stage < 3,
        reuse=size("stage3_max_reuse_distance", _REUSE),
        persistence=size("stage3_param_persistence_threshold", _PERSISTENCE),
    )


def static_memory(
    model: ModelSize,
    *,
    backend: Backend,
    world_size: int,
    optimizer: str,
    on_cuda: bool,
    fused: bool = False,
    teacher: int = 0,
) -> StaticMemory:
    """Return what one of `world_size` ranks holds; `fused`: whether the optimizer's step is one kernel.

    `teacher`: bytes of an online teacher's weights.
    """
    student = _student_memory(model, backend, world_size, optimizer, on_cuda=on_cuda, fused=fused)
    return dataclasses.replace(student, teacher=teacher)


def _student_memory(
    model: ModelSize, backend: Backend, world_size: int, optimizer: str, *, on_cuda: bool, fused: bool
) -> StaticMemory:
    whole = model.total * _FLOAT32
    part = -(-model.total // world_size) * _FLOAT32
    slots = _SLOTS[optimizer]
    # On CUDA torch's Adam works on many tensors at once and keeps a copy of one state; on a CPU two of each in turn.
    scratch = {True: 1.0, False: 2.0}[on_cuda] if slots == 2 and not fused else 0.0
    if backend.kind == "replicated":
        # One tensor in turn: never more than the largest. The norm takes no copy (`FlatGradients.norm`).
        in_update = scratch * (whole if on_cuda else model.largest_weight * _FLOAT32)
        return _on_device(whole, whole, slots * whole, 0, int(in_update))
    if backend.kind == "fsdp2":
        # One tensor in turn on a CPU, as above: of each, this rank has its part.
        taken = scratch * (part if on_cuda else -(-model.largest_weight // world_size) * _FLOAT32)
        return _fsdp2(model, backend, part, slots, int(taken), world_size)
    buffer = backend.bucket * _FLOAT32
    if not on_cuda:
        # Pages that nothing was written to are not there.
        buffer = min(buffer, whole)
    if backend.stage < 3:
        return _zero12(backend, whole, part, slots, scratch, buffer * (2 if backend.overlaps else 1), model)
    # What gloo sums in parts it copies first, as NCCL does not (measured: 102 MB for a tensor of 100).
    copied = 0 if on_cuda else buffer
    return _zero3(backend, whole, part, slots, scratch, buffer, copied, model)


def _on_device(parameters: int, gradients: int, optimizer: int, in_passes: int, in_update: int) -> StaticMemory:
    return StaticMemory(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        in_passes=in_passes,
        in_update=in_update,
        host=0,
    )


def _zero12(
    backend: Backend, whole: int, part: int, slots: int, scratch: float, buffer: int, model: ModelSize
) -> StaticMemory:
    """Stages 1 and 2, whose passes the engine keeps from reducing: the whole local gradient lies there until the step.

    So stage 2 saves no more than stage 1. Beside the flat weights there is a float32 copy of this rank's part, which
    the optimizer works on. The update moves the gradient into buckets, sends a copy of each, and keeps this rank's part
    of what comes back. When the optimizer steps, the buckets have gone, but that part is there twice: the optimizer
    works on a flat copy, while the gradients of the group of small weights are still views of the original (seen in
    DeepSpeed 0.19: the storages alive when Adam begins).
    """
    largest = model.largest_weight * _FLOAT32
    sent = min(buffer, whole) if buffer else largest
    reducing = buffer - sent + max(sent, part)
    if backend.offload_optimizer:
        # Part, gradient, buffer of the way back, pinned; the states; two single weights on their way.
        host = (3 + slots) * part + int(scratch > 0) * 2 * part + largest
        return StaticMemory(
            parameters=whole,
            gradients=whole,
            optimizer=0,
            in_passes=largest,
            in_update=buffer + sent + largest,
            host=host,
        )
    stepping = int((2 + scratch) * part) - whole
    return _on_device(whole + part, whole, slots * part, 0, max(reducing, stepping))


def _zero3(
    backend: Backend, whole: int, part: int, slots: int, scratch: float, buffer: int, copied: int, model: ModelSize
) -> StaticMemory:
    """Stage 3: everything in parts, a float32 copy of the weights among them; weights gathered for their use.

    Gathered weights that are needed again within `reuse` elements stay: of a model with fewer, all of them, which on
    few ranks takes more than stage 3 saves. They go one by one as the backward pass is done with them, while their
    gradients fill the bucket and are copied to be sent: where it is sent first, one takes the place of the other. Still
    outside of it are the gradients of the layer at work: of a BiLSTM, whose weights are the largest, both directions.
    """
    block, largest = model.largest_block * _FLOAT32, model.largest_weight * _FLOAT32
    gathered = min(whole, max(block, backend.reuse * _FLOAT32))
    # The bucket is there from the start to the end.
    passes = gathered + buffer + copied + 2 * largest
    if backend.offload_optimizer:
        weights = 0 if backend.offload_weights else part
        host = (2 + slots + int(scratch > 0) * 2) * part + (part if backend.offload_weights else 0)
        return StaticMemory(
            parameters=weights,
            gradients=0,
            optimizer=0,
            in_passes=passes,
            in_update=part + buffer,
            host=host,
        )
    return _on_device(2 * part, part, slots * part, passes, int((1 + scratch) * part) + buffer)


def _fsdp2(model: ModelSize, backend: Backend, part: int, slots: int, in_update: int, world_size: int) -> StaticMemory:
    """FSDP2: everything in parts; at worst the gradient of the largest block, a copy to send, and what returns.

    On a GPU the copy to send is made while the gradient is there; on a CPU the gradient has gone when gloo copies that
    copy: two either way.
    """
    whole, block = model.total * _FLOAT32, model.largest_block * _FLOAT32
    passes = 2 * block + -(-block // world_size)
    if not backend.reshards:
        passes += whole - block
    if backend.offload_optimizer:
        return StaticMemory(
            parameters=0, gradients=0, optimizer=0, in_passes=passes, in_update=0, host=(2 + slots) * part
        )
    return _on_device(part, part, slots * part, passes, in_update)
