"""The GPU benchmark's report as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_MEMORY = {"between_steps_bytes": "between steps", "peak_bytes": "peak of a step"}


def render(report: dict[str, Any]) -> str:
    """Lay the report out as tables; what was skipped or failed stands below, with its reason."""
    sections = report["sections"]
    lines = _machine(report)
    lines += _table(
        "Losses against one process in float32",
        ("", "largest difference", "bar", "skipped steps", *(f"{title}, MB" for title in _MEMORY.values())),
        (
            (
                name,
                _number(figures.get("largest_difference"), ".1e", "reference"),
                _number(figures.get("bar"), ".0e"),
                _number(figures.get("skipped_steps"), "d"),
                *(_number(figures.get(key), ".0f", scale=1e-6) for key in _MEMORY),
            )
            for name, figures in _ran(sections, "correctness")
        ),
    )
    lines += _table(
        "Memory that runs out",
        ("", "largest difference of losses", "limit, MB", "needed without it, MB", "shortages"),
        (
            (
                name,
                _number(figures["largest_difference"], ".1e"),
                _number(figures["limit_bytes"], ".0f", scale=1e-6),
                _number(figures.get("free_peak_bytes", figures.get("before_bytes")), ".0f", scale=1e-6),
                _number(figures.get("shortages"), "d"),
            )
            for name, figures in _ran(sections, "relief")
        ),
    )
    lines += _table(
        "Throughput of the teacher",
        ("", "clips/s", "frames/s", "over the plain loop", "MFU", "waits for data", "peak, MB"),
        (
            (
                name,
                _number(figures["clips_per_second"], ".1f"),
                _number(figures["frames_per_second"], ".0f"),
                _number(figures.get("over_plain_loop"), ".2f"),
                _number(figures["mfu"], ".3f"),
                _number(figures["data_wait_fraction"], ".3f"),
                _number(figures["peak_bytes"], ".0f", scale=1e-6),
            )
            for name, figures in _ran(sections, "throughput")
            if "clips_per_second" in figures
        ),
    )
    lines += ["**Time and gaps**", ""]
    for name, section in sections.items():
        lines.append(f"- {name}: {section['status']}, {section['seconds']} s of {section['limit_seconds']:.0f} s")
        for part, found in section["parts"].items():
            if found["why"]:
                first, *rest = found["why"].splitlines()
                lines.append(f"  - {part}: {found['status']}: {first}")
                lines += [f"        {line}" for line in rest]
    return "\n".join(lines) + "\n"


def _machine(report: dict[str, Any]) -> list[str]:
    found = report["sections"]["machine"]["parts"]["device"]["figures"]
    named = [f"{key} {value}" for key, value in found.items() if key not in ("device", "memory_bytes", "free_bytes")]
    lines = [f"Device: **{found.get('device', 'unknown')}** ({', '.join(named)}); {report['sizes']} sizes.", ""]
    if not report["on_gpu"]:
        lines += ["No GPU: memory is the resident memory of the whole process, speeds say nothing.", ""]
    return lines


def _ran(sections: dict[str, Any], name: str) -> list[tuple[str, dict[str, Any]]]:
    parts = sections.get(name, {}).get("parts", {})
    return [(part, found["figures"]) for part, found in parts.items() if found["status"] == "ok"]


def _table(title: str, header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    cells = list(rows)
    if not cells:
        return []
    ruled = [f"|{'---|' * len(header)}", *(f"| {' | '.join(row)} |" for row in cells)]
    return [f"**{title}**", "", f"| {' | '.join(header)} |", *ruled, ""]


def _number(value: float | None, form: str, missing: str = "", scale: float = 1.0) -> str:
    if value is None:
        return missing
    return format(value * scale if scale != 1.0 else value, form)
