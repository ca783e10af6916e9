"""How much the GPU benchmark does: on a GPU, and to see it run anywhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gpu_runs import Runner, Section

_NEVER = 10**9


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of corpora, models and runs."""

    name: Literal["full", "quick"]
    clips: int
    """Training clips."""
    corpus_size: Literal["full", "demo"]
    """Kind of the synthetic corpus: see `SyntheticSpec`."""
    feature_dim: int
    """Features a frame."""
    model: dict[str, Any]
    """Flags of the model."""
    steps: int
    """Steps whose losses are compared."""
    budget: int
    """Frames of a cell where backends are compared: the same cells for each of them."""
    crowded: dict[str, Any]
    """Flags of a run whose whole batch is one cell: what memory is to run out for."""
    timed_steps: int
    """Steps whose time is taken."""
    warmup: int
    """Steps before those."""
    workers: int
    """Worker processes of the plain loop's DataLoader."""
    common: dict[str, Any] = field(
        default_factory=lambda: {
            "batch_size": 8,
            "gradient_accumulation_steps": 2,
            "log_every": 1,
            "evaluate_every": _NEVER,
            "train_wer_clips": 0,
            "trackers": "[]",
            "warmup_epochs": 1,
        }
    )
    """Flags of every run: a line of metrics at each step, validations at the beginning and the end alone."""

    def flags(self, runner: Runner, **others: Any) -> dict[str, Any]:
        """Return the flags of a run on the packed corpus."""
        return {"data_dir": packed_corpus(runner), **self.common, **self.model, **others}

    def write_corpus(self, runner: Runner, section: Section) -> dict[str, Any]:
        """Write the synthetic corpus, a file per clip, and pack it."""
        raw, packed = npz_corpus(runner), packed_corpus(runner)
        kind = ["--clips", str(self.clips), "--feature_dim", str(self.feature_dim), "--seed", "3"]
        kind += ["--size", self.corpus_size, "--layout", "features", "--out", str(raw)]
        runner.python(["-m", "launch.cli", "synth", *kind], section)
        runner.python(["-m", "launch.cli", "pack", str(raw), str(packed)], section)
        return {"clips": self.clips, "feature_dim": self.feature_dim, "lengths": self.corpus_size}


def npz_corpus(runner: Runner) -> Path:
    """Return where the corpus lies as a file per clip."""
    return runner.folder / "npz"


def packed_corpus(runner: Runner) -> Path:
    """Return where the corpus lies packed."""
    return runner.folder / "packed"


FULL = Sizes(
    name="full",
    clips=160,
    corpus_size="full",
    feature_dim=6516,
    model={"width": 1.0, "rnn_size": 512, "rnn_layers": 2},
    steps=10,
    budget=2400,
    crowded={"batch_size": 64, "gradient_accumulation_steps": 1, "max_frames_per_microbatch": 10**6, "max_steps": 5},
    timed_steps=60,
    warmup=10,
    workers=8,
)

QUICK = Sizes(
    name="quick",
    clips=40,
    corpus_size="demo",
    feature_dim=32,
    model={"width": 0.02, "rnn_size": 12, "rnn_layers": 1},
    steps=3,
    budget=300,
    # Activations of some 200 MB beside few weights, so that what runs out is theirs.
    crowded={
        "batch_size": 8,
        "gradient_accumulation_steps": 1,
        "max_frames_per_microbatch": 10**6,
        "max_steps": 3,
        "width": 0.25,
    },
    timed_steps=3,
    warmup=1,
    workers=0,
)
