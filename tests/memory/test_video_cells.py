"""Memory is measured on frames where the model takes frames."""

from __future__ import annotations

import numpy as np
import torch

from trainer.memory.activations import count_activations
from trainer.memory.cells import random_cell
from trainer.parsing import parse_recipe

VIDEO = ["--data_dir", "corpus", "--model", "mobilenet_v3_small", "--width", "0.2", "--rnn_size", "8"]


def test_a_random_cell_of_video_is_what_the_loader_gives() -> None:
    cell = random_cell(
        np.array([8, 12]),
        total_stride=4,
        feature_dim=24 * 24 * 3,
        num_classes=5,
        device=torch.device("cpu"),
        frame_shape=(24, 24, 3),
    )
    assert cell.features.dtype == torch.uint8
    assert cell.features.shape == (20, 24, 24, 3)


def test_larger_frames_take_more_memory() -> None:
    small, large = (
        count_activations(
            parse_recipe([*VIDEO, "--frame_size", size]), feature_dim=3, num_classes=5, checkpointing=False
        ).saved_per_slot
        for size in ("32", "64")
    )
    assert 2 * small < large < 5 * small
