"""Frames reach the model as uint8, cut and coloured alike for all frames of a clip, whoever reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.videos import CROP, SIZE, annotate, make_frames, open_split, write_frames
from trainer.data.augment import NO_AUGMENTATION, Augmentation
from trainer.data.batch import MicroBatch
from trainer.data.loader import EvaluationLoader, TrainingLoader, make_plan
from trainer.data.normalization import of_frames
from trainer.data.table import Split
from trainer.data.video.cells import VideoCellLoader
from trainer.data.video.color import apply_color
from trainer.data.video.view import Color, central_view, draw_view
from trainer.data.vocabulary import Vocabulary
from trainer.errors import InputError
from trainer.recipe import ObjectiveRecipe

CPU = torch.device("cpu")
STRIDE, NUM_CLIPS = 4, 7
STRONG = Augmentation(rescale=0.2, frame_drop=0.1, flip=True, color=0.3)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    folder = tmp_path_factory.mktemp("video")
    annotate(folder, [f"clip{index}|clip{index}|Signer01|X Y" for index in range(NUM_CLIPS)])
    for index in range(NUM_CLIPS):
        write_frames(folder / "train" / f"clip{index}", make_frames(16 + 2 * index, seed=index))
    return open_split(folder)


def make_loader(split: Split, augmentation: Augmentation, *, num_workers: int = 0) -> TrainingLoader:
    return TrainingLoader(
        split=split,
        normalization=of_frames(),
        plan=make_plan(split, total_stride=STRIDE, seed=1, augmentation=augmentation, mixup_alpha=0.0),
        vocabulary=Vocabulary(["X", "Y"]),
        objective=ObjectiveRecipe(),
        num_workers=num_workers,
        device=CPU,
    )


def clips_of(cells: list[MicroBatch]) -> dict[int, np.ndarray]:
    """Take cells apart: each clip's frames."""
    found = {}
    for cell in cells:
        ends = np.cumsum(cell.layout.input_lengths)
        for clip, end, frames in zip(cell.clips, ends, cell.layout.input_lengths, strict=False):
            found[clip] = cell.features[end - frames : end].numpy().copy()
    return found


def epoch(loader: TrainingLoader, *, world_size: int = 1, budget: int = 100, number: int = 0) -> dict[int, np.ndarray]:
    """All clips of an epoch, as the ranks read them."""
    found: dict[int, np.ndarray] = {}
    for rank in range(world_size):
        for _, cells in loader.steps(number, 0, size=3, rank=rank, world_size=world_size, budget=budget):
            for cell in cells:
                assert cell.features.dtype == torch.uint8
                assert cell.features.shape == (sum(cell.layout.input_lengths), CROP, CROP, 3)
                assert cell.features.is_contiguous()
                found |= clips_of([cell])
    return found


def test_without_augmentation_a_clip_is_its_middle(split: Split) -> None:
    found = epoch(make_loader(split, NO_AUGMENTATION))
    assert sorted(found) == list(range(NUM_CLIPS))
    for clip, frames in found.items():
        assert np.array_equal(frames, make_frames(16 + 2 * clip, seed=clip)[:, 4:28, 4:28])


def test_evaluation_sees_the_middle_too(split: Split) -> None:
    loader = EvaluationLoader(
        split=split,
        normalization=of_frames(),
        vocabulary=Vocabulary(["X", "Y"]),
        total_stride=STRIDE,
        num_workers=2,
        device=CPU,
    )
    found: dict[int, np.ndarray] = {}
    for rank in range(2):
        for cell in loader.cells(rank=rank, world_size=2, budget=60):
            found |= clips_of([cell])
    assert sorted(found) == list(range(NUM_CLIPS))
    assert all(
        np.array_equal(frames, make_frames(len(frames), seed=clip)[:, 4:28, 4:28]) for clip, frames in found.items()
    )


def test_a_rank_without_clips_sees_darkness_of_the_same_shape(split: Split) -> None:
    loader = make_loader(split, NO_AUGMENTATION)
    cells = [
        cell
        for rank in range(4)
        for _, mine in loader.steps(0, 0, size=3, rank=rank, world_size=4, budget=100)
        for cell in mine
        if not cell.clips
    ]
    assert cells
    assert all(cell.features.shape == (STRIDE, CROP, CROP, 3) and not cell.features.any() for cell in cells)


def test_augmentation_is_the_same_on_any_number_of_ranks_and_anew_in_each_epoch(split: Split) -> None:
    one = epoch(make_loader(split, STRONG))
    for world_size, budget, workers in ((2, 40, 2), (3, 1, 1)):
        other = epoch(make_loader(split, STRONG, num_workers=workers), world_size=world_size, budget=budget)
        assert sorted(other) == sorted(one)
        assert all(np.array_equal(one[clip], other[clip]) for clip in one)
    later = epoch(make_loader(split, STRONG), number=1)
    assert all(one[clip].shape != later[clip].shape or (one[clip] != later[clip]).any() for clip in one)


def test_all_frames_of_a_clip_are_cut_and_mirrored_alike(split: Split) -> None:
    mirrored, corners = set(), set()
    for number in range(6):
        for clip, frames in epoch(make_loader(split, Augmentation(flip=True, color=0.0)), number=number).items():
            # Green tells the column and blue the row; neither depends on the frame.
            assert (frames[..., 1:] == frames[:1, ..., 1:]).all()
            original = make_frames(1, seed=clip)[0]
            row = frames[0, 0, :, 1].astype(int)
            mirrored.add(bool(row[0] > row[-1]))
            left = int(np.flatnonzero(original[0, :, 1] == row.min())[0])
            corners.add(left)
            # Red tells the frame: each is one of the clip's own, in order.
            numbers = frames[:, 0, 0, 0].astype(int) // 8
            assert (np.diff(numbers) >= 0).all()
    assert mirrored == {False, True}
    assert min(corners) == 0
    assert max(corners) == SIZE - CROP


def test_by_default_nothing_is_mirrored(split: Split) -> None:
    for number in range(4):
        for frames in epoch(make_loader(split, Augmentation(color=0.0)), number=number).values():
            assert frames[0, 0, 0, 1] < frames[0, 0, -1, 1]


def test_a_rescaled_clip_shows_first_and_last_frame() -> None:
    view = draw_view(5, num_frames=10, rescaled=12, kept=12, frame_size=SIZE, crop_size=CROP, strengths=Augmentation())
    assert len(view.frames) == 12
    assert (view.frames[0], view.frames[-1]) == (0, 9)
    assert set(view.frames.tolist()) == set(range(10))


def test_colors_of_one_leave_a_clip_as_it_is() -> None:
    frames = torch.from_numpy(make_frames(3))
    same = frames.clone()
    apply_color(same, Color(brightness=1.0, contrast=1.0, saturation=1.0))
    assert torch.equal(same, frames)


def test_colors_change_as_their_names_say() -> None:
    frames = torch.from_numpy(np.random.default_rng(0).integers(90, 150, (20, 9, 7, 3), dtype=np.uint8))

    def change(**factors: float) -> torch.Tensor:
        changed = frames.clone()
        apply_color(changed, Color(**{"brightness": 1.0, "contrast": 1.0, "saturation": 1.0} | factors))
        return changed.float()

    before = frames.float()
    luma = torch.tensor([0.299, 0.587, 0.114])
    assert (change(brightness=1.2) - before * 1.2).abs().max() <= 0.51
    mean = (before @ luma).mean()
    assert (change(contrast=0.5) - (0.5 * before + 0.5 * mean)).abs().max() <= 0.51
    grey = change(saturation=0.0)
    assert (grey - (before @ luma)[..., None]).abs().max() <= 0.51
    # Brighter than white is white.
    assert change(brightness=4.0).max() == 255


def test_colors_differ_between_clips_and_not_between_frames(split: Split) -> None:
    loader = make_loader(split, Augmentation(rescale=0.0, frame_drop=0.0, random_crop=False, color=0.3))
    for clip, frames in epoch(loader).items():
        original = make_frames(len(frames), seed=clip)[:, 4:28, 4:28].astype(float)
        # One mixture of colours explains every frame of the clip, up to rounding, where nothing was clipped.
        ours = frames.reshape(-1, 3).astype(float)
        inside = ((ours > 0) & (ours < 255)).all(axis=1)
        known = np.column_stack([original.reshape(-1, 3), np.ones(len(ours))])[inside]
        mixture, *_ = np.linalg.lstsq(known, ours[inside], rcond=None)
        assert np.abs(known @ mixture - ours[inside]).max() < 0.75
        assert np.abs(mixture[:3] - np.eye(3)).max() > 0.01


def test_the_path_of_a_device_gives_the_same_frames(split: Split) -> None:
    host, device = make_loader(split, STRONG), make_loader(split, STRONG, num_workers=2)
    device.cell_loader = VideoCellLoader(split, device=CPU, num_workers=2, on_host=False)
    one, other = epoch(host), epoch(device)
    assert all(np.array_equal(one[clip], other[clip]) for clip in one)


def test_buffers_are_bounded_and_used_again(split: Split) -> None:
    loader = make_loader(split, NO_AUGMENTATION, num_workers=1)
    for number in range(3):
        epoch(loader, number=number, budget=1)
    pool = loader.cell_loader.pool
    assert 0 < pool.bytes_held <= pool.limit * 2 * 28 * CROP * CROP * 3


def test_a_clip_spoilt_during_training_ends_it_by_name(tmp_path: Path) -> None:
    annotate(tmp_path, [f"clip{index}|clip{index}|Signer01|X" for index in range(3)])
    for index in range(3):
        write_frames(tmp_path / "train" / f"clip{index}", make_frames(12))
    loader = make_loader(open_split(tmp_path), NO_AUGMENTATION, num_workers=2)
    (tmp_path / "train" / "clip1" / "frame5.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(InputError, match=r"clip clip1: .*frame5.png: not a whole PNG or JPEG frame") as caught:
        epoch(loader)
    assert caught.value.local


def test_the_middle_of_an_odd_margin() -> None:
    view = central_view(3, frame_size=33, crop_size=24)
    assert (view.top, view.left, view.frames.tolist()) == (4, 4, [0, 1, 2])
