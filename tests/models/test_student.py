"""The student: small, a clip's output its own, every parameter learns, and a user need name nothing but `student`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.errors import InputError
from trainer.layout import lay_out
from trainer.models.build import ARCHITECTURES, build_model, load_weights
from trainer.models.inception import average
from trainer.models.student import FeatureStudent, InvertedResidual
from trainer.parsing import parse_recipe
from trainer.randomness import clip_keys, mix
from trainer.recipe import ARCHITECTURE_HEADS, ModelRecipe

DIM, CLASSES = 11, 9
STREAMS = {"pose": [0, 3], "hands": [3, 5, 8, 11], "face": [5, 8]}


def make_student(**options: Any) -> FeatureStudent:
    """Build a small student with the biases of a trained one, since fresh ones are small and would hide a leak."""
    torch.manual_seed(0)
    values: dict[str, Any] = {"width": 0.1, "rnn_size": 12, "dropout": 0.0, **options}
    model = FeatureStudent(feature_dim=DIM, num_classes=CLASSES, **values)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.5 * torch.randn_like(parameter)
    return model


def draw_clips(lengths: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(length, DIM, generator=generator) for length in lengths]


def log_probs(model: FeatureStudent, clips: list[Tensor], keys: np.ndarray | None = None) -> list[Tensor]:
    """Return the log-probabilities of each clip, all of them in one micro-batch."""
    layout = lay_out(np.array([len(clip) for clip in clips]), model.total_stride, keys)
    return list(model(torch.cat(clips), layout).log_softmax(dim=-1).split(list(layout.output_lengths)))


STUDENTS = {
    (stride, on): make_student(total_stride=stride, streams=STREAMS if on else None)
    for stride in (1, 2, 4)
    for on in (False, True)
}


# Independence of padding and of neighbours.


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(min_value=1, max_value=30), min_size=2, max_size=9),
    stride=st.sampled_from([1, 2, 4]),
    streams=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_clip_scores_the_same_alone_and_in_any_batch(
    lengths: list[int], stride: int, streams: bool, seed: int
) -> None:
    model = STUDENTS[stride, streams]
    clips = draw_clips(lengths, seed)
    with torch.no_grad():
        together = log_probs(model, clips)
        alone = [log_probs(model, [clip])[0] for clip in clips]
        reversed_ = log_probs(model, clips[::-1])[::-1]
    for clip, one, other, third in zip(clips, alone, together, reversed_, strict=True):
        assert one.shape == (-(-len(clip) // stride), CLASSES)
        assert (one - other).abs().max() <= 1e-5
        assert (one - third).abs().max() <= 1e-5


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17])
def test_loud_neighbours_on_both_sides_are_not_heard(stride: int, length: int) -> None:
    model = STUDENTS[stride, False]
    [clip] = draw_clips([length])
    loud = [100 * part for part in draw_clips([13, 6], seed=1)]
    with torch.no_grad():
        [alone] = log_probs(model, [clip])
        between = log_probs(model, [loud[0], clip, loud[1]])[1]
    assert (alone - between).abs().max() <= 1e-5


def test_the_gradient_of_a_clip_does_not_reach_its_neighbours() -> None:
    clips = [clip.requires_grad_() for clip in draw_clips([17, 9, 22])]
    log_probs(STUDENTS[4, True], clips)[1][:, 3].sum().backward()
    assert clips[1].grad is not None
    assert clips[1].grad.abs().sum() > 0
    for neighbour in (clips[0], clips[2]):
        assert neighbour.grad is None or not neighbour.grad.any()


def test_the_full_size_student_scores_a_clip_the_same_alone_and_in_a_batch() -> None:
    torch.manual_seed(0)
    model = build_model(ModelRecipe(model="student"), feature_dim=177, num_classes=1296).eval()
    generator = torch.Generator().manual_seed(1)
    clips = [torch.randn(length, 177, generator=generator) for length in (61, 1, 30, 97)]
    with torch.no_grad():
        together = log_probs(model, clips)
        for clip, other in zip(clips, together, strict=True):
            assert (log_probs(model, [clip])[0] - other).abs().max() <= 1e-5


def test_a_clip_is_dropped_out_alike_in_any_batch_and_otherwise_in_another_epoch() -> None:
    model = make_student(dropout=0.5)
    clips, keys = draw_clips([21, 8, 30]), clip_keys(["a", "b", "c"])
    with torch.no_grad():
        together = log_probs(model, clips, keys)
        alone = [log_probs(model, [clip], keys[i : i + 1])[0] for i, clip in enumerate(clips)]
        later = log_probs(model, clips, mix(keys, 1))
    for one, other, another in zip(alone, together, later, strict=True):
        assert (one - other).abs().max() <= 1e-5
        assert (one - another).abs().max() > 1e-2


# Parts.


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("streams", [None, STREAMS])
def test_no_parameter_is_without_a_gradient(stride: int, streams: dict[str, list[int]] | None) -> None:
    model = make_student(total_stride=stride, streams=streams, dropout=0.3)
    clips = draw_clips([40, 25, 33])
    loss = sum(part[:, 1:4].sum() for part in log_probs(model, clips, clip_keys(["a", "b", "c"])))
    assert isinstance(loss, Tensor)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_every_input_frame_matters(stride: int) -> None:
    clip = draw_clips([19])[0].requires_grad_()
    log_probs(STUDENTS[stride, False], [clip])[0][:, 2].sum().backward()
    assert clip.grad is not None
    assert clip.grad.abs().sum(dim=1).gt(0).all()


def test_no_kernel_reaches_over_a_guard() -> None:
    for stride in (1, 2, 4):
        model = STUDENTS[stride, False]
        guard, at = -(-3 // stride) * stride, 1
        for block in model.time:
            assert isinstance(block, InvertedResidual)
            assert block.depthwise.kernel_size[0] // 2 <= guard // at
            at *= block.stride
        assert at == stride


def test_a_strided_shortcut_is_the_mean_of_the_frames_that_are_there() -> None:
    x = torch.tensor([[1.0], [3.0], [5.0], [0.0], [0.0], [0.0]])
    mask = torch.tensor([[1.0], [1.0], [1.0], [0.0], [0.0], [0.0]])
    assert average(x, mask, 2).flatten().tolist() == [2.0, 5.0, 0.0]


def test_the_blocks_hold_all_weights_but_the_last_norm_and_none_lies_in_another() -> None:
    model = make_student()
    inside = [id(parameter) for block in model.blocks() for parameter in block.parameters()]
    assert len(inside) == len(set(inside))
    left = [name for name, parameter in model.named_parameters() if id(parameter) not in set(inside)]
    assert left == ["norm.weight", "norm.bias"]


# Sizes.


@pytest.mark.parametrize("streams", [None, {"pose": [0, 99], "hands": [99, 225], "face": [225, 6516]}])
def test_the_student_named_alone_is_a_seventh_of_the_teacher(streams: dict[str, list[int]] | None) -> None:
    sizes = {}
    for name in ("teacher", "student"):
        with torch.device("meta"):
            model = build_model(ModelRecipe(model=name, streams=streams), feature_dim=6516, num_classes=1296)
        sizes[name] = sum(parameter.numel() for parameter in model.parameters())
    assert 2e6 < sizes["student"] < 4e6
    assert sizes["student"] < sizes["teacher"] / 6


def test_every_architecture_has_a_head_of_its_own_and_a_name_in_the_recipe() -> None:
    assert set(ARCHITECTURES) == set(ARCHITECTURE_HEADS)
    for name, head in ARCHITECTURE_HEADS.items():
        recipe = parse_recipe(["--model", name, "--data_dir", "x"]).model
        assert (recipe.rnn_size, recipe.rnn_layers) == head


def test_a_size_that_is_given_stands_and_the_stored_recipe_names_the_others() -> None:
    recipe = parse_recipe(["--model", "student", "--rnn_size", "40", "--data_dir", "x"])
    assert (recipe.flat()["rnn_size"], recipe.flat()["rnn_layers"]) == (40, ARCHITECTURE_HEADS["student"][1])


def test_weights_of_a_teacher_are_refused() -> None:
    with torch.device("meta"):
        teacher = build_model(ModelRecipe(), feature_dim=DIM, num_classes=CLASSES).state_dict()
    with pytest.raises(InputError, match="lacks time"):
        load_weights(make_student(), teacher, where="runs/teacher")
