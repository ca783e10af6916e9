"""What a check found, and how a check that itself breaks becomes a finding like any other."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from trainer.errors import InputError

Verdict = Literal["ok", "warn", "FAIL", "skipped"]
_LONGEST = 400


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the doctor's table."""

    check: str
    """What was looked at."""
    value: str
    """What was found there."""
    verdict: Verdict = "ok"
    """FAIL: training would break or be wrong; warn: it would be slow, or may break; skipped: not looked at."""
    mend: str = ""
    """What to do about it."""
    nodes: tuple[str, ...] = ()
    """Nodes whose fault it is; empty where it is nobody's or everybody's."""

    def to_json(self) -> dict[str, Any]:
        """Return the finding as JSON takes it."""
        return asdict(self) | {"nodes": list(self.nodes)}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Finding:
        """Read what `to_json` wrote."""
        return cls(**{**stored, "nodes": tuple(stored["nodes"])})


def guarded(check: str, act: Callable[[], Iterable[Finding]], *, node: str | None = None) -> list[Finding]:
    """Make a check; a user's mistake that it meets, or a failure of its own, is a finding and hides no other check."""
    nodes = (node,) if node else ()
    found: list[Finding] = []
    try:
        found += act()
    except InputError as error:
        for problem in error.problems:
            value, _, mend = problem.rpartition("; ")
            found.append(Finding(check=check, value=value or mend, verdict="FAIL", mend=mend, nodes=nodes))
    except Exception as error:
        found.append(broken(check, error, nodes=nodes))
    return found


def broken(check: str, error: Exception, *, nodes: tuple[str, ...] = ()) -> Finding:
    """Describe a check that broke: the exception and the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return Finding(
        check=check,
        value=f"the check broke: {type(error).__name__}: {shorten(str(error))}{where}",
        verdict="FAIL",
        mend="mend what the message names; if it names nothing of yours, report it",
        nodes=nodes,
    )


def join_alike(findings: Sequence[Finding]) -> list[Finding]:
    """Make one line of what was found right on many nodes; what was not keeps a line a node."""
    joined: list[Finding] = []
    seen: set[str] = set()
    counts = Counter(one.check for one in findings if one.verdict == "ok")
    for one in findings:
        if one.verdict == "ok" and counts[one.check] > 1:
            if one.check not in seen:
                joined.append(replace(one, value=f"{one.value} (and {counts[one.check] - 1} more)", nodes=()))
            seen.add(one.check)
        else:
            joined.append(one)
    return joined


def skipped(check: str, why: str) -> Finding:
    """Say that a check was not made, and why."""
    return Finding(check=check, value=why, verdict="skipped")


def shorten(text: str) -> str:
    """Bring a message of any size to one line of a table."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"


def any_failed(findings: Sequence[Finding]) -> bool:
    """Tell whether anything stands in the way of training."""
    return any(one.verdict == "FAIL" for one in findings)


def size(count: float) -> str:
    """Write bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
