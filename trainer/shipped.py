"""Where the configurations and recipes lie that come with the code.

python -m trainer.shipped    prints that folder: copy a recipe or a cluster's profile from there
"""

from __future__ import annotations

from pathlib import Path

INSIDE = Path("trainer/_shipped")
"""Where an installation keeps them (setup.py puts them there), relative to the folder that the packages lie in."""

_PACKAGES = Path(__file__).resolve().parents[1]

SHIPPED = _PACKAGES / INSIDE if (_PACKAGES / INSIDE).is_dir() else _PACKAGES
"""Folder that holds accelerate_configs, configs and ds_configs: a checkout, a job's copy of the code, or `INSIDE`."""


def find_shipped(path: str | Path) -> Path:
    """Return the file that is meant: from the working directory, else the one of that name that came with the code."""
    given, shipped = Path(path), SHIPPED / path
    return shipped if not given.exists() and shipped.is_file() else given


if __name__ == "__main__":
    print(SHIPPED)
