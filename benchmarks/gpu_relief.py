"""Memory that runs out for real: the run goes on, one rung of the ladder lower, and its losses stay the same.

How much is too little is measured first. A part trains with all the memory as it would begin and as it is to end; the
limit lies between what the two take. Where that is too close to tell them apart, the part is skipped and says so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gpu_correctness import check_backend, compare, float32_bar
from gpu_runs import ROOT, FailedError, Runner, Section, SkippedError
from gpu_sizes import Sizes

_CPU_ROOM, _CPU_FRAMES = 60_000_000, 1000
"""Bytes of address space left to a step on a CPU, and frames of the clips of which it holds a few and not all."""
_APART = 0.9
"""The rung must need at most this share of the limit."""
_LIMIT_FROM = 1
"""The first step makes the optimizer's states."""
_LONG_CLIPS, _LONG_FEATURES, _LONG_GLOSSES = 8, 32, 20
_NEEDS_GPU = "needs a GPU: on a CPU only the address space can be limited, which is too coarse for this"
_OFFLOAD = ROOT / "ds_configs" / "zero2_offload.json"


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A way down that memory is to force."""

    title: str
    """Name in the log of the run."""
    flags: dict[str, Any]
    """Flags of the run as it begins."""
    lower: dict[str, Any]
    """Flags that it is to go on with, beside those."""
    backend: str = "replicated"
    """Backend that it is to go on with, or a DeepSpeed configuration."""
    name: str = "replicated"
    """That backend, as the ladder names it."""


def relieve(
    runner: Runner, section: Section, sizes: Sizes, *, machine: dict[str, Any], variants: Sequence[str]
) -> None:
    """Provoke shortages at each rung, and survive them."""
    section.run("cells halved", lambda: _halve(runner, section, sizes))
    for name, make in (("activation checkpointing", _checkpointing), ("CPU offload", _offload)):
        section.run(name, partial(_descend, runner, section, sizes, name, make))


def _halve(runner: Runner, section: Section, sizes: Sizes) -> dict[str, Any]:
    """Let a batch not fit that fits in parts."""
    flags = sizes.flags(runner, **sizes.crowded)
    if not runner.on_gpu:
        flags["data_dir"] = write_long_clips(runner.folder / "crowd", frames=_CPU_FRAMES)
    free = runner.train("halved_free", flags, section)
    if runner.on_gpu:
        base = max(step["start"] for step in free.steps[_LIMIT_FROM:])
        # The batch, and the next one read ahead, stay whole; what is halved is what the passes take.
        limit, since = base + 3 * (free.peak() - base) // 4, _LIMIT_FROM
    else:
        limit, since = _CPU_ROOM, _LIMIT_FROM
    limited = runner.train("halved_limited", flags, section, limit=limit, limit_from=since)
    shortages = sum(event.get("shortages", 0) for event in limited.events)
    if not shortages:
        raise FailedError(f"memory did not run out within {limit / 1e6:.0f} MB")
    again = [event["rung"] for event in limited.events if event["event"] == "started_again"]
    if again:
        raise FailedError(f"halving was not enough: started again with {', '.join(again)}")
    figures = compare(limited, free, float32_bar(runner))
    return figures | {"shortages": shortages, "limit_bytes": limit, "free_peak_bytes": free.peak()}


def _descend(
    runner: Runner, section: Section, sizes: Sizes, name: str, make: Callable[[Runner, Sizes], Rung]
) -> dict[str, Any]:
    """Let a single clip not fit that fits one rung lower."""
    if not runner.on_gpu:
        raise SkippedError(_NEEDS_GPU)
    rung = make(runner, sizes)
    folder = name.replace(" ", "_")
    before = runner.train(f"{folder}_before", rung.flags, section)
    after = runner.train(f"{folder}_after", rung.flags | rung.lower, section, backend=rung.backend)
    check_backend(after, rung.name)
    compare(after, before, float32_bar(runner))
    needs, runs_out = after.peak(), before.peak("passes")
    start = before.peak("start")
    # Above what the rung needs, below what a pass needs without it; and room to read the clip that does not fit.
    limit = max((needs + runs_out) // 2, start + (runs_out - start) // 2)
    if needs > _APART * limit:
        raise SkippedError(
            f"a pass takes {runs_out / 1e6:.0f} MB before and {needs / 1e6:.0f} MB after: no limit lies safely between"
        )
    limited = runner.train(f"{folder}_limited", rung.flags, section, limit=limit, limit_from=_LIMIT_FROM)
    taken = [event["rung"] for event in limited.events if event["event"] == "started_again"]
    if taken != [rung.title]:
        raise FailedError(
            f"expected one start again, with {rung.title}; found {taken or 'none'} ({limit / 1e6:.0f} MB)"
        )
    check_backend(limited, rung.name)
    figures = compare(limited, before, float32_bar(runner))
    return figures | {"limit_bytes": limit, "before_bytes": runs_out, "after_bytes": needs}


def _checkpointing(runner: Runner, sizes: Sizes) -> Rung:
    """Have activations that dwarf the weights."""
    corpus = write_long_clips(runner.folder / "longest", frames=12_000)
    flags = _one_by_one(runner, sizes, corpus) | {"width": 0.25, "rnn_size": 64, "rnn_layers": 1}
    return Rung(title="activation checkpointing", flags=flags, lower={"activation_checkpointing": "true"})


def _offload(runner: Runner, sizes: Sizes) -> Rung:
    """Have optimizer states that dwarf the activations, which still are more than reading a clip takes."""
    if importlib.util.find_spec("deepspeed") is None:
        raise SkippedError("DeepSpeed is not installed")
    if not _OFFLOAD.exists():
        raise SkippedError(f"{_OFFLOAD.relative_to(ROOT)}, the rung's configuration, is not there")
    corpus = write_long_clips(runner.folder / "long", frames=4_000)
    model = {"width": 1.0, "rnn_size": 1280, "rnn_layers": 2, "activation_checkpointing": "true"}
    flags = _one_by_one(runner, sizes, corpus) | model
    return Rung(title="CPU offload", flags=flags, lower={}, backend=str(_OFFLOAD), name="zero2_offload")


def _one_by_one(runner: Runner, sizes: Sizes, corpus: Path) -> dict[str, Any]:
    """Return flags by which every clip is a cell of its own: a budget that none of them fits."""
    batch = {"batch_size": 4, "gradient_accumulation_steps": 1, "max_frames_per_microbatch": 1, "max_steps": 4}
    return sizes.flags(runner, data_dir=corpus, learning_rate=1e-4, **batch)


def write_long_clips(out: Path, *, frames: int) -> Path:
    """Write a corpus of a few very long training clips, and of short ones for the rest."""
    draws = np.random.default_rng(5)
    (out / "annotations").mkdir(parents=True)
    for split in ("train", "dev", "test"):
        length = frames if split == "train" else 64
        lines = ["id|folder|signer|annotation"]
        (out / split).mkdir()
        for number in range(_LONG_CLIPS):
            name = f"{split}-{number}"
            features = draws.standard_normal((length, _LONG_FEATURES), dtype=np.float32)
            np.savez(out / split / f"{name}.npz", features=features)
            # Every gloss in every clip, so that none is unknown; none follows itself.
            glosses = [f"GLOSS{(number + place) % _LONG_GLOSSES:02d}" for place in range(_LONG_GLOSSES)]
            signed = glosses if split == "train" else glosses[:4]
            lines.append(f"{name}|{split}/{name}.npz|Signer01|{' '.join(signed)}")
        (out / "annotations" / f"{split}.corpus.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return out
