"""Losses of the same recipe in every precision and under every backend, against one process in float32."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from gpu_runs import FailedError, Runner, Section, SkippedError, Trained
from gpu_sizes import Sizes

PRECISIONS = ("bf16", "fp16")
BACKENDS = ("zero2", "zero3", "zero2_offload", "fsdp2")
REFERENCE = "fp32"
SIXTEEN_BITS_BAR = 2e-2


def float32_bar(runner: Runner) -> float:
    """Return how far losses in float32 may lie apart; on a GPU sums are added up in any order."""
    return 1e-4 if runner.on_gpu else 1e-5


def check_losses(
    runner: Runner, section: Section, sizes: Sizes, *, machine: dict[str, Any], variants: Sequence[str]
) -> None:
    """Train the reference and each variant for a few steps, and compare."""
    flags = sizes.flags(runner, max_steps=sizes.steps, max_frames_per_microbatch=sizes.budget)
    references: list[Trained] = []

    def reference() -> dict[str, Any]:
        trained = runner.train(REFERENCE, flags, section)
        if len(trained.losses) != sizes.steps or not all(one and math.isfinite(one) for one in trained.losses):
            raise FailedError(f"expected {sizes.steps} losses, found {trained.losses}")
        references.append(trained)
        return {"losses": trained.losses} | memory_of(trained)

    def variant(name: str) -> dict[str, Any]:
        if not references:
            raise SkippedError("there is no reference to compare with")
        if name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
            raise SkippedError("DeepSpeed is not installed")
        if name == "bf16" and not machine["bf16"]:
            raise SkippedError(f"{machine['device']} has no bf16")
        if name in PRECISIONS:
            trained = runner.train(name, flags | {"mixed_precision": name}, section)
        else:
            trained = runner.train(name, flags, section, backend=name)
            check_backend(trained, name)
        bar = SIXTEEN_BITS_BAR if name in PRECISIONS else float32_bar(runner)
        figures = compare(trained, references[0], bar)
        if name in PRECISIONS and trained.losses == references[0].losses:
            raise FailedError(f"the losses are those of float32 to the bit: {name} was not used")
        return figures | memory_of(trained)

    section.run(REFERENCE, reference)
    for name in variants:
        section.run(name, partial(variant, name))


def check_backend(trained: Trained, expected: str) -> None:
    """Raise `FailedError` if the last step was made under another backend."""
    found = trained.steps[-1]["backend"]
    if found != expected:
        raise FailedError(f"expected to run under {expected}, found {found}")


def compare(trained: Trained, reference: Trained, bar: float) -> dict[str, Any]:
    """Return the largest relative difference of losses. Raises `FailedError` if it is above the bar."""
    if len(trained.losses) != len(reference.losses):
        raise FailedError(f"expected {len(reference.losses)} losses, found {len(trained.losses)}: {trained.losses}")
    pairs = [(a, b) for a, b in zip(trained.losses, reference.losses, strict=True) if a is not None and b is not None]
    if not pairs:
        raise FailedError("every step was skipped")
    differences = [abs(a - b) / abs(b) for a, b in pairs]
    difference = max(differences)
    # Of each by itself: a difference that is no number is not above the bar, and gets lost among others.
    if not all(one <= bar for one in differences):
        raise FailedError(
            f"losses differ by {difference:.2e}, the bar is {bar:.0e}: {trained.losses} against {reference.losses}"
        )
    skipped = sum(loss is None for loss in trained.losses)
    return {"largest_difference": difference, "bar": bar, "skipped_steps": skipped, "losses": trained.losses}


def memory_of(trained: Trained) -> dict[str, Any]:
    """Return the bytes in use between steps, and the most within one."""
    return {"between_steps_bytes": trained.steps[-1]["start"], "peak_bytes": trained.peak()}
