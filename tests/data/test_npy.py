"""Our reading of npy headers is numpy's, and holds in threads."""

from __future__ import annotations

import io
import sys
import threading
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib import format as npy

from trainer.data.npy import read_npy_header

_DTYPES = ["<f2", "<f4", "<f8", ">f4", "|O", "<i8", "<U5", "|b1", [("a", "<f4"), ("b", "<i2", (2,))]]


@given(
    shape=st.lists(st.integers(0, 5), max_size=4).map(tuple),
    dtype=st.sampled_from(_DTYPES),
    fortran=st.booleans(),
    version=st.sampled_from([(1, 0), (2, 0), (3, 0)]),
)
def test_a_header_is_read_as_numpy_reads_it(
    shape: tuple[int, ...], dtype: object, fortran: bool, version: tuple[int, int]
) -> None:
    file = io.BytesIO()
    array = np.empty(shape, np.dtype(dtype), order="F" if fortran else "C")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        npy.write_array(file, array, version=version)
    file.seek(0)
    found = read_npy_header(file)
    assert file.tell() == found.size
    assert found.shape == array.shape
    # A C-contiguous array that is also Fortran-contiguous is stored as the former.
    assert found.fortran_order == (array.flags.f_contiguous and not array.flags.c_contiguous)
    assert found.dtype.kind == array.dtype.kind
    if isinstance(dtype, str):
        assert found.dtype == array.dtype


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "no npy header"),
        (b"\x93NUMPY\x01\x00", "cut short"),
        (b"\x93NUMPY\x01\x00\xff\x00{'descr'", "cut short"),
        (b"\x93NUMPY\x09\x00\x00\x00", "version 9.0"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff", "too long"),
        (b"\x93NUMPY\x01\x00\x02\x00{}", "damaged"),
        (
            b"\x93NUMPY\x01\x00\x3d\x00{'descr': 'nope', 'fortran_order': False, 'shape': (3, 4), }  \n",
            "no.*'nope'|'nope'",
        ),
    ],
)
def test_what_is_no_header_is_a_value_error(content: bytes, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        read_npy_header(io.BytesIO(content))


def test_headers_are_read_in_threads() -> None:
    file = io.BytesIO()
    np.save(file, np.zeros((7, 3), np.float32))
    content, problems = file.getvalue(), []

    def read() -> None:
        try:
            for _ in range(300):
                assert read_npy_header(io.BytesIO(content)).shape == (7, 3)
        except BaseException as error:
            problems.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=read) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not problems
