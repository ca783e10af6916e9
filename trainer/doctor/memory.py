"""Whether the worst batch fits: probed on devices, estimated where nothing but the machine limits a rank."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from trainer.assembly import make_training_loader
from trainer.data.cost import FRAMES_ONLY, read_cost_model
from trainer.data.prepare import TrainingCorpus
from trainer.doctor.finding import Finding, size
from trainer.doctor.storage import check_space, checkpoint_bytes, nearest_folder
from trainer.engine import Engine
from trainer.engine.configuration import read_launch
from trainer.layout import slot_frames
from trainer.loss import StepLoss
from trainer.memory.accounting import granted, is_limited
from trainer.memory.activations import count_activations, read_ahead, size_of
from trainer.memory.model import Load
from trainer.memory.probe import probe
from trainer.memory.static import Backend, static_memory, zero_backend
from trainer.memory.teacher import make_up_teacher, teacher_bytes
from trainer.memory.worst import find_worst
from trainer.models.build import build_model
from trainer.recipe import VIDEO_MODELS, Recipe

CHECK = "worst batch"
STATES = {"adamw": 2, "adam": 2, "sgd": 1}
_CODE = 0.4e9
"""Bytes of a process's own code and libraries."""
_TIGHT = 0.9


def check_memory(recipe: Recipe, corpus: TrainingCorpus, engine: Engine) -> Iterator[Finding]:
    """Run the worst cells forward and backward, or estimate them; every rank must call it."""
    dim, classes = corpus.normalization.feature_dim, len(corpus.vocabulary)
    limited = any(engine.gather_objects(is_limited(engine.device)))
    costs = read_cost_model(Path(recipe.batch.cost_model)) if recipe.batch.cost_model else FRAMES_ONLY
    loader = make_training_loader(recipe, corpus, engine, costs)
    plan = loader.plan
    longest = int(slot_frames(np.array([plan.num_frames.max()]), plan.total_stride)[0])
    budget = int(recipe.batch.max_frames_per_microbatch or recipe.batch.batch_size * longest)
    global_batch = recipe.global_batch_size(engine.world_size)
    worst = find_worst(plan, size=global_batch, world_size=engine.world_size, budget=budget)
    slots = max(min(budget, worst.most), worst.floor)
    if not limited:
        if engine.is_main:
            yield estimate(recipe, dim, classes, engine, slots=slots, padding=worst.padding)
        return
    # The teacher's weights are there before the student's, as in a run.
    teacher = make_up_teacher(recipe, feature_dim=dim, num_classes=classes, device=engine.device)
    model = build_model(recipe.model, feature_dim=dim, num_classes=classes)
    StepLoss(objective=recipe.objective, distillation=teacher).equip(model)
    engine.prepare(model, recipe.optimization)
    states = STATES[recipe.optimization.optimizer]
    found = probe(engine, loader, worst, goal=slots, states=states, distillation=teacher)
    room = "" if found.capacity is None else f" of {size(found.capacity)}"
    taken = found.model.peak(Load(slots=found.budget, padded=round(found.budget * worst.padding)))
    value = f"{size(taken)}{room} a rank at {found.budget} frames a micro-batch, {len(found.passes)} passes probed"
    if not found.fits:
        yield Finding(
            check=CHECK,
            value=f"{value}: the longest clip ({worst.longest} frames) does not fit, not even alone",
            verdict="FAIL",
            mend="--activation_checkpointing true, cut long clips (--max_frames), or shard (see `signscale estimate`)",
        )
    elif found.budget < slots:
        yield Finding(
            check=CHECK,
            value=f"{value}: the recipe would take {slots}",
            verdict="warn",
            mend="training lowers it by itself, with more passes a step; --activation_checkpointing true may save them",
        )
    else:
        yield Finding(check=CHECK, value=value)


def estimate(recipe: Recipe, dim: int, classes: int, engine: Engine, *, slots: int, padding: float) -> Finding:
    """Estimate the peak of a step by counting a few small passes of the model on this machine."""
    checkpointing = recipe.run.activation_checkpointing
    counted = count_activations(recipe, feature_dim=dim, num_classes=classes, checkpointing=checkpointing)
    static = static_memory(
        counted.size,
        backend=_backend(recipe),
        world_size=engine.world_size,
        optimizer=recipe.optimization.optimizer,
        on_cuda=engine.device.type == "cuda",
        fused=recipe.optimization.fused_optimizer,
        teacher=teacher_bytes(recipe, feature_dim=dim, num_classes=classes),
    )
    itemsize = 1 if recipe.model.model in VIDEO_MODELS else 4
    ahead = read_ahead(dim, num_workers=recipe.corpus.num_workers, on_cuda=False, itemsize=itemsize)
    passes = counted.passes.peak(Load(slots=slots, padded=round(slots * padding)))
    total = static.peak(passes) + ahead * slots + static.host + _CODE
    room = granted(engine.device)
    value = f"{size(total)} a rank at {slots} frames a micro-batch, estimated"
    if room is None:
        return Finding(check=CHECK, value=f"{value}; how much there is, nothing says")
    verdict = "FAIL" if total > room else "warn" if total > _TIGHT * room else "ok"
    return Finding(
        check=CHECK,
        value=f"{value}; {size(room)} are there for each",
        verdict=verdict,  # type: ignore[arg-type]
        mend="fewer ranks a node, a smaller --max_frames_per_microbatch, or --activation_checkpointing true"
        if verdict != "ok"
        else "",
    )


def check_checkpoint_space(recipe: Recipe, corpus: TrainingCorpus, node: str) -> Iterator[Finding]:
    """Compare the free space of the run directory with the checkpoints that the run keeps."""
    shape = {"feature_dim": corpus.normalization.feature_dim, "num_classes": len(corpus.vocabulary)}
    parameters = size_of(recipe, **shape).total
    needed = checkpoint_bytes(parameters, STATES[recipe.optimization.optimizer], recipe.run.keep_checkpoints)
    yield check_space(nearest_folder(Path(recipe.run.output_dir)), node, needed, check="checkpoint space")


def _backend(recipe: Recipe) -> Backend:
    launch = read_launch(os.environ, recipe)
    if launch.zero is not None:
        return zero_backend(launch.zero)
    if launch.fsdp is not None:
        return Backend(kind="fsdp2", offload_optimizer=launch.fsdp.offload, reshards=launch.fsdp.reshard)
    return Backend(kind="replicated")
