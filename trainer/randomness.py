"""Randomness without state: every draw is a pure function of what it is for.

A draw keyed by (seed, epoch, clip) is the same on any rank, in any batch, before or after a restart; there is
no generator whose state a checkpoint would have to carry.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

UInt64s = npt.NDArray[np.uint64]


def clip_keys(ids: Sequence[str]) -> UInt64s:
    """Hash clip ids to 64-bit keys, the same on every machine and in every process."""
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in ids)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def mix(keys: UInt64s, *salts: int) -> UInt64s:
    """Derive new 64-bit keys from keys and salts (finaliser of splitmix64, Steele et al. 2014)."""
    mixed = np.asarray(keys, dtype=np.uint64).copy()
    with np.errstate(over="ignore"):
        for salt in (*salts, 0):
            mixed += np.uint64((salt * 2 + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF)
            mixed ^= mixed >> np.uint64(30)
            mixed *= np.uint64(0xBF58476D1CE4E5B9)
            mixed ^= mixed >> np.uint64(27)
            mixed *= np.uint64(0x94D049BB133111EB)
            mixed ^= mixed >> np.uint64(31)
    return mixed


def uniform(keys: UInt64s, *salts: int) -> npt.NDArray[np.float64]:
    """Draw one number in [0, 1) per key."""
    return (mix(keys, *salts) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def generator(key: int, *salts: int) -> np.random.Generator:
    """Open a generator for many draws that belong to one key."""
    return np.random.Generator(np.random.Philox(key=int(mix(np.array([key], dtype=np.uint64), *salts)[0])))
