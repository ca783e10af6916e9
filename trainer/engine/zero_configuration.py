"""A DeepSpeed configuration, read strictly: what the engine does not do as it says is an error, never ignored."""

from __future__ import annotations

import difflib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.engine.zero_keys import BELOW_THIRD, ELSEWHERE, FILLED, SECTIONS, TOP_LEVEL, ZERO, Key
from trainer.errors import InputError
from trainer.shipped import SHIPPED

_README = "ds_configs/README.md"


def read_zero_configuration(path: str, gradient_clip: float) -> dict[str, Any]:
    """Return a DeepSpeed configuration that the engine drives as it stands, `FILLED` where the file leaves it out.

    A relative path is looked for from the working directory, then among those that are shipped. Raises one `InputError`
    with everything that is wrong with the file or that this machine lacks for it.
    """
    found = _find(path)
    try:
        content = json.loads(found.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except (OSError, ValueError) as error:
        raise InputError(f"{found}: expected a DeepSpeed configuration in JSON, found: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{found}: expected an object of DeepSpeed's keys, found {_show(content)}; see {_README}")
    problems = list(_problems(content, gradient_clip)) or list(_last_word(content)) or list(_lacking(content))
    if problems:
        raise InputError(f"{found}: {problem}" for problem in problems)
    return {**FILLED, **content}


def _find(path: str) -> Path:
    given = Path(path).expanduser()
    places = [given] if given.is_absolute() else [Path.cwd() / given, SHIPPED / given]
    for place in places:
        if place.is_file():
            return place
    shipped = ", ".join(sorted(found.name for found in (SHIPPED / "ds_configs").glob("*.json")))
    looked = " and ".join(map(str, dict.fromkeys(places)))
    raise InputError(f"deepspeed_config_file: {path} is not there, looked for as {looked}; ds_configs/ has {shipped}")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"{', '.join(twice)} given twice in one object; keep one of them")
    return content


def _problems(content: dict[str, Any], gradient_clip: float) -> Iterator[str]:
    zero = content.get("zero_optimization", {})
    stage = zero.get("stage") if isinstance(zero, dict) else None
    # What depends on a stage is not judged by one that is wrong itself.
    stage = stage if stage in (1, 2, 3) and not isinstance(stage, bool) else None
    yield from _check_keys("", content, TOP_LEVEL, ELSEWHERE, stage)
    if "zero_optimization" not in content:
        yield 'zero_optimization is missing: expected an object such as {"stage": 2}'
    clipping = content.get("gradient_clipping")
    if TOP_LEVEL["gradient_clipping"].fits(clipping) and clipping not in (0, gradient_clip):
        yield (
            f"gradient_clipping: the file says {_show(clipping)}, the recipe {gradient_clip:g}; set it to 0.0 and "
            "say it in the recipe alone (--gradient_clip)"
        )
    if isinstance(zero, dict):
        yield from _check_zero(zero, stage)
    if isinstance(content.get("aio"), dict):
        yield from _check_keys("aio.", content["aio"], SECTIONS["aio"], {}, None)


def _check_zero(zero: dict[str, Any], stage: int | None) -> Iterator[str]:
    known = ZERO if stage in (None, 3) else {**ZERO, **BELOW_THIRD}
    yield from _check_keys("zero_optimization.", zero, known, dict.fromkeys(_not_driven(), "it is not driven"), stage)
    if "stage" not in zero:
        yield "zero_optimization.stage is missing: expected 1, 2 or 3"
    for name in ("offload_optimizer", "offload_param"):
        offload = zero.get(name)
        if not isinstance(offload, dict):
            continue
        where = f"zero_optimization.{name}."
        yield from _check_keys(where, offload, SECTIONS[name], {"cpuadam_cores_perc": "it needs super_offload"}, None)
        device = offload.get("device")
        if device == "nvme" and stage in (1, 2):
            # DeepSpeed keeps it in the host's memory and says nothing.
            yield f"{where}device: stage {stage} does not offload to nvme; use stage 3, or cpu"
        if device == "nvme" and "nvme_path" not in offload:
            yield f"{where}nvme_path is missing: expected a folder on a local NVMe disk"
        if device in ("none", "cpu") and "nvme_path" in offload:
            yield f'{where}nvme_path: does nothing with device {device}; remove it, or set "device": "nvme"'
        if "device" not in offload:
            yield f"{where}device is missing, and without it nothing is offloaded: expected none, cpu or nvme"


def _check_keys(
    where: str, content: dict[str, Any], known: Mapping[str, Key], elsewhere: Mapping[str, str], stage: int | None
) -> Iterator[str]:
    for name, value in content.items():
        if value == "auto" and (name in known or name in elsewhere):
            yield f'{where}{name}: "auto" is filled in by nobody here; write the value, or remove the key'
        elif name in elsewhere:
            yield f"{where}{name}: remove it; {elsewhere[name]}"
        elif name not in known:
            yield f"{where}{name}: unknown key{_nearest(name, [*known, *elsewhere])}"
        elif not known[name].fits(value):
            reason = f"; {known[name].reason}" if known[name].reason else ""
            yield f"{where}{name}: expected {known[name].expected}, found {_show(value)}{reason}"
        elif stage is not None and stage not in known[name].stages:
            stages = " and ".join(map(str, known[name].stages))
            yield f"{where}{name}: does nothing under stage {stage}, only under {stages}; remove it"


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else f"; remove it, or see {_README} for what is driven"


def _show(value: Any) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _not_driven() -> list[str]:
    fields = _zero_model().model_fields
    return [name for name in (field.alias or key for key, field in fields.items()) if name not in ZERO]


def _last_word(content: dict[str, Any]) -> Iterator[str]:
    """Let DeepSpeed judge what ours has passed."""
    from pydantic import ValidationError

    try:
        _zero_model()(**content["zero_optimization"])
    except ValidationError as error:
        for problem in error.errors():
            where = ".".join(map(str, ("zero_optimization", *problem["loc"])))
            yield f"{where}: DeepSpeed refuses {_show(problem['input'])}: {problem['msg']}"


def _lacking(content: dict[str, Any]) -> Iterator[str]:
    """Name what this machine lacks for a right configuration."""
    zero = content["zero_optimization"]
    folders = {
        f"zero_optimization.{name}.nvme_path": zero[name]["nvme_path"]
        for name in ("offload_optimizer", "offload_param")
        if zero.get(name, {}).get("device") == "nvme"
    }
    for where, folder in folders.items():
        yield from _check_folder(where, folder)
    missing = list(_missing_for_asynchronous_io()) if folders else []
    if missing:
        yield (
            "device nvme: DeepSpeed builds its async_io on first use, with a C++ compiler, ninja and libaio's headers "
            f"(libaio-dev or libaio-devel); found no {', no '.join(missing)}; install what is missing, or use "
            '"device": "cpu"'
        )


def _check_folder(where: str, folder: str) -> Iterator[str]:
    path = Path(folder)
    if not path.is_dir():
        yield f"{where}: expected a folder on a local NVMe disk, {folder} is not there; create it, or name another"
        return
    try:
        with tempfile.NamedTemporaryFile(dir=path) as file:
            # async_io reads past the page cache; a file system in memory may not offer that.
            os.close(os.open(file.name, os.O_RDWR | getattr(os, "O_DIRECT", 0)))
    except OSError as error:
        yield f"{where}: expected a folder to write to directly, {folder} answers {error.strerror}; name another"


def _missing_for_asynchronous_io() -> Iterator[str]:
    _prepare_import()
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from torch.utils.cpp_extension import get_cxx_compiler, is_ninja_available

    builder = AsyncIOBuilder()
    if installed_ops.get(builder.name):
        return
    if not is_ninja_available():
        yield "ninja"
    compiler = get_cxx_compiler().split()[0]
    if shutil.which(compiler) is None:
        yield f"C++ compiler ({compiler})"
    elif not builder.is_compatible(verbose=False):
        # It compiles a program that calls libaio.
        yield "libaio"


def _zero_model() -> Any:
    _prepare_import()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return DeepSpeedZeroConfig


def _prepare_import() -> None:
    from trainer.engine.processes import runs_on_cpu

    if runs_on_cpu():
        # DeepSpeed chooses its device as it is imported.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
