"""Times and tables for people."""

from __future__ import annotations

import time
from collections.abc import Sequence


def say_duration(seconds: float) -> str:
    """Write seconds as 45 s, 2 min 5 s, 12 min, 3 h 20 min, 2 d 4 h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes = whole // 60
    if minutes < 10:
        return f"{minutes} min {whole % 60} s" if whole % 60 else f"{minutes} min"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def say_time(moment: float, now: float) -> str:
    """Write Unix seconds as local time, with the date where it is not today's."""
    there, here = time.localtime(moment), time.localtime(now)
    return time.strftime("%H:%M:%S" if there[:3] == here[:3] else "%Y-%m-%d %H:%M", there)


def say_ago(moment: float, now: float) -> str:
    """Write how long ago Unix seconds were."""
    return f"{say_duration(now - moment)} ago"


def lay_out(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align the columns of a table; the last one is as wide as it likes."""
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[-1] = 0
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
