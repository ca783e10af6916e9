"""Clips laid end to end: nobody's frames overlap, silence parts them, and every order can be undone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from trainer.layout import TimeLayout, lay_out, slot_frames
from trainer.randomness import clip_keys

strides = st.sampled_from([1, 2, 4])
compositions = st.lists(st.integers(min_value=1, max_value=40), min_size=1, max_size=12)
fast = settings(max_examples=80, deadline=None)


def make(lengths: list[int], stride: int, keys: list[int] | None = None) -> TimeLayout:
    return lay_out(np.array(lengths), stride, None if keys is None else np.array(keys, dtype=np.uint64))


def positions(layout: TimeLayout, lengths: list[int]) -> list[torch.Tensor]:
    """Return the time positions of each clip's frames."""
    return list(layout.frame_positions.split(lengths))


@fast
@given(lengths=compositions, stride=strides)
def test_every_frame_has_its_own_place_and_clips_keep_their_order(lengths: list[int], stride: int) -> None:
    layout = make(lengths, stride)
    placed = layout.frame_positions
    assert len(placed) == sum(lengths)
    assert len(set(placed.tolist())) == len(placed)
    for clip in positions(layout, lengths):
        assert (clip.diff() == 1).all()
        assert clip[0] % stride == 0
    assert layout.length % stride == 0
    assert layout.length == slot_frames(np.array(lengths), stride).sum()


@fast
@given(lengths=compositions, stride=strides)
def test_at_least_three_silent_frames_follow_every_clip(lengths: list[int], stride: int) -> None:
    clips = positions(make(lengths, stride), lengths)
    starts = [int(clip[0]) for clip in clips[1:]] + [make(lengths, stride).length]
    for clip, following in zip(clips, starts, strict=True):
        assert following - int(clip[-1]) - 1 >= 3


@fast
@given(lengths=compositions, stride=strides)
def test_masks_are_one_on_clips_and_zero_in_guards_at_every_stride(lengths: list[int], stride: int) -> None:
    layout = make(lengths, stride)
    clips = positions(layout, lengths)
    assert {1, stride} <= set(layout.masks)
    for step, mask in layout.masks.items():
        expected = torch.zeros(layout.length // step, 1)
        for clip in clips:
            expected[clip // step] = 1.0
        assert torch.equal(mask, expected)


@fast
@given(lengths=compositions, stride=strides)
def test_output_frames_are_input_frames_over_the_stride_rounded_up(lengths: list[int], stride: int) -> None:
    assert make(lengths, stride).output_lengths == tuple(-(-length // stride) for length in lengths)


@fast
@given(lengths=compositions, stride=strides)
def test_the_packed_order_is_that_of_a_packed_sequence_and_can_be_undone(lengths: list[int], stride: int) -> None:
    layout = make(lengths, stride)
    outputs = layout.output_lengths
    clips = [clip[0] // stride + torch.arange(n) for clip, n in zip(positions(layout, lengths), outputs, strict=True)]
    longest_first = sorted(range(len(clips)), key=lambda i: -outputs[i])
    unpacked, sizes = pad_packed_sequence(PackedSequence(layout.rnn_positions, layout.rnn_batch_sizes))
    assert sizes.tolist() == [outputs[i] for i in longest_first]
    for column, index in enumerate(longest_first):
        assert torch.equal(unpacked[: outputs[index], column], clips[index])
    assert torch.equal(layout.rnn_positions[layout.dense_order], torch.cat(clips))


@fast
@given(lengths=compositions, stride=strides, data=st.data())
def test_a_clips_seeds_are_its_own_in_any_company(lengths: list[int], stride: int, data: st.DataObject) -> None:
    keys = [1000 + 77 * i for i in range(len(lengths))]
    together = make(lengths, stride, keys)
    assert together.row_seeds is not None
    dense = together.row_seeds[together.dense_order].split(list(together.output_lengths))
    order = data.draw(st.permutations(range(len(lengths))))
    other = make([lengths[i] for i in order], stride, [keys[i] for i in order])
    assert other.row_seeds is not None
    shuffled = other.row_seeds[other.dense_order].split(list(other.output_lengths))
    for place, index in enumerate(order):
        alone = make([lengths[index]], stride, [keys[index]])
        assert alone.row_seeds is not None
        assert torch.equal(dense[index], shuffled[place])
        assert torch.equal(dense[index], alone.row_seeds[alone.dense_order])


def test_seeds_differ_between_frames_and_between_clips() -> None:
    layout = make([400] * 8, 1, clip_keys([f"clip {i}" for i in range(8)]).tolist())
    assert layout.row_seeds is not None
    assert layout.row_seeds.dtype == torch.int32
    # 3,200 draws from 2^32 collide with probability 0.1 %.
    assert len(set(layout.row_seeds.tolist())) == 3200


def test_evaluation_has_no_seeds_and_the_host_keeps_what_torch_wants_there() -> None:
    layout = make([5, 9], 4)
    assert layout.row_seeds is None
    moved = layout.to(torch.device("meta"))
    assert moved.frame_positions.device.type == "meta"
    assert moved.rnn_positions.device.type == "meta"
    assert all(mask.device.type == "meta" for mask in moved.masks.values())
    assert moved.rnn_batch_sizes.device.type == "cpu"
    assert moved.output_lengths == layout.output_lengths


@pytest.mark.parametrize(("stride", "guard"), [(1, 3), (2, 4), (4, 4)])
def test_a_slot_is_whole_output_frames_and_the_smallest_guard_of_three(stride: int, guard: int) -> None:
    frames = np.arange(1, 50)
    slots = slot_frames(frames, stride)
    assert (slots % stride == 0).all()
    assert (slots == -(-frames // stride) * stride + guard).all()
