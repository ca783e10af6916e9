"""The header of an npy file, read without compiling it as Python.

NumPy evaluates the header with `ast.literal_eval`, which fails at random when several threads do so at once on
CPython before 3.11.9 ("AST constructor recursion depth mismatch", python/cpython#106905). Loaders read in threads.
Source of the format: NumPy Enhancement Proposal 1 and numpy.lib.format.
"""

from __future__ import annotations

import re
import struct
from typing import IO, NamedTuple

import numpy as np

_MAGIC = b"\x93NUMPY"
_LENGTHS = {1: "<H", 2: "<I", 3: "<I"}
_LONGEST = 1 << 20
_DESCR = re.compile(r"'descr'\s*:\s*(?:'(?P<plain>[^']*)'|(?P<other>\[.*?\]\s*(?=,\s*'|\})))", re.DOTALL)
_ORDER = re.compile(r"'fortran_order'\s*:\s*(True|False)\b")
_SHAPE = re.compile(r"'shape'\s*:\s*\(\s*((?:\d+L?\s*,\s*)*(?:\d+L?\s*)?)\)")


class NpyHeader(NamedTuple):
    """What an npy file says of its array."""

    shape: tuple[int, ...]
    dtype: np.dtype
    """Of an array of records: void, since its fields are nothing this project reads."""
    fortran_order: bool
    size: int
    """Bytes before the data."""


def read_npy_header(file: IO[bytes]) -> NpyHeader:
    """Read the header at the start of `file`, which is left where the data begins.

    Raises `ValueError` for what is no npy file, or one cut short.
    """
    magic = file.read(8)
    if magic[:6] != _MAGIC or len(magic) < 8:
        raise ValueError("no npy header")
    if magic[6] not in _LENGTHS:
        raise ValueError(f"npy format version {magic[6]}.{magic[7]} is not known")
    kind = _LENGTHS[magic[6]]
    width = struct.calcsize(kind)
    prefix = file.read(width)
    if len(prefix) < width:
        raise ValueError("the npy header is cut short")
    length = struct.unpack(kind, prefix)[0]
    if length > _LONGEST:
        raise ValueError(f"an npy header of {length} bytes is too long")
    raw = file.read(length)
    if len(raw) < length:
        raise ValueError("the npy header is cut short")
    text = raw.decode("utf-8" if magic[6] == 3 else "latin-1")
    descr, order, shape = _DESCR.search(text), _ORDER.search(text), _SHAPE.search(text)
    if descr is None or order is None or shape is None:
        raise ValueError(f"the npy header {text.strip()[:80]!r} is damaged")
    return NpyHeader(
        shape=tuple(int(number.strip().rstrip("L")) for number in shape[1].split(",") if number.strip()),
        dtype=np.dtype(np.void) if descr["plain"] is None else _dtype(descr["plain"]),
        fortran_order=order[1] == "True",
        size=8 + width + length,
    )


def _dtype(name: str) -> np.dtype:
    try:
        return np.dtype(name)
    except TypeError as error:
        raise ValueError(f"the npy header names a type {name!r} that there is not") from error
