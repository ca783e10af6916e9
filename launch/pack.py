"""`signscale pack`: a feature corpus into shards."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from trainer.data.shards.encode import BOUNDS
from trainer.data.shards.pack import Packed, PackSpec, pack
from trainer.data.shards.pack_listing import compare_source, is_packed, known_clips, list_source, open_listing
from trainer.data.shards.pack_source import choose_splits, default_annotations
from trainer.data.shards.pack_workers import StoppedError, WorkerPool
from trainer.data.shards.verify import Verified, verify
from trainer.errors import InputError, format_problems
from trainer.exits import EXIT_INPUT_ERROR, exit_on_input_error
from trainer.options import OptionParser

EXIT_STOPPED = 130
"""Exit code after a request to stop: nothing is published, so that what comes next must not go on."""


def _build_parser() -> OptionParser:
    parser = OptionParser(
        prog="signscale pack",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="""\
Pack a feature corpus into shards that training reads many times faster: SOURCE/<split>/<id>.npz and the
annotations into OUT, a folder to train from, to copy, or to put into an object store. All clips of the
annotations, in their order. The same source and flags give the same bytes, with any number of workers.

OUT appears when all of it is on the disk. Until then everything lies in OUT.packing: ended in any way, the
same command goes on where it was. Exit codes: 0 packed, 2 a mistake in the input or no room, 130 stopped.""",
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="corpus with a folder of <id>.npz files per split")
    add("out", metavar="OUT", help="folder to create")
    add(
        "--annotations",
        default="",
        metavar="WHERE",
        help="folder of one annotation file per split, or a pattern such as 'ann/{split}.corpus.csv' "
        "(default SOURCE/annotations, else SOURCE)",
    )
    add(
        "--splits",
        default="",
        metavar="A,B",
        help="splits to pack, train among them (default: every folder of SOURCE that has annotations)",
    )
    add(
        "--dtype",
        choices=["float16", "float32"],
        default="float16",
        help="type of the stored values; float32 keeps them to the bit, in twice the bytes (default float16)",
    )
    add(
        "--scaling",
        choices=["deviation", "none"],
        default="deviation",
        help="float16 only. deviation: store the distance from the training mean, by a power of two per dimension, "
        "off by at most 2^-11 of that distance; none: store the value, off by at most 2^-11 of it "
        "(default deviation)",
    )
    add("--shard_mb", type=float, default=512, metavar="MB", help="size of a shard, in 10^6 bytes (default 512)")
    add("--workers", type=int, default=0, metavar="N", help="processes that read and write (default: the cores)")
    add("--allow_missing", action="store_true", help="leave annotated clips without a feature file out, by name")
    add("--verify", action="store_true", help="then read all of OUT back, and compare it with SOURCE")
    add(
        "--check_source",
        action="store_true",
        help="do not pack: name the clips of SOURCE that changed, are missing or new since OUT was packed",
    )
    add("--restart", action="store_true", help="drop what an earlier attempt left in OUT.packing")
    return parser


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. Raises `InputError` for what shows without a look at the source."""
    options = _build_parser().parse(argv)
    if options.shard_mb <= 0:
        raise InputError(f"--shard_mb: expected a size above 0, found {options.shard_mb:g}; 512 suits most disks")
    if options.workers < 0:
        raise InputError(f"--workers: expected 1 or more, found {options.workers}; leave it out to use all cores")
    for name, place in (("SOURCE", options.source), ("OUT", options.out)):
        if "://" in place:
            raise InputError(
                f"{name}: expected a folder, found the address {place}; pack from a folder into a folder, then copy "
                "OUT to where it shall lie (aws s3 sync OUT s3://…)"
            )
    if Path(options.out).resolve().is_relative_to(Path(options.source).resolve()):
        raise InputError(f"OUT: {options.out} lies inside SOURCE; choose a folder beside it")
    return options


def main(argv: Sequence[str]) -> int:
    """Pack, verify or compare as the flags say. Raises `InputError` on a mistake in flags or source."""
    options = parse_options(argv)
    if is_packed(Path(options.source)):
        raise InputError(f"SOURCE: {options.source} is packed already; name the corpus it was packed from")
    spec = PackSpec(
        source=Path(options.source),
        out=Path(options.out),
        annotations=options.annotations,
        splits=tuple(name.strip() for name in options.splits.split(",") if name.strip()),
        dtype=options.dtype,
        scaling=options.scaling,
        shard_bytes=int(options.shard_mb * 1e6),
        allow_missing=options.allow_missing,
    )
    try:
        if options.check_source:
            return _check_source(spec)
        with WorkerPool(options.workers or len(os.sched_getaffinity(0))) as pool:
            return _pack(spec, pool, restart=options.restart, check=options.verify)
    except (StoppedError, KeyboardInterrupt):
        done = "packed, but not verified" if is_packed(spec.out) else "not packed"
        print(f"stopped: {spec.out} is {done}; the same command goes on where this one ended", file=sys.stderr)
        return EXIT_STOPPED


def _pack(spec: PackSpec, pool: WorkerPool, *, restart: bool, check: bool) -> int:
    begin = time.monotonic()
    packed = pack(spec, pool, restart=restart, log=_say, progress=_progress)
    if packed.fresh:
        print(_summarize(packed, time.monotonic() - begin))
    else:
        print(f"{spec.out}: already packed from this source with these flags")
    if check:
        clips = len(packed.source.clips)
        with _progress("verifying", clips) as advance:
            print(_praise(spec.out, verify(packed.corpus, known_clips(packed.source), pool, advance)))
    return 0


def _check_source(spec: PackSpec) -> int:
    packed = open_listing(spec.out)
    where = spec.annotations or default_annotations(spec.source)
    splits = list(packed.splits) if not spec.splits else choose_splits(spec.source, where, spec.splits, _say)
    found = list_source(spec.source, where, splits)
    with _progress("comparing", sum(map(len, found.values()))) as advance:
        differences = compare_source(packed, found, advance)
    if differences:
        print(format_problems(differences), file=sys.stderr)
        return EXIT_INPUT_ERROR
    clips = sum(map(len, packed.splits.values()))
    print(f"{spec.source}: {clips} clips, all as {spec.out} was packed from")
    return 0


def _summarize(packed: Packed, seconds: float) -> str:
    manifest = packed.corpus.manifest
    rows: list[tuple[str, ...]] = [("split", "clips", "frames", "MB before", "MB after", "ratio")]
    before = {split: sum(c.source.stat().st_size for c in clips) for split, clips in packed.source.splits.items()}
    after = {
        split: entry.index.bytes
        + sum(s.bytes for s in manifest.shards if s.name.rpartition("-")[0] == f"shards/{split}")
        for split, entry in manifest.splits.items()
    }
    for split, entry in manifest.splits.items():
        rows.append(_row(split, entry.clips, entry.frames, before[split], after[split]))
    clips, frames = (sum(getattr(e, name) for e in manifest.splits.values()) for name in ("clips", "frames"))
    rows.append(_row("all", clips, frames, sum(before.values()), sum(after.values())))
    width = max(len(row[0]) for row in rows)
    lines = [f"{row[0]:<{width}}" + "".join(f"{cell:>12}" for cell in row[1:]) for row in rows]
    error = manifest.error
    phases = ", ".join(f"{what} {spent:.1f} s" for what, spent in packed.seconds.items())
    return "\n".join(
        [
            *lines,
            f"{packed.corpus.folder}: {len(manifest.shards)} shards of {manifest.dtype}, scaling {manifest.scaling}, "
            f"D = {manifest.feature_dim}; {seconds:.1f} s ({phases}), {clips / seconds:.1f} clips/s",
            f"error: at most {error['max']:.3g} (mean {error['mean']:.3g}; {error['max_in_deviations']:.3g} standard "
            f"deviations); bound {BOUNDS[manifest.dtype, manifest.scaling]}",
        ]
    )


def _row(split: str, clips: int, frames: int, before: int, after: int) -> tuple[str, ...]:
    return split, f"{clips}", f"{frames}", f"{before / 1e6:.1f}", f"{after / 1e6:.1f}", f"{before / after:.2f}"


def _praise(out: Path, verified: Verified) -> str:
    exact = (
        "equal to the source to the bit" if not verified.worst else f"largest error {verified.worst:.3f} of its bound"
    )
    return (
        f"{out}: verified {verified.files} files, {verified.clips} records and their checksums, {verified.values} "
        f"values; {exact}"
    )


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], object]]:
    # Without a terminal a bar is a flood of lines in a log.
    with tqdm(total=total, desc=what, unit="clip", disable=None, dynamic_ncols=True) as bar:
        yield bar.update


if __name__ == "__main__":
    exit_on_input_error(lambda: main(sys.argv[1:]))
