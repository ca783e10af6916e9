"""What a model costs: parameters, operations and time per second of video, measured on the model itself."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from trainer.layout import TimeLayout, lay_out
from trainer.models.recognizer import Recognizer

MIN_PASSES, MAX_PASSES = 3, 25
_ENOUGH_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a model costs on clips of one length."""

    parameters: int
    """Weights and biases, all of them."""
    flops_per_second: float
    """Floating-point operations of matrix products and convolutions per second of video; a multiply-add is two."""
    passes: tuple[float, ...]
    """Seconds of computing per second of video of each timed pass, on one thread of this CPU; empty if untimed."""

    @property
    def real_time_factor(self) -> float | None:
        """Return the median of the passes: below 1 the model keeps up with its video. None if untimed."""
        return statistics.median(self.passes) if self.passes else None


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to measure."""

    model: Recognizer
    """The model; it is left in evaluation mode."""
    frame_size: int
    """Pixels a side of the frames, for a model that takes any."""

    @property
    def frame_shape(self) -> tuple[int, ...]:
        """Return the shape of one input frame."""
        return tuple(self.frame_size if size < 0 else size for size in self.model.frame_shape)


def measure(subjects: Sequence[Subject], *, seconds: float, fps: float, timed: bool = True) -> list[Figures]:
    """Count and time models on one clip of `seconds` at `fps`, logits included, decoding not.

    Models that are compared are timed in turns, so that what else the machine does meets all of them alike.
    """
    num_frames = max(1, round(seconds * fps))
    # What was really passed, where `seconds` is no whole number of frames.
    seconds = num_frames / fps
    works = [_work(subject, num_frames) for subject in subjects]
    with _one_thread(), torch.no_grad():
        flops = [_count(work) for work in works]
        passes = [_scale(times, seconds) for times in _time(works)] if timed else [()] * len(works)
    return [
        Figures(
            parameters=sum(parameter.numel() for parameter in subject.model.parameters()),
            flops_per_second=count / seconds,
            passes=times,
        )
        for subject, count, times in zip(subjects, flops, passes, strict=True)
    ]


def _work(subject: Subject, num_frames: int) -> Callable[[], Tensor]:
    model = subject.model.eval()
    layout: TimeLayout = lay_out(np.array([num_frames]), model.total_stride)
    generator = torch.Generator().manual_seed(0)
    shape = (num_frames, *subject.frame_shape)
    if model.frame_dtype == torch.uint8:
        frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    else:
        frames = torch.randn(shape, dtype=model.frame_dtype, generator=generator)
    return lambda: model(frames, layout)


def _count(work: Callable[[], Tensor]) -> int:
    # On real tensors: not every operation of every model has a shape function. It warms the caches up as well.
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def _time(works: Sequence[Callable[[], Tensor]]) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in works]
    began = time.perf_counter()
    while len(times[0]) < MIN_PASSES or (
        len(times[0]) < MAX_PASSES and time.perf_counter() - began < _ENOUGH_SECONDS * len(works)
    ):
        for work, found in zip(works, times, strict=True):
            start = time.perf_counter()
            work()
            found.append(time.perf_counter() - start)
    return times


def _scale(times: Sequence[float], seconds: float) -> tuple[float, ...]:
    return tuple(took / seconds for took in times)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
