"""The teacher: a clip's output is its own, every parameter learns, and the blocks are the published ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trainer.errors import InputError
from trainer.layout import lay_out
from trainer.models.build import build_model, load_weights
from trainer.models.dropout import ClipDropout
from trainer.models.features import check_streams, mean_frames
from trainer.models.inception import Mixed
from trainer.models.teacher import FeatureTeacher
from trainer.randomness import clip_keys, mix
from trainer.recipe import ModelRecipe

DIM, CLASSES = 11, 9
STREAMS = {"pose": [0, 3], "hands": [3, 5, 8, 11], "face": [5, 8]}

# From Carreira & Zisserman 2017 after Szegedy et al. 2015, table 1: 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool.
PUBLISHED = {
    "Mixed_3b": ((64, 96, 128, 16, 32, 32), 256),
    "Mixed_3c": ((128, 128, 192, 32, 96, 64), 480),
    "Mixed_4b": ((192, 96, 208, 16, 48, 64), 512),
    "Mixed_4c": ((160, 112, 224, 24, 64, 64), 512),
    "Mixed_4d": ((128, 128, 256, 24, 64, 64), 512),
    "Mixed_4e": ((112, 144, 288, 32, 64, 64), 528),
    "Mixed_4f": ((256, 160, 320, 32, 128, 128), 832),
    "Mixed_5b": ((256, 160, 320, 32, 128, 128), 832),
    "Mixed_5c": ((384, 192, 384, 48, 128, 128), 1024),
}


def make_teacher(**options: Any) -> FeatureTeacher:
    """Build a small teacher with the biases of a trained one, since fresh ones are zero and would hide a leak."""
    torch.manual_seed(0)
    values: dict[str, Any] = {"width": 0.05, "rnn_size": 12, "dropout": 0.0, **options}
    model = FeatureTeacher(feature_dim=DIM, num_classes=CLASSES, **values)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.5 * torch.randn_like(parameter)
    return model


def draw_clips(lengths: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(length, DIM, generator=generator) for length in lengths]


def log_probs(model: FeatureTeacher, clips: list[Tensor], keys: np.ndarray | None = None) -> list[Tensor]:
    """Return the log-probabilities of each clip, all of them in one micro-batch."""
    layout = lay_out(np.array([len(clip) for clip in clips]), model.total_stride, keys)
    return list(model(torch.cat(clips), layout).log_softmax(dim=-1).split(list(layout.output_lengths)))


_models: dict[tuple[int, bool], FeatureTeacher] = {}


def shared_teacher(stride: int, streams: bool) -> FeatureTeacher:
    """Return one teacher per kind; building them anew would take most of the time."""
    if (stride, streams) not in _models:
        _models[stride, streams] = make_teacher(total_stride=stride, streams=STREAMS if streams else None)
    return _models[stride, streams]


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
    model = shared_teacher(stride, streams)
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
    model = shared_teacher(stride, False)
    [clip] = draw_clips([length])
    loud = [100 * part for part in draw_clips([13, 6], seed=1)]
    with torch.no_grad():
        [alone] = log_probs(model, [clip])
        between = log_probs(model, [loud[0], clip, loud[1]])[1]
    assert (alone - between).abs().max() <= 1e-5


def test_the_gradient_of_a_clip_does_not_reach_its_neighbours() -> None:
    model = shared_teacher(4, True)
    clips = [clip.requires_grad_() for clip in draw_clips([17, 9, 22])]
    log_probs(model, clips)[1][:, 3].sum().backward()
    assert clips[1].grad is not None
    assert clips[1].grad.abs().sum() > 0
    for neighbour in (clips[0], clips[2]):
        assert neighbour.grad is None or not neighbour.grad.any()


def test_the_full_size_teacher_scores_a_clip_the_same_alone_and_in_a_batch() -> None:
    torch.manual_seed(0)
    model = build_model(ModelRecipe(), feature_dim=177, num_classes=1296).eval()
    generator = torch.Generator().manual_seed(1)
    clips = [torch.randn(length, 177, generator=generator) for length in (61, 1, 30, 97)]
    with torch.no_grad():
        together = log_probs(model, clips)
        for clip, other in zip(clips, together, strict=True):
            assert (log_probs(model, [clip])[0] - other).abs().max() <= 1e-5


# Parameters.


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("streams", [None, STREAMS])
def test_no_parameter_is_without_a_gradient(stride: int, streams: dict[str, list[int]] | None) -> None:
    model = make_teacher(total_stride=stride, streams=streams, dropout=0.3)
    clips = draw_clips([40, 25, 33])
    loss = sum(part[:, 1:4].sum() for part in log_probs(model, clips, clip_keys(["a", "b", "c"])))
    assert isinstance(loss, Tensor)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("streams", [None, {"pose": [0, 99], "hands": [99, 225], "face": [225, 6516]}])
def test_the_teacher_of_the_recipes_has_twenty_to_thirty_million_parameters(
    streams: dict[str, list[int]] | None,
) -> None:
    with torch.device("meta"):
        model = build_model(ModelRecipe(streams=streams), feature_dim=6516, num_classes=1296)
    assert 20e6 < sum(parameter.numel() for parameter in model.parameters()) < 30e6


def test_the_blocks_have_the_published_branch_widths() -> None:
    with torch.device("meta"):
        model = build_model(ModelRecipe(), feature_dim=10, num_classes=3)
    blocks = dict(model.inception.mixed.items())
    assert list(blocks) == list(PUBLISHED)
    inputs = 192
    for name, (widths, outputs) in PUBLISHED.items():
        block = blocks[name]
        assert isinstance(block, Mixed)
        convolutions = (block.b0, block.b1a, block.b1b, block.b2a, block.b2b, block.b3b)
        assert tuple(conv.out_channels for conv in convolutions) == widths
        assert tuple(conv.kernel_size for conv in convolutions) == ((1,), (1,), (3,), (1,), (3,), (1,))
        assert {conv.in_channels for conv in (block.b0, block.b1a, block.b2a, block.b3b)} == {inputs}
        assert block.channels == outputs
        inputs = outputs


@pytest.mark.parametrize(("stride", "frames", "outputs"), [(1, 9, 9), (2, 9, 5), (4, 9, 3), (4, 8, 2), (4, 1, 1)])
def test_the_stride_divides_the_frames_and_rounds_up(stride: int, frames: int, outputs: int) -> None:
    with torch.no_grad():
        [scores] = log_probs(shared_teacher(stride, False), draw_clips([frames]))
    assert scores.shape == (outputs, CLASSES)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_every_input_frame_matters(stride: int) -> None:
    model = shared_teacher(stride, False)
    clip = draw_clips([19])[0].requires_grad_()
    log_probs(model, [clip])[0][:, 2].sum().backward()
    assert clip.grad is not None
    assert clip.grad.abs().sum(dim=1).gt(0).all()


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_the_postures_of_an_output_frame_are_the_mean_of_its_own_frames(stride: int) -> None:
    lengths = [5, 1, 8]
    layout = lay_out(np.array(lengths), stride)
    clips = draw_clips(lengths)
    laid_out = torch.zeros(layout.length, DIM).index_copy(0, layout.frame_positions, torch.cat(clips))
    means = mean_frames(laid_out, layout, stride)
    starts = [int(part[0]) // stride for part in layout.frame_positions.split(lengths)]
    for clip, start in zip(clips, starts, strict=True):
        # The last group may be smaller: silence is no posture.
        expected = torch.stack([group.mean(dim=0) for group in clip.split(stride)])
        torch.testing.assert_close(means[start : start + len(expected)], expected)


# Streams.


def test_gates_sum_to_one_and_depend_on_the_frame() -> None:
    fusion = make_teacher(streams=STREAMS).embed
    frames = draw_clips([200])[0]
    with torch.no_grad():
        for norm in fusion.norm.values():
            # Every stream says the constant one: a convex combination says the same.
            norm.weight.zero_()
            norm.bias.fill_(1.0)
        torch.testing.assert_close(fusion(frames), torch.ones(200, fusion.project["pose"].out_features))


def test_gates_weigh_streams_by_what_the_frame_shows() -> None:
    fusion = make_teacher(streams=STREAMS).embed
    frames = draw_clips([200])[0]
    fused = fusion(frames)
    embedded = [
        torch.relu(fusion.norm[name](fusion.project[name](torch.cat([frames[:, a:b] for a, b in spans], dim=1))))
        for name, spans in (("pose", [(0, 3)]), ("hands", [(3, 5), (8, 11)]), ("face", [(5, 8)]))
    ]
    stacked = torch.stack(embedded)
    assert (fused <= stacked.amax(dim=0) + 1e-5).all()
    assert (fused >= stacked.amin(dim=0) - 1e-5).all()
    # Solve for the gates of each frame: they are what the fused output says, and differ between frames.
    gates = torch.stack(
        [torch.linalg.lstsq(stacked[:, i].t(), fused[i, :, None]).solution[:, 0] for i in range(len(frames))]
    )
    usable = torch.tensor([torch.linalg.matrix_rank(stacked[:, i]) == 3 for i in range(len(frames))])
    assert usable.sum() > 100
    torch.testing.assert_close(gates[usable].sum(dim=1), torch.ones(int(usable.sum())), atol=1e-3, rtol=0)
    assert gates[usable].std(dim=0).min() > 0.01


def test_a_stream_reads_its_own_dimensions_alone() -> None:
    fusion = make_teacher(streams=STREAMS).embed
    frames = draw_clips([6])[0].requires_grad_()
    fusion.project["hands"](torch.cat([frames[:, 3:5], frames[:, 8:11]], dim=1)).sum().backward()
    assert frames.grad is not None
    assert frames.grad.any(dim=0).tolist() == [3 <= i < 5 or i >= 8 for i in range(DIM)]


@pytest.mark.parametrize(
    ("streams", "said"),
    [
        ({"pose": [0, 3], "hands": [3, 12]}, r"hands takes \[3, 12\) but the corpus has D = 11"),
        ({"pose": [0, 3], "hands": [2, 11]}, r"hands \[2, 11\) overlaps pose, which reaches 3"),
        ({"pose": [0, 3], "hands": [4, 11]}, r"no stream takes dimensions \[3, 4\)"),
        ({"pose": [1, 11]}, r"no stream takes dimensions \[0, 1\)"),
        ({"pose": [0, 10]}, r"no stream takes dimensions \[10, 11\)"),
        ({"left hand": [0, 11]}, "'left hand' is no plain name"),
        ({"a.b": [0, 11]}, "'a.b' is no plain name"),
        # Torch's own names cannot be given to a part of a model.
        ({"half": [0, 11]}, "'half'"),
        ({"values": [0, 5], "type": [5, 11]}, "'values'"),
    ],
)
def test_streams_that_do_not_fit_the_corpus_are_refused(streams: dict[str, list[int]], said: str) -> None:
    with pytest.raises(InputError, match=said):
        FeatureTeacher(feature_dim=DIM, num_classes=3, width=0.02, rnn_size=4, streams=streams)


def test_every_problem_of_the_streams_is_reported_at_once() -> None:
    with pytest.raises(InputError) as caught:
        check_streams({"a b": [0, 3], "c": [2, 5], "d": [7, 20]}, DIM)
    assert len(caught.value.problems) == 4


def test_without_streams_all_dimensions_are_one() -> None:
    assert check_streams(None, DIM) == {"all": [(0, DIM)]}


# Dropout.


def row_seeds(name: str, frames: int, *, epoch: int = 0) -> Tensor:
    layout = lay_out(np.array([frames]), 1, mix(clip_keys([name]), epoch))
    assert layout.row_seeds is not None
    return layout.row_seeds


def mask(seeds: Tensor, *, p: float = 0.4, salt: int = 0, channels: int = 256) -> Tensor:
    return ClipDropout(p, salt)(torch.ones(len(seeds), channels), seeds) > 0


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.9])
def test_dropout_zeroes_the_named_share_and_keeps_the_mean(p: float) -> None:
    seeds = row_seeds("clip", 1000)
    dropped = ClipDropout(p, salt=1)(torch.ones(1000, 200), seeds)
    sigma = (p * (1 - p) / dropped.numel()) ** 0.5
    assert abs((dropped == 0).double().mean() - p) < 5 * sigma
    kept = dropped[dropped > 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - p)))
    # No frame and no channel is favoured.
    for axis, count in ((0, 1000), (1, 200)):
        shares = (dropped == 0).double().mean(dim=axis)
        assert (shares - p).abs().max() < 6 * (p * (1 - p) / count) ** 0.5


def test_masks_of_other_layers_epochs_clips_frames_and_channels_are_independent() -> None:
    seeds = row_seeds("clip", 400)
    base = mask(seeds)
    others = {
        "layer": mask(seeds, salt=1),
        "next layer": mask(seeds, salt=2),
        "epoch": mask(row_seeds("clip", 400, epoch=1)),
        "clip": mask(row_seeds("another", 400)),
        "frame": mask(seeds.roll(1)),
        "channel": base.roll(1, dims=1),
    }
    for name, other in others.items():
        agreement = (base == other).double().mean()
        expected = 0.4**2 + 0.6**2
        assert abs(agreement - expected) < 5 * (expected * (1 - expected) / base.numel()) ** 0.5, name


def test_a_channels_mask_does_not_depend_on_how_many_channels_there_are() -> None:
    seeds = row_seeds("clip", 50)
    assert torch.equal(mask(seeds, channels=300)[:, :100], mask(seeds, channels=100))


def test_without_seeds_or_with_probability_zero_nothing_is_dropped() -> None:
    x = torch.randn(5, 7)
    assert torch.equal(ClipDropout(0.5, 0)(x, None), x)
    assert torch.equal(ClipDropout(0.0, 0)(x, row_seeds("clip", 5)), x)


@pytest.mark.parametrize("stride", [1, 4])
def test_a_clip_is_dropped_out_alike_in_any_batch_and_otherwise_in_another_epoch(stride: int) -> None:
    model = make_teacher(total_stride=stride, dropout=0.5)
    clips, keys = draw_clips([21, 8, 30, 13]), clip_keys(["a", "b", "c", "d"])
    with torch.no_grad():
        together = log_probs(model, clips, keys)
        order = [2, 0, 3, 1]
        shuffled = log_probs(model, [clips[i] for i in order], keys[order])
        alone = [log_probs(model, [clip], keys[i : i + 1])[0] for i, clip in enumerate(clips)]
        later = log_probs(model, clips, mix(keys, 1))
        without = log_probs(model, clips)
    for place, index in enumerate(order):
        assert (shuffled[place] - together[index]).abs().max() <= 1e-5
        assert (alone[index] - together[index]).abs().max() <= 1e-5
        assert (later[index] - together[index]).abs().max() > 1e-2
        assert (without[index] - together[index]).abs().max() > 1e-2


# Weights of another run.


def test_weights_go_in_as_they_came_out() -> None:
    source, target = make_teacher(), FeatureTeacher(feature_dim=DIM, num_classes=CLASSES, width=0.05, rnn_size=12)
    load_weights(target, source.state_dict(), where="run")
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name


def test_classes_are_matched_and_new_ones_keep_their_fresh_weights() -> None:
    source = make_teacher()
    target = FeatureTeacher(feature_dim=DIM, num_classes=4, width=0.05, rnn_size=12)
    fresh = target.head.classifier.weight[2].clone()
    load_weights(target, source.state_dict(), classes=[0, 7, None, 3], where="run")
    for part in ("weight", "bias"):
        rows, known = getattr(target.head.classifier, part), getattr(source.head.classifier, part)
        for row, origin in ((0, 0), (1, 7), (3, 3)):
            assert torch.equal(rows[row], known[origin])
    assert torch.equal(target.head.classifier.weight[2], fresh)


@pytest.mark.parametrize("options", [{"rnn_size": 8}, {"rnn_layers": 1}, {"rnn_layers": 3}, {"streams": STREAMS}])
def test_weights_of_another_architecture_are_refused_and_change_nothing(options: dict[str, Any]) -> None:
    target = make_teacher()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(InputError, match=r"runs/other: .*use the model options it was trained with"):
        load_weights(target, make_teacher(**options).state_dict(), where="runs/other")
    # Of another vocabulary too, whose glosses are matched first.
    classes: list[int | None] = [0, None, *range(2, CLASSES)]
    with pytest.raises(InputError, match=r"runs/other: .*use the model options it was trained with"):
        load_weights(target, make_teacher(**options).state_dict(), classes=classes, where="runs/other")
    assert all(torch.equal(target.state_dict()[name], value) for name, value in before.items())


def test_the_weights_come_from_the_seed_alone() -> None:
    def build() -> nn.Module:
        torch.manual_seed(3)
        return build_model(ModelRecipe(width=0.05, rnn_size=8), feature_dim=DIM, num_classes=CLASSES)

    one, other = build().state_dict(), build().state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
