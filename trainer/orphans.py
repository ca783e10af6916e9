"""Ranks end with their launcher: one whose launcher was killed would hold its device, and could still publish."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from trainer.job.directory import JOB

_PR_SET_PDEATHSIG = 1
_LAUNCHED = "TORCHELASTIC_RUN_ID"
"""Set by torchrun, and so by accelerate launch on several ranks; a single launched rank is known by its job."""


def end_with_launcher() -> None:
    """Have the kernel kill this rank when the launcher that started it dies (Linux; elsewhere nothing)."""
    if not {_LAUNCHED, JOB} & os.environ.keys() or not sys.platform.startswith("linux"):
        return
    launcher = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != launcher:
        # It died before the kernel knew of the wish.
        os.kill(os.getpid(), signal.SIGKILL)
