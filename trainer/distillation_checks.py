"""Whether a teacher and a student mean the same: glosses, input, normalisation, strides."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from trainer.data.normalization import Normalization
from trainer.data.vocabulary import Vocabulary
from trainer.distillation import Source
from trainer.errors import InputError, name_some
from trainer.models.auxiliary import AUXILIARY
from trainer.models.recognizer import Recognizer
from trainer.recipe import VIDEO_MODELS, Recipe


def alike(one: Normalization, other: Normalization) -> bool:
    """Tell whether two normalisations give the same values, to rounding."""
    return one.kind == other.kind and all(
        np.allclose(getattr(one, name), getattr(other, name), rtol=1e-5, atol=1e-7) for name in ("mean", "scale")
    )


def check_vocabulary(theirs: Vocabulary, ours: Vocabulary, where: str) -> None:
    """Refuse other glosses, and the same in another order."""
    if theirs != ours:
        missing, excess = sorted(theirs.unknown(ours.glosses)), sorted(ours.unknown(theirs.glosses))
        parts = [
            f"{len(names)} glosses {what} ({name_some(names, 3)})"
            for names, what in ((missing, "it does not know"), (excess, "the corpus does not have"))
            if names
        ]
        raise InputError(
            f"{where}: the teacher's vocabulary is not the student's: {'; '.join(parts) or 'another order'}; class for "
            "class they must mean the same: use a teacher of this corpus"
        )


def check_input(theirs: Recipe, ours: Recipe, where: str) -> None:
    """Refuse a teacher of video for a student of features, the other way round, and frames of another size."""
    kinds = ["video" if one.model.model in VIDEO_MODELS else "features" for one in (theirs, ours)]
    if kinds[0] != kinds[1]:
        raise InputError(
            f"{where}: the teacher takes {kinds[0]}, the student {kinds[1]}, and they cannot see the same clip; "
            "extract its soft targets from its own corpus of the same clips, and use --soft_targets"
        )
    sizes = [(one.corpus.frame_size, one.corpus.frame_crop) for one in (theirs, ours)]
    if kinds[0] == "video" and sizes[0] != sizes[1]:
        raise InputError(
            f"{where}: the teacher was trained on {sizes[0][1]} of {sizes[0][0]} pixels, the student sees "
            f"{sizes[1][1]} of {sizes[1][0]}; use --frame_size {sizes[0][0]} "
            f"--crop_size {sizes[0][1]}, or the teacher's soft targets"
        )


def check_strides(source: Source, stride: int) -> None:
    """Refuse strides whose frames cannot be laid over each other."""
    small, large = sorted((source.total_stride, stride))
    if large % small:
        raise InputError(
            f"total_stride: the student has {stride}, the teacher {source.total_stride}; one must be a multiple of the "
            "other, so that their frames can be laid over each other"
        )


def check_auxiliary(model: Recognizer, stored_weights: Mapping[str, Tensor], *, where: str) -> None:
    """Refuse to go on where what training alone adds to the model has another shape, or is not there.

    The recipe is the checkpoint's, so that only another teacher can be behind it: its features are of another size. A
    copied checkpoint has no record of its teacher beside it, which would tell it otherwise.
    """
    own, stored = (
        {name: list(weight.shape) for name, weight in weights.items() if name.startswith(AUXILIARY)}
        for weights in (model.state_dict(), stored_weights)
    )
    differing = [
        f"{name} is {stored.get(name, 'absent')} there and {own.get(name, 'absent')} with this teacher"
        for name in sorted(own | stored)
        if own.get(name) != stored.get(name)
    ]
    if differing:
        raise InputError(
            f"{where}: {'; '.join(differing)}; the run learns from a teacher whose features are of another size: go on "
            "with --teacher of the one it began with, or start a new --output_dir with --init_from in place of "
            "--resume, which keeps the other weights"
        )
