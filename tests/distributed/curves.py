"""What runs of one recipe have in common, however many ranks and micro-batches shared their work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.conftest import column


def check_one_curve(runs: Sequence[Path], names: Sequence[str], *, steps: int) -> None:
    """Each named part of the loss is the same in all runs: before the first update to rounding, then nearly so."""
    for name in names:
        expected = np.array(column(runs[0], f"train/{name}"))
        assert len(expected) == steps
        assert expected.min() > 1e-3, "a term that vanishes would agree with anything"
        for run in runs[1:]:
            found = np.array(column(run, f"train/{name}"))
            np.testing.assert_allclose(found[0], expected[0], rtol=2e-6, err_msg=name)
            np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=name)
