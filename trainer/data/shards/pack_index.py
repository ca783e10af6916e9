"""What lies beside the shards: the index of a split, the vocabulary, the statistics."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from trainer.data.corpus import Clip, clip_digest, min_output_frames
from trainer.data.shards.encode import Encoding
from trainer.data.shards.format import INDEX_COLUMNS, Columns, join_strings
from trainer.data.shards.pack_scan import Findings
from trainer.data.shards.pack_source import Source
from trainer.data.shards.pack_write import Shard
from trainer.randomness import clip_keys


def list_glosses(source: Source) -> list[str]:
    """Return the glosses of all splits, sorted."""
    return sorted({gloss for clip in source.clips for gloss in clip.glosses})


def vocabulary_file(source: Source, glosses: Sequence[str]) -> bytes:
    """Return the vocabulary: the glosses, and how often each split signs each."""
    counts = {}
    for split, clips in source.splits.items():
        counter = Counter(gloss for clip in clips for gloss in clip.glosses)
        counts[split] = [counter[gloss] for gloss in glosses]
    return (json.dumps({"glosses": list(glosses), "counts": counts}, ensure_ascii=False) + "\n").encode()


def statistics_file(encoding: Encoding, findings: Findings) -> bytes:
    """Return the scaling, the moments of the training split, and the extremes of all splits."""
    return save(
        {
            "center": encoding.center,
            "scale": encoding.scale,
            "train_count": np.array([findings.moments.count], np.int64),
            "train_mean": findings.moments.mean,
            "train_m2": findings.moments.m2,
            "minimum": findings.minimum,
            "maximum": findings.maximum,
        }
    )


def index_file(
    clips: Sequence[Clip],
    shards: Mapping[int, Shard],
    glosses: Sequence[str],
    *,
    checksums: npt.NDArray[np.uint64],
    source_bytes: npt.NDArray[np.int64],
    source_checksums: npt.NDArray[np.uint64],
) -> bytes:
    """Return a split's index; `shards` are those of the split by their place in the manifest's list."""
    places = {gloss: place for place, gloss in enumerate(glosses)}
    signers = {name: place for place, name in enumerate(sorted({clip.signer for clip in clips}))}
    ids, id_end = join_strings([clip.id for clip in clips])
    signer_names, signer_name_end = join_strings(list(signers))
    columns: Columns = {
        "shard": np.concatenate([np.full(len(shard.offsets), place) for place, shard in shards.items()]),
        "offset": np.concatenate([shard.offsets for shard in shards.values()]),
        "num_frames": np.array([clip.num_frames for clip in clips]),
        "min_outputs": np.array([min_output_frames(clip.glosses) for clip in clips]),
        "checksum": checksums,
        "key": clip_keys([clip.id for clip in clips]),
        "digest": np.array([clip_digest(clip.id, clip.num_frames, clip.glosses) for clip in clips], np.uint64),
        "signer": np.array([signers[clip.signer] for clip in clips]),
        "id_end": id_end,
        "gloss_end": np.cumsum([len(clip.glosses) for clip in clips]),
        "source_bytes": source_bytes,
        "source_checksum": source_checksums,
        "ids": ids,
        "glosses": np.array([places[gloss] for clip in clips for gloss in clip.glosses]),
        "signer_name_end": signer_name_end,
        "signer_names": signer_names,
    }
    return save({name: np.ascontiguousarray(columns[name], dtype=kind) for name, kind in INDEX_COLUMNS.items()})
