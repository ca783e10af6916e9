"""Profiles: what a cluster always wants, in a YAML file, so that nobody repeats it."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

import yaml

from launch.slurm.options import FIELDS, SlurmOptions
from trainer.errors import InputError
from trainer.shipped import SHIPPED


def find_profile(name: str | None) -> Path | None:
    """Find a profile by name or path; without a name, `default` of the user's own where there is one."""
    own = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "signscale" / "clusters"
    shipped = SHIPPED / "configs" / "clusters"
    if name is None:
        return own / "default.yaml" if (own / "default.yaml").exists() else None
    if "/" in name or name.endswith((".yaml", ".yml")):
        return Path(name).absolute()
    candidates = [own / f"{name}.yaml", shipped / f"{name}.yaml"]
    for path in candidates:
        if path.exists():
            return path
    known = sorted({path.stem for folder in (own, shipped) for path in folder.glob("*.yaml")})
    raise InputError(
        f"--profile {name}: there is no {' and no '.join(map(str, candidates))}; "
        + (f"known are {', '.join(known)}" if known else "write one, or give a path")
    )


def read_profile(path: Path) -> dict[str, Any]:
    """Read a profile's options. Raises `InputError` with every unknown key and wrong type."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot read the profile ({error.strerror}); check --profile") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected lines of `key: value`, found a {type(content).__name__}")
    values: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in content.items():
        if key not in FIELDS:
            nearest = difflib.get_close_matches(str(key).replace("-", "_"), FIELDS, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else "`signscale launch slurm --help` lists what there is"
            problems.append(f"{path}: unknown key {key!r}; {hint}")
            continue
        try:
            values[key] = _convert(FIELDS[key].default, value)
        except (TypeError, ValueError) as error:
            problems.append(f"{path}: {key}: {error}")
    if problems:
        raise InputError(problems)
    return values


def merge(profile: dict[str, Any], flags: dict[str, Any]) -> SlurmOptions:
    """Put flags over a profile; what may be given again is added to what the profile has."""
    values = dict(profile)
    for key, value in flags.items():
        values[key] = (*values.get(key, ()), *value) if isinstance(FIELDS[key].default, tuple) else value
    return SlurmOptions(**values)


def _convert(default: Any, value: Any) -> Any:
    if isinstance(default, tuple):
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not all(isinstance(item, str | int | float) for item in items):
            raise TypeError(f"expected a text, or a list of them, found {value!r}")
        return tuple(map(str, items))
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise TypeError(f"expected true or false, found {value!r}")
        return value
    if isinstance(default, int):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"expected a whole number, found {value!r}")
        return value
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise TypeError(f'expected a text, found {value!r}; write it in quotes: "{value}"')
    return str(value)
