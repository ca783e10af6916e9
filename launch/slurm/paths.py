"""Paths among the options of a batch job: what was typed where it was launched has to mean the same on the nodes."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from launch.jobs.place import make_absolute
from launch.slurm.options import SlurmOptions

_IMAGES = (".sif", ".sqsh", ".img")
_PATH_SIGNS = ("/", "./", "../", "~")


def settle_paths(options: SlurmOptions) -> SlurmOptions:
    """Make the paths of the options absolute: the job changes to its copy of the code before it uses them."""
    return dataclasses.replace(
        options,
        venv=make_absolute(options.venv),
        conda=make_absolute(options.conda) if "/" in options.conda else options.conda,
        interpreter=_settle_program(options.interpreter),
        container=_settle_image(options.container),
        container_mounts=tuple(map(_settle_mount, options.container_mounts)),
    )


def _settle_program(name: str) -> str:
    """A name alone is a program of PATH, as in a shell."""
    found = shutil.which(name) if name and "/" not in name and not name.startswith("~") else None
    return make_absolute(found or name)


def _settle_image(image: str) -> str:
    """An image is a file by its look, or because it is there; anything else is the name of one in a registry."""
    if "#" in image and not image.startswith(_PATH_SIGNS):
        return image
    is_file = image.startswith(_PATH_SIGNS) or image.endswith(_IMAGES) or bool(image and Path(image).exists())
    return make_absolute(image) if is_file else image


def _settle_mount(mount: str) -> str:
    source, colon, rest = mount.partition(":")
    # No folder, but a file system that the container is to have of its own.
    return mount if source == "tmpfs" else make_absolute(source) + colon + rest
