"""The three formats of an exported model: written, and opened again.

Every file is complete in itself: weights, normalisation and the card (`recognition.Card`) travel in one.
"""

from __future__ import annotations

import importlib.util
import io
import json
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from trainer.checkpoint.content import Checkpoint, read_checkpoint
from trainer.checkpoint.store import find_checkpoint
from trainer.data.normalization import Kind, Normalization
from trainer.errors import InputError
from trainer.export.clip_model import ClipModel
from trainer.export.recognition import Card, Floats, Recognition, recognition_of, restore_model
from trainer.models.recognizer import Recognizer

Format = Literal["safetensors", "torch_export", "onnx"]
FORMATS: tuple[Format, ...] = get_args(Format)
FILES: dict[Format, str] = {"safetensors": "model.safetensors", "torch_export": "model.pt2", "onnx": "model.onnx"}
REPORT = "export.json"
_KEY = "signscale"
_CARD = "signscale.json"
_EXAMPLE_FRAMES = {"features": 57, "frames": 13}
"""Length of the clip that a graph is drawn with, by its input: no multiple of anything. The clip stays in the file."""


def check_format(kind: Format) -> None:
    """Raise `InputError` where a format needs packages that are not installed."""
    needed = ("onnx", "onnxscript", "onnxruntime") if kind == "onnx" else ()
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"onnx: needs {', '.join(missing)}; pip install 'signscale[onnx]', or export to another format"
        )


def write_model(model: Recognizer, checkpoint: Checkpoint, kind: Format, folder: Path) -> Path:
    """Write the model file into an existing folder; raises `InputError` for a model the format cannot hold."""
    card, path = Card.of(checkpoint), folder / FILES[kind]
    if kind == "safetensors":
        # The model's own, and not the checkpoint's, which may hold what training alone needed.
        tensors = {f"model.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
        for name in ("mean", "scale"):
            tensors[f"normalization.{name}"] = torch.from_numpy(getattr(checkpoint.normalization, name))
        save_file(tensors, path, metadata={_KEY: card.to_json()})
        return path
    program = _draw(ClipModel(model, checkpoint.normalization), card)
    if kind == "torch_export":
        torch.export.save(program, path, extra_files={_CARD: card.to_json()})
        return path
    with warnings.catch_warnings():
        # The exporter speaks to its own developers.
        warnings.simplefilter("ignore")
        onnx = torch.onnx.export(
            program, dynamo=True, input_names=[_input_name(card)], output_names=["log_probs"], verbose=False
        )
    assert onnx is not None
    onnx.model.metadata_props[_KEY] = card.to_json()
    onnx.save(path, external_data=False)
    return path


def _input_name(card: Card) -> str:
    return "frames" if card.is_video else "features"


def _draw(model: ClipModel, card: Card) -> torch.export.ExportedProgram:
    dtype = torch.uint8 if card.is_video else torch.float32
    example = torch.zeros(_EXAMPLE_FRAMES[_input_name(card)], *card.frame_shape, dtype=dtype)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return torch.export.export(
            model.eval(), (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False
        )


def open_recognition(path: Path) -> Recognition:
    """Open a run, a checkpoint, a folder that `signscale export` wrote, or the model file in it.

    Raises `InputError` for anything else, and for a file that is damaged.
    """
    if (path / REPORT).is_file():
        path = _find_file(path)
    openers: dict[str, Callable[[Path], Recognition]] = {
        ".safetensors": _open_safetensors,
        ".pt2": _open_torch_export,
        ".onnx": _open_onnx,
    }
    if path.suffix in openers and not path.is_dir():
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        return openers[path.suffix](path)
    folder = find_checkpoint(path)
    checkpoint = read_checkpoint(folder, with_optimizer=False)
    card = Card.of(checkpoint)
    return recognition_of(restore_model(card, checkpoint.model, str(folder)), checkpoint.normalization, card)


def _find_file(folder: Path) -> Path:
    try:
        return folder / str(json.loads((folder / REPORT).read_text(encoding="utf-8"))["file"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / REPORT}: is damaged ({error}); name the model file itself") from None


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: is damaged or no exported model ({str(error)[:200]}); export the run anew")


def _open_safetensors(path: Path) -> Recognition:
    try:
        with safe_open(path, framework="pt") as file:
            card = Card.from_json((file.metadata() or {}).get(_KEY), path)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        normalization = Normalization(
            kind=cast(Kind, card.normalization),
            mean=tensors.pop("normalization.mean").numpy(),
            scale=tensors.pop("normalization.scale").numpy(),
        )
    except (OSError, SafetensorError, KeyError) as error:
        raise _damaged(path, error) from error
    weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    return recognition_of(restore_model(card, weights, str(path)), normalization, card)


def _open_torch_export(path: Path) -> Recognition:
    _refuse_pickle(path)
    extra = {_CARD: ""}
    try:
        program = torch.export.load(path, extra_files=extra)
    except Exception as error:
        # torch.export names no errors of its own for a file it cannot read.
        raise _damaged(path, error) from error
    card = Card.from_json(extra[_CARD], path)
    # torch's max_pool1d compares its length with the example's when a graph is drawn, and leaves that as a guard,
    # although all sizes in the graph are symbols.
    module = cast(Any, program).module(check_guards=False)

    def scores(clip: npt.NDArray[Any]) -> Floats:
        with torch.no_grad():
            return cast(Floats, module(torch.from_numpy(clip)).numpy())

    # torch.export takes a single output frame for a case of its own and bounds the length above it.
    lower = [int(bounds.lower) for bounds in program.range_constraints.values()]
    return Recognition.of(card, scores, min_frames=max(lower, default=1))


def _refuse_pickle(path: Path) -> None:
    """Refuse a torch.export archive that could run code when it is loaded: torch falls back to pickle in silence."""
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("_config.json"):
                    entries = json.loads(archive.read(name)).get("config", {})
                    if any(entry.get("use_pickle") for entry in entries.values()):
                        raise InputError(f"{path}: holds pickled objects, which are never loaded; export the run anew")
                elif "/sample_inputs/" in name:
                    torch.load(io.BytesIO(archive.read(name)), weights_only=True)
    except InputError:
        raise
    except Exception as error:
        raise _damaged(path, error) from error


def _open_onnx(path: Path) -> Recognition:
    check_format("onnx")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        # onnxruntime's errors share no base of its own.
        raise _damaged(path, error) from error
    card = Card.from_json(session.get_modelmeta().custom_metadata_map.get(_KEY), path)

    def scores(clip: npt.NDArray[Any]) -> Floats:
        return np.asarray(session.run(["log_probs"], {_input_name(card): clip})[0])

    return Recognition.of(card, scores)
