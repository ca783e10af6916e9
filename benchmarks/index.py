"""Index: what a process pays, in time and private memory, to open a packed corpus of millions of clips.

Writes the index of a corpus that has no shards, opens it as training does, in a process of its own, and asks for what
every rank asks: the plan's columns, the vocabulary, the hash of the clips, and the ids and glosses of a few clips. Ends
with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors.numpy import save_file

# Run as a file, Python looks beside the file and not where the packages are.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.data.lengths import draw_phoenix_lengths
from trainer.data.opening import OpenCorpus
from trainer.data.shards.format import (
    MANIFEST,
    STATISTICS,
    VOCABULARY,
    FileEntry,
    Manifest,
    SplitEntry,
    index_name,
    record_bytes,
    shard_name,
)
from trainer.randomness import mix
from trainer.recipe import CorpusRecipe

_DIM, _GLOSSES, _SHARD_BYTES = 6516, 1295, 512_000_000
_ID_BYTES = 24
_CHUNK = 1_000_000


def main(argv: Sequence[str] | None = None) -> int:
    """Write, open, measure; end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=10_000_000, help="clips of the training split")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder)
        write_corpus_index(corpus, args.clips)
        size = (corpus / index_name("train")).stat().st_size
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            figures = pool.apply(measure, (folder,))
    figures |= {"clips": args.clips, "index_bytes_per_clip": round(size / args.clips, 1)}
    print(
        f"{args.clips} clips: an index of {size / 1e6:.0f} MB, {size / args.clips:.0f} bytes a clip, mapped and shared"
    )
    print(
        f"opened in {figures['open_seconds']:.2f} s, {figures['private_mb']:.0f} MB of private memory, "
        f"{figures['private_bytes_per_clip']:.1f} bytes a clip"
    )
    print(json.dumps(figures))
    return 0


def measure(folder: str) -> dict[str, Any]:
    """Open the training split as a rank does; return seconds, and private memory beyond that of the packages."""
    before, started = private_mb(), time.perf_counter()
    corpus = OpenCorpus(CorpusRecipe(data_dir=folder), print)
    split = corpus.split("train")
    feasible = split.feasible(4)
    split.table.all_glosses()
    split.hash_clips()
    opened = time.perf_counter() - started
    for index in range(0, len(split), len(split) // 1000):
        split.id(index), split.glosses(index), split.signer(index)
    held = private_mb() - before
    assert feasible.all()
    return {
        "open_seconds": round(opened, 3),
        "private_mb": round(held, 1),
        "private_bytes_per_clip": round(held * 1e6 / len(split), 2),
    }


def private_mb() -> float:
    """Return the memory of this process that no file backs, in MB."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024 / 1e6


def write_corpus_index(folder: Path, clips: int) -> None:
    """Write all files of a packed corpus but its shards."""
    drawn = [draw_phoenix_lengths(min(_CHUNK, clips - start), start) for start in range(0, clips, _CHUNK)]
    frames, glosses = (np.concatenate([part[i] for part in drawn]) for i in range(2))
    sizes = record_bytes(frames, _DIM, "float16")
    ends = np.cumsum(sizes)
    shard = (ends - sizes) // _SHARD_BYTES
    keys = mix(np.arange(clips, dtype=np.uint64))
    columns = {
        "shard": shard.astype(np.int32),
        "offset": (ends - sizes) % _SHARD_BYTES,
        "num_frames": frames.astype(np.int32),
        "min_outputs": glosses.astype(np.int32),
        "checksum": keys,
        "key": keys,
        "digest": keys,
        "signer": (np.arange(clips) % 9).astype(np.int32),
        "id_end": np.arange(1, clips + 1, dtype=np.int64) * _ID_BYTES,
        "gloss_end": np.cumsum(glosses),
        "source_bytes": sizes,
        "source_checksum": keys,
        "ids": np.full(clips * _ID_BYTES, ord("x"), dtype=np.uint8),
        "glosses": (np.arange(int(glosses.sum())) % _GLOSSES).astype(np.int32),
        "signer_name_end": np.arange(1, 10, dtype=np.int64),
        "signer_names": np.frombuffer(b"ABCDEFGHI", dtype=np.uint8),
    }
    save_file(columns, folder / index_name("train"))
    counts = np.bincount(columns["glosses"], minlength=_GLOSSES).tolist()
    names = [f"GLOSS{number}" for number in range(_GLOSSES)]
    (folder / VOCABULARY).write_text(json.dumps({"glosses": names, "counts": {"train": counts}}))
    ones = np.ones(_DIM)
    statistics = {"center": ones.astype(np.float32), "scale": ones.astype(np.float32)}
    statistics |= {"train_count": np.array([1]), "train_mean": ones, "train_m2": ones}
    save_file(statistics, folder / STATISTICS)
    manifest = Manifest(
        dtype="float16",
        scaling="deviation",
        feature_dim=_DIM,
        splits={"train": SplitEntry(clips=clips, frames=int(frames.sum()), index=entry(folder, index_name("train")))},
        shards=[FileEntry(name=shard_name("train", i), bytes=_SHARD_BYTES) for i in range(int(shard.max()) + 1)],
        vocabulary=entry(folder, VOCABULARY),
        statistics=entry(folder, STATISTICS),
        source_fingerprint="",
        source_bytes=int(sizes.sum()),
        error={"max": 0.0, "mean": 0.0, "max_in_deviations": 0.0},
    )
    (folder / MANIFEST).write_text(json.dumps(manifest.to_json()))


def entry(folder: Path, name: str) -> FileEntry:
    """Describe a file as the manifest does."""
    content = np.memmap(folder / name, dtype=np.uint8, mode="r")
    return FileEntry(name=name, bytes=len(content), xxh3=xxhash.xxh3_64_hexdigest(content.data))


if __name__ == "__main__":
    raise SystemExit(main())
