"""Loading: clips per second of processor time, packed corpora against a file per clip.

The corpus is synthetic, with PHOENIX-2014's lengths and 6,516 features a frame, and lies in memory (the page cache).
The usual way: compressed npz through a plain DataLoader, batches padded to the longest clip. Ours: the trainer's own
loader, from the plan to the micro-batch that the model takes, normalised; what it costs to normalise is not taken off.
Other formats, where their packages are installed, get the same features in batches of the same number of clips, neither
padded nor normalised. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

# Run as a file, Python looks beside the file and not where the packages are.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.pack import main as pack
from trainer.data.augment import NO_AUGMENTATION, Augmentation
from trainer.data.loader import TrainingLoader, make_plan
from trainer.data.normalization import from_moments
from trainer.data.opening import OpenCorpus
from trainer.data.synthetic import SyntheticSpec, write_corpus
from trainer.data.vocabulary import Vocabulary
from trainer.layout import slot_frames
from trainer.recipe import CorpusRecipe, ObjectiveRecipe

BARS = {"packed_float16": 25.0, "packed_float32": 15.0}
BASELINE = "npz, compressed"
CLIPS_PER_BATCH = 8
_STRIDE = 4
_BUDGET = CLIPS_PER_BATCH * 304

Epoch = Callable[[int], int]
"""Loads an epoch, given its number, and returns how many clips it met."""


class Speed(NamedTuple):
    """Clips per second of one epoch: of processor time in all threads and processes, and on the clock."""

    cpu: float
    wall: float


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, end with one line of JSON."""
    args = parse_args(argv)
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        corpora = write_corpora(args, folder)
        print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; {args.clips} clips, D = {args.feature_dim}")
        ways = {BASELINE: plain(corpora["npz"]), **ours(corpora, args)}
        ways |= others(corpora["npz"], folder, args)
        figures = report(measure(ways, args.rounds), args)
        figures |= report_ranks(corpora, args)
        figures |= report_cold(corpora, ways)
    print(f"load {os.getloadavg()[0]:.1f}")
    print(json.dumps(figures))
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=600, help="clips of the corpus")
    parser.add_argument("--feature_dim", type=int, default=6516, help="features per frame, D")
    parser.add_argument("--rounds", type=int, default=5, help="epochs of each way that are measured, in turn")
    parser.add_argument("--num_workers", type=int, default=1, help="reading threads of the trainer's loader")
    parser.add_argument("--folder", type=Path, help="where to keep the corpora for the next call (default: nowhere)")
    parser.add_argument("--only_ours", action="store_true", help="leave out the formats of other packages")
    return parser.parse_args(argv)


def write_corpora(args: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """Write the corpus as compressed npz and pack it; what is there from an earlier call stays."""
    corpora = {name: folder / name for name in ("npz", "packed_float16", "packed_float32")}
    if not corpora["npz"].exists():
        raw = folder / "raw"
        spec = SyntheticSpec(clips=args.clips, size="full", feature_dim=args.feature_dim, seed=1)
        write_corpus(spec, raw, log=lambda _: None)
        with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
            list(pool.map(compress, sorted(raw.rglob("*.npz")), chunksize=8))
        raw.rename(corpora["npz"])
    for dtype in ("float16", "float32"):
        if not corpora[f"packed_{dtype}"].exists():
            pack([str(corpora["npz"]), str(corpora[f"packed_{dtype}"]), "--dtype", dtype, "--splits", "train"])
    return corpora


def compress(path: Path) -> None:
    """Save a feature file again as labs have them."""
    with np.load(path) as archive:
        features = archive["features"]
    np.savez_compressed(path, features=features)


# The usual way.


class NpzClips(Dataset[torch.Tensor]):
    """A file per clip."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.rglob("*.npz"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        with np.load(self.paths[index]) as archive:
            return torch.from_numpy(archive["features"])


def pad(clips: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Collate clips as usual: padded to the longest `[B, T, D]`, with their lengths `[B]`."""
    return torch.nn.utils.rnn.pad_sequence(clips, batch_first=True), torch.tensor([len(clip) for clip in clips])


def plain(corpus: Path, num_workers: int = 0) -> Epoch:
    """Load through a plain DataLoader, in this process: workers cost processor time, and save none."""
    loader = DataLoader(
        NpzClips(corpus / "train"), CLIPS_PER_BATCH, shuffle=True, collate_fn=pad, num_workers=num_workers
    )
    return lambda _: sum(len(lengths) for _, lengths in loader)


# Ours.


def make_loader(corpus: Path, num_workers: int, augmentation: Augmentation = NO_AUGMENTATION) -> TrainingLoader:
    """Build the trainer's loader of a corpus, with its normalisation."""
    opened = OpenCorpus(CorpusRecipe(data_dir=str(corpus)), print)
    split = opened.split("train")
    scans = (split.table.scan(split.row(index)) for index in range(len(split)))
    moments = [opened.moments] if opened.moments else [scan.moments for scan in scans if scan.moments]
    return TrainingLoader(
        split=split,
        normalization=from_moments("corpus", moments, split.feature_dim),
        plan=make_plan(split, total_stride=_STRIDE, seed=1, augmentation=augmentation, mixup_alpha=0.0),
        vocabulary=Vocabulary(split.table.all_glosses()),
        objective=ObjectiveRecipe(),
        num_workers=num_workers,
        device=torch.device("cpu"),
    )


def load_epoch(loader: TrainingLoader, epoch: int, rank: int = 0, world_size: int = 1) -> int:
    """Load a rank's cells of an epoch; return the clips met."""
    longest = int(slot_frames(loader.split.num_frames.astype(np.int64), _STRIDE).max())
    size = CLIPS_PER_BATCH * world_size
    clips = 0
    with contextlib.closing(
        loader.steps(
            epoch, 0, size=size, rank=rank, world_size=world_size, budget=max(CLIPS_PER_BATCH * longest, _BUDGET)
        )
    ) as steps:
        for _, cells in steps:
            clips += sum(len(cell.clips) for cell in cells)
    return clips


def ours(corpora: dict[str, Path], args: argparse.Namespace) -> dict[str, Epoch]:
    """Return the trainer's loader on each corpus, and with all augmentation on the smaller one."""

    def way(loader: TrainingLoader) -> Epoch:
        return lambda epoch: load_epoch(loader, epoch)

    ways = {name: way(make_loader(corpora[name], args.num_workers)) for name in BARS}
    ways["packed_float16, augmented"] = way(make_loader(corpora["packed_float16"], args.num_workers, Augmentation()))
    ways["npz, the trainer's loader"] = way(make_loader(corpora["npz"], args.num_workers))
    return ways


# Other packages.


def others(corpus: Path, folder: Path, args: argparse.Namespace) -> dict[str, Epoch]:
    """Return the formats of other packages that are installed; the others are named."""
    makers = {"webdataset": with_webdataset, "datasets": with_datasets, "litdata": with_litdata}
    if args.only_ours:
        return {}
    missing = [name for name in makers if importlib.util.find_spec(name) is None]
    if missing:
        print(f"not installed, left out: {', '.join(missing)} (pip install 'signscale[benchmarks]')")
    clips = NpzClips(corpus / "train")
    ways = {}
    for name, make in makers.items():
        if name in missing:
            continue
        for dtype in ("float16", "float32"):
            place = folder / f"{name}_{dtype}"
            ways[f"{name}, {dtype}"] = make(clips, place, np.dtype(dtype), args.feature_dim)
    return ways


def records(clips: NpzClips, dtype: np.dtype) -> Iterator[np.ndarray]:
    """Read all clips in a storage type."""
    for index in range(len(clips)):
        yield clips[index].numpy().astype(dtype)


def count_batches(batches: Iterator[Any]) -> int:
    """Load all batches and return how many clips they held."""
    return sum(len(batch) for batch in batches)


def as_rows(data: bytes, dtype: np.dtype, dim: int) -> torch.Tensor:
    """View a record's bytes as float32 features `[T, D]`."""
    return torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype.name)).view(-1, dim).float()


def with_webdataset(clips: NpzClips, place: Path, dtype: np.dtype, dim: int) -> Epoch:
    """Write tar shards and read them through WebDataset's pipeline."""
    import webdataset

    if not place.exists():
        place.mkdir()
        with webdataset.ShardWriter(str(place / "%05d.tar"), maxsize=512e6, verbose=0) as writer:
            for index, features in enumerate(records(clips, dtype)):
                writer.write({"__key__": f"{index:06d}", "bin": features.tobytes()})
    shards = sorted(str(path) for path in place.glob("*.tar"))

    def epoch(_: int) -> int:
        stream = webdataset.WebDataset(shards, shardshuffle=len(shards)).shuffle(16)
        stream = stream.map(lambda sample: as_rows(sample["bin"], dtype, dim))
        return count_batches(stream.batched(CLIPS_PER_BATCH, collation_fn=list))

    return epoch


def with_datasets(clips: NpzClips, place: Path, dtype: np.dtype, dim: int) -> Epoch:
    """Write an Arrow table with a binary column and read it in a random order."""
    import datasets

    if not place.exists():
        rows = datasets.Dataset.from_generator(
            lambda: ({"features": features.tobytes()} for features in records(clips, dtype)),
            features=datasets.Features({"features": datasets.Value("large_binary")}),
            cache_dir=str(place.with_name(f"{place.name}_cache")),
        )
        rows.save_to_disk(str(place))
    table = datasets.load_from_disk(str(place))

    def epoch(number: int) -> int:
        order = np.random.default_rng(number).permutation(len(table))
        parts = np.split(order, range(CLIPS_PER_BATCH, len(order), CLIPS_PER_BATCH))
        return count_batches([as_rows(data, dtype, dim) for data in table[part]["features"]] for part in parts)

    return epoch


def with_litdata(clips: NpzClips, place: Path, dtype: np.dtype, dim: int) -> Epoch:
    """Write litdata's chunks and read them through its streaming data set."""
    import litdata
    from litdata.streaming.writer import BinaryWriter

    if not place.exists():
        place.mkdir()
        writer = BinaryWriter(str(place), chunk_bytes="64MB")
        for index, features in enumerate(records(clips, dtype)):
            writer[index] = {"features": features.tobytes()}
        writer.done()
        writer.merge()
    stream = litdata.StreamingDataset(str(place), shuffle=True)

    def epoch(_: int) -> int:
        rows = (as_rows(sample["features"], dtype, dim) for sample in stream)
        return sum(1 for _ in rows)

    return epoch


# Measuring.


def measure(ways: dict[str, Epoch], rounds: int) -> dict[str, list[Speed]]:
    """Load an epoch of each way to warm up, then take turns."""
    speeds: dict[str, list[Speed]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, epoch in ways.items():
            speed = timed(epoch, number)
            if number:
                speeds[name].append(speed)
    return speeds


def timed(epoch: Epoch, number: int) -> Speed:
    """Load one epoch and return its speed."""
    wall, cpu = time.perf_counter(), time.process_time()
    clips = epoch(number)
    return Speed(clips / (time.process_time() - cpu), clips / (time.perf_counter() - wall))


def report(speeds: dict[str, list[Speed]], args: argparse.Namespace) -> dict[str, Any]:
    """Print a row a way, and return the ratios to the usual way, round by round."""
    print(f"{'':28}{'clips per CPU second':>22}{'from':>9}{'to':>9}{'over npz':>10}{'clips/s':>10}   bar")
    figures: dict[str, Any] = {"clips": args.clips, "feature_dim": args.feature_dim, "rounds": args.rounds}
    for name, found in speeds.items():
        cpu = [speed.cpu for speed in found]
        ratio = statistics.median(speed.cpu / usual.cpu for speed, usual in zip(found, speeds[BASELINE], strict=True))
        bar = BARS.get(name)
        verdict = "" if bar is None else f">= {bar:.0f}: {'met' if ratio >= bar else 'MISSED'}"
        wall = statistics.median(speed.wall for speed in found)
        spread = f"{statistics.median(cpu):22.0f}{min(cpu):9.0f}{max(cpu):9.0f}"
        print(f"{name:28}{spread}{ratio:10.1f}{wall:10.0f}   {verdict}")
        key = name.replace(",", "").replace("'", "").replace(" ", "_")
        figures |= {f"{key}_clips_per_cpu_second": round(statistics.median(cpu), 1), f"{key}_ratio": round(ratio, 2)}
    return figures


def rank_epoch(corpus: str, num_workers: int, rank: int, world_size: int) -> tuple[int, float, float]:
    """Load this rank's cells of an epoch; return clips, seconds of processor time and on the clock."""
    torch.set_num_threads(1)
    loader = make_loader(Path(corpus), num_workers)
    load_epoch(loader, 0, rank, world_size)
    wall, cpu = time.perf_counter(), time.process_time()
    clips = load_epoch(loader, 1, rank, world_size)
    return clips, time.process_time() - cpu, time.perf_counter() - wall


def report_ranks(corpora: dict[str, Path], args: argparse.Namespace) -> dict[str, Any]:
    """Load with two ranks at once, each its own cells."""
    figures = {}
    context = multiprocessing.get_context("spawn")
    for name in BARS:
        with context.Pool(2) as pool:
            ranks = pool.starmap(rank_epoch, [(str(corpora[name]), args.num_workers, rank, 2) for rank in range(2)])
        clips = sum(rank[0] for rank in ranks)
        cpu, wall = clips / sum(rank[1] for rank in ranks), clips / max(rank[2] for rank in ranks)
        print(f"{name + ', two ranks':28}{cpu:22.0f}{'':28}{wall:10.0f}")
        figures[f"{name}_two_ranks_clips_per_cpu_second"] = round(cpu, 1)
    return figures


def report_cold(corpora: dict[str, Path], ways: dict[str, Epoch]) -> dict[str, Any]:
    """Load an epoch after the kernel has dropped the corpus from memory."""
    figures = {}
    for name, corpus in ((BASELINE, corpora["npz"]), *((name, corpora[name]) for name in BARS)):
        drop_from_memory(corpus)
        speed = timed(ways[name], 0)
        print(f"{name + ', cold cache':28}{speed.cpu:22.0f}{'':28}{speed.wall:10.0f}")
        key = "npz" if name == BASELINE else name
        figures[f"{key}_cold_clips_per_second"] = round(speed.wall, 1)
    return figures


def drop_from_memory(corpus: Path) -> None:
    """Ask the kernel to forget the pages of all files."""
    os.sync()
    for path in corpus.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


if __name__ == "__main__":
    raise SystemExit(main())
