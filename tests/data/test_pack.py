"""A packed corpus holds what the source holds, in its order, within the bound that is stated."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from safetensors import safe_open
from safetensors.numpy import load_file

from launch.pack import main
from trainer.data.corpus import Clip, clip_digest, min_output_frames, read_split
from trainer.data.features import read_features
from trainer.data.normalization import from_moments
from trainer.data.prepare import scan_in_shares
from trainer.data.shards.encode import choose_encoding, decode, encode, largest_excess
from trainer.data.shards.format import INDEX_COLUMNS, Manifest, map_columns, nth_string
from trainer.data.synthetic import SyntheticSpec, write_corpus
from trainer.data.table import folder_split
from trainer.errors import InputError
from trainer.randomness import clip_keys

DIM = 32


class Alone:
    """The ranks of a single process."""

    rank, world_size = 0, 1

    def gather_objects(self, item: Any) -> list[Any]:
        """Return the one item."""
        return [item]

    def together(self, act: Any) -> Any:
        """Act."""
        return act()


def write_clip(corpus: Path, split: str, name: str, features: np.ndarray) -> None:
    """Write a feature file."""
    path = corpus / split / f"{name}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, features=features)


def write_annotations(corpus: Path, split: str, rows: Sequence[tuple[str, str, str]]) -> None:
    """Write an annotation file of (id, signer, glosses)."""
    folder = corpus / "annotations"
    folder.mkdir(exist_ok=True)
    lines = ["id|folder|signer|annotation", *(f"{name}||{signer}|{glosses}" for name, signer, glosses in rows)]
    (folder / f"{split}.corpus.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Three splits of a few clips, written by hand; dimension 0 is constant, and the order is not that of names."""
    corpus, draw = tmp_path / "small", np.random.default_rng(5)
    names = {"train": ["zebra", "ant", "über/cat", "bee"], "dev": ["fox"], "odd": ["owl", "elk"]}
    for split, ids in names.items():
        for place, name in enumerate(ids):
            features = draw.normal(50, 10, (3 + 2 * place, DIM)).astype(np.float32)
            features[:, 0] = np.float32(0.1)
            write_clip(corpus, split, name, features)
        write_annotations(
            corpus, split, [(name, f"S{i % 2}", "HAUS HAUS ÄPFEL"[: 9 + 6 * (i % 2)]) for i, name in enumerate(ids)]
        )
    # Too short for its glosses: packed all the same.
    write_clip(corpus, "train", "short", np.ones((1, DIM), np.float32) * np.float32(0.1))
    annotations = corpus / "annotations" / "train.corpus.csv"
    annotations.write_text(annotations.read_text() + "short||S9|A B C\n")
    return corpus


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More training clips than are merged at once."""
    out = tmp_path_factory.mktemp("source") / "synthetic"
    write_corpus(SyntheticSpec(clips=150, seed=2, vocabulary_size=8, feature_dim=DIM), out, lambda text: None)
    return out


def pack(*arguments: object) -> int:
    """Pack with one worker, unless told otherwise."""
    return main([str(argument) for argument in ("--workers", 1, *arguments)])


def manifest_of(packed: Path) -> Manifest:
    """Read a manifest."""
    return Manifest.parse((packed / "manifest.json").read_bytes(), str(packed))


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def clips_of(corpus: Path, split: str) -> list[Clip]:
    """Read a split of a source."""
    return read_split(corpus, str(corpus / "annotations"), split, allow_missing=False, log=lambda text: None)


def read_packed(packed: Path, split: str) -> dict[str, np.ndarray]:
    """Read a split's stored values through the library alone, by clip."""
    tensors: dict[str, np.ndarray] = {}
    for path in sorted((packed / "shards").glob(f"{split}-?????.safetensors")):
        with safe_open(path, framework="numpy") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def test_float32_is_the_source_to_the_bit(small: Path, tmp_path: Path) -> None:
    assert pack(small, tmp_path / "out", "--dtype", "float32", "--verify") == 0
    assert list(manifest_of(tmp_path / "out").splits) == ["train", "dev", "odd"]
    for split in ("train", "dev", "odd"):
        stored = read_packed(tmp_path / "out", split)
        clips = clips_of(small, split)
        assert stored.keys() == {clip.id for clip in clips}
        for clip in clips:
            assert stored[clip.id].tobytes() == read_features(clip.source).tobytes()
            assert stored[clip.id].shape == (clip.num_frames, DIM)


def test_the_index_says_what_the_source_says(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(small, out, "--shard_mb", 0.0005)
    manifest = manifest_of(out)
    vocabulary = json.loads((out / "vocabulary.json").read_text(encoding="utf-8"))
    assert vocabulary["glosses"] == sorted(vocabulary["glosses"]) == ["A", "B", "C", "HAUS", "ÄPFEL"]
    assert vocabulary["counts"]["dev"] == [0, 0, 0, 2, 0]
    for split, entry in manifest.splits.items():
        columns = map_columns(out / entry.index.name, INDEX_COLUMNS)
        clips = clips_of(small, split)
        assert entry.clips == len(clips)
        assert entry.frames == sum(clip.num_frames for clip in clips)
        ends = [0, *columns["gloss_end"].tolist()]
        for row, clip in enumerate(clips):
            assert nth_string(columns["ids"], columns["id_end"], row) == clip.id
            signer = int(columns["signer"][row])
            assert nth_string(columns["signer_names"], columns["signer_name_end"], signer) == clip.signer
            glosses = columns["glosses"][ends[row] : ends[row + 1]].tolist()
            assert tuple(vocabulary["glosses"][gloss] for gloss in glosses) == clip.glosses
            assert columns["num_frames"][row] == clip.num_frames
            assert columns["min_outputs"][row] == min_output_frames(clip.glosses)
            assert columns["digest"][row] == clip_digest(clip.id, clip.num_frames, clip.glosses)
            assert columns["key"][row] == clip_keys([clip.id])[0]
            source = clip.source.read_bytes()
            assert columns["source_bytes"][row] == len(source)
            assert columns["source_checksum"][row] == xxhash.xxh3_64_intdigest(source)
            shard = manifest.shards[int(columns["shard"][row])]
            assert shard.name.startswith(f"shards/{split}-")
            start, size = int(columns["offset"][row]), clip.num_frames * DIM * 2
            record = (out / shard.name).read_bytes()[start : start + size]
            assert columns["checksum"][row] == xxhash.xxh3_64_intdigest(record)
            assert record == read_packed(out, split)[clip.id].tobytes()


def test_shards_keep_the_order_and_the_limit(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(small, out, "--shard_mb", 0.00052)
    manifest = manifest_of(out)
    order = []
    for entry in manifest.shards:
        content = (out / entry.name).read_bytes()
        assert len(content) == entry.bytes
        size = int.from_bytes(content[:8], "little")
        assert (8 + size) % 64 == 0
        records = list(json.loads(content[8 : 8 + size]))
        assert len(content) - 8 - size <= 520 or len(records) == 1
        order += records
    assert order == [clip.id for split in manifest.splits for clip in clips_of(small, split)]
    # zebra 192 bytes and ant 320 fit together, then über/cat 448, bee 576 and short 64.
    assert len([entry for entry in manifest.shards if entry.name.startswith("shards/train")]) == 4


def test_statistics_are_those_of_training_to_the_bit(synthetic: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(synthetic, out, "--workers", 2)
    stored = load_file(out / "statistics.safetensors")
    train = clips_of(synthetic, "train")
    assert len(train) > 2 * 64
    moments, problems = scan_in_shares(folder_split("train", train, DIM, synthetic), Alone(), 1)
    assert not problems
    total = moments[0]
    for part in moments[1:]:
        total = total.merge(part)
    assert stored["train_count"].tolist() == [total.count]
    assert stored["train_mean"].tobytes() == total.mean.tobytes()
    assert stored["train_m2"].tobytes() == total.m2.tobytes()
    assert stored["center"].tobytes() == from_moments("corpus", moments, DIM).mean.tobytes()
    everything = np.concatenate(
        [read_features(c.source) for s in ("train", "dev", "test") for c in clips_of(synthetic, s)]
    )
    assert np.array_equal(stored["minimum"], everything.min(axis=0))
    assert np.array_equal(stored["maximum"], everything.max(axis=0))


@pytest.mark.parametrize("scaling", ["deviation", "none"])
def test_float16_keeps_its_bound_and_states_its_error(small: Path, tmp_path: Path, scaling: str) -> None:
    out = tmp_path / "out"
    assert pack(small, out, "--scaling", scaling, "--verify") == 0
    manifest, statistics = manifest_of(out), load_file(out / "statistics.safetensors")
    center, scale = statistics["center"], statistics["scale"]
    assert np.all(np.frexp(scale)[0] == 0.5)
    errors = []
    for split in manifest.splits:
        stored = read_packed(out, split)
        for clip in clips_of(small, split):
            exact = read_features(clip.source)
            decoded = stored[clip.id].astype(np.float32) * scale + center
            error = np.abs(decoded.astype(np.float64) - exact)
            assert np.all(error <= np.abs(exact.astype(np.float64) - center) * 2.0**-11 + np.abs(exact) * 2.0**-23)
            if scaling == "deviation" and clip.id != "short":
                assert np.array_equal(decoded[:, 0], exact[:, 0])
            errors.append(error)
    assert manifest.error["max"] == pytest.approx(max(error.max() for error in errors), rel=1e-6)
    assert manifest.error["mean"] == pytest.approx(np.concatenate(errors).mean(), rel=1e-4)
    spread = np.sqrt(statistics["train_m2"] / statistics["train_count"])
    relative = np.concatenate(errors)[:, 1:] / spread[1:]
    assert manifest.error["max_in_deviations"] == pytest.approx(relative.max(), rel=1e-3)
    if scaling == "none":
        assert not center.any()
        assert np.all(scale == 1)


def test_the_bound_holds_for_values_of_any_size() -> None:
    draw = np.random.default_rng(0)
    size = np.exp2(draw.uniform(-140, 120, 64))
    features = (draw.normal(size=(500, 64)) * size * np.exp2(draw.uniform(-40, 0, (500, 64)))).astype(np.float32)
    features[:, 1] = np.float32(1e-45)
    encoding = choose_encoding(
        "float16",
        "deviation",
        features.mean(axis=0, dtype=np.float64).astype(np.float32),
        features.min(axis=0),
        features.max(axis=0),
    )
    stored, error = encode(features, encoding, np.ones(64, np.float32))
    decoded = decode(stored, encoding)
    assert np.isfinite(stored).all()
    assert largest_excess(features, decoded, encoding) <= 1
    assert np.array_equal(decoded[:, 1], features[:, 1])
    assert error.largest == pytest.approx(np.abs(decoded.astype(np.float64) - features).max())
    # Off by a little more than allowed is seen.
    decoded[7, 0] += np.abs(features[7, 0] - encoding.center[0]) * np.float32(2.0**-9)
    assert largest_excess(features, decoded, encoding) > 1


def test_same_source_and_flags_give_the_same_bytes(synthetic: Path, tmp_path: Path) -> None:
    pack(synthetic, tmp_path / "one", "--shard_mb", 0.05)
    pack(synthetic, tmp_path / "two", "--shard_mb", 0.05, "--workers", 2)
    assert len(manifest_of(tmp_path / "one").shards) > 5
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_a_missing_feature_file_is_an_error_unless_it_may_be_missing(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (small / "train" / "ant.npz").unlink()
    with pytest.raises(InputError, match="ant"):
        pack(small, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert pack(small, tmp_path / "out", "--allow_missing") == 0
    assert "ant" in capsys.readouterr().err
    assert "ant" not in read_packed(tmp_path / "out", "train")


def test_folders_without_annotations_are_left_out_aloud(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_clip(small, "raw", "x", np.ones((3, DIM), np.float32))
    pack(small, tmp_path / "out")
    assert str(small / "raw") in capsys.readouterr().err
    pack(small, tmp_path / "chosen", "--splits", "train,odd")
    assert list(manifest_of(tmp_path / "chosen").splits) == ["train", "odd"]
    with pytest.raises(InputError, match="train among them"):
        pack(small, tmp_path / "without", "--splits", "dev")


def test_all_bad_files_are_named_before_anything_is_written(small: Path, tmp_path: Path) -> None:
    for split, name in (("train", "ant"), ("odd", "elk")):
        path = small / split / f"{name}.npz"
        # Large enough that reading the header alone does not meet the damage.
        write_clip(small, split, name, np.ones((400, DIM), np.float32))
        content = bytearray(path.read_bytes())
        content[-500] ^= 1
        path.write_bytes(content)
    write_clip(small, "dev", "fox", np.full((3, DIM), np.nan, np.float32))
    with pytest.raises(InputError) as caught:
        pack(small, tmp_path / "out")
    assert len(caught.value.problems) == 3
    for name, problem in zip(("ant", "fox", "elk"), caught.value.problems, strict=True):
        assert name in problem
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


def test_values_that_float16_cannot_hold_are_refused_without_scaling(small: Path, tmp_path: Path) -> None:
    features = np.ones((4, DIM), np.float32)
    features[2, 7] = -70000
    write_clip(small, "dev", "fox", features)
    with pytest.raises(InputError, match=r"fox.*-70000 at frame 2, dimension 7.*drop --scaling none"):
        pack(small, tmp_path / "out", "--scaling", "none")
    assert pack(small, tmp_path / "out", "--verify") == 0


def test_packing_again_finds_it_packed_or_says_what_differs(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    pack(small, out)
    before = files_of(out)
    capsys.readouterr()
    assert pack(small, out, "--verify") == 0
    assert "already packed" in (shown := capsys.readouterr().out)
    assert "verified" in shown
    for flags, named in ((("--dtype", "float32"), "--dtype"), (("--splits", "train"), "--splits")):
        with pytest.raises(InputError, match=named):
            pack(small, out, *flags)
    with pytest.raises(InputError, match="--shard_mb"):
        pack(small, out, "--shard_mb", 0.0004)
    write_clip(small, "dev", "fox", np.ones((3, DIM), np.float32))
    with pytest.raises(InputError, match="fox"):
        pack(small, out)
    assert files_of(out) == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="something else"):
        pack(small, other)
    (tmp_path / "new.packing").mkdir()
    (tmp_path / "new.packing" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="other files"):
        pack(small, tmp_path / "new", "--restart")
    assert (tmp_path / "new.packing" / "thesis.txt").read_text() == "mine"


def test_verify_names_the_clip_and_the_shard_of_a_damage(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(small, out)
    shard = out / "shards" / "train-00000.safetensors"
    columns = map_columns(out / "index-train.safetensors")
    sound = shard.read_bytes()
    damaged = bytearray(sound)
    damaged[int(columns["offset"][2]) + 5] ^= 4
    shard.write_bytes(damaged)
    with pytest.raises(InputError, match=r"train-00000\.safetensors: clip über/cat") as caught:
        pack(small, out, "--verify")
    assert len(caught.value.problems) == 1
    shard.write_bytes(sound[:-1])
    with pytest.raises(InputError, match=r"train-00000\.safetensors: expected"):
        pack(small, out, "--verify")
    shard.write_bytes(sound)
    for name in ("index-dev.safetensors", "statistics.safetensors", "vocabulary.json"):
        content = (out / name).read_bytes()
        (out / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(InputError, match=name):
            pack(small, out, "--verify")
        (out / name).write_bytes(content)
    assert pack(small, out, "--verify") == 0


def test_check_source_names_what_changed(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    pack(small, out)
    assert pack(small, out, "--check_source") == 0
    capsys.readouterr()
    write_clip(small, "dev", "fox", np.ones((3, DIM), np.float32))
    (small / "train" / "bee.npz").unlink()
    write_clip(small, "odd", "yak", np.ones((3, DIM), np.float32))
    write_annotations(
        small, "odd", [("owl", "S0", "HAUS ANDERS"), ("elk", "S1", "HAUS HAUS ÄPFEL"), ("yak", "S0", "A")]
    )
    assert pack(small, out, "--check_source") == 2
    shown = capsys.readouterr().err
    assert "split dev: 1 clips were packed from another feature file: fox" in shown
    assert "split train: 1 clips were packed and are missing now: bee" in shown
    assert "split odd: 1 clips were packed with another annotation: owl" in shown
    assert "split odd: 1 clips are new: yak" in shown
    assert "elk" not in shown


def test_real_recordings(coffee: Path, tmp_path: Path) -> None:
    assert pack(coffee, tmp_path / "out", "--verify", "--workers", 2) == 0
    manifest = manifest_of(tmp_path / "out")
    assert list(manifest.splits) == ["train", "dev", "test", "test_unseen"]
    assert manifest.error["max_in_deviations"] < 0.05
