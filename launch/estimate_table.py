"""What `signscale estimate` prints: a row per backend and world size, and what the figures mean."""

from __future__ import annotations

from typing import Any

_HEADINGS = (
    *("ranks", "backend", "parameters", "gradients", "optimizer", "buffers"),
    *("activations", "read ahead", "sum", "host", "fits"),
)


def format_report(report: dict[str, Any]) -> str:
    extra, teacher = report["auxiliary_parameters"], report["teacher_bytes"]
    lines = [
        f"{report['parameters'] / 1e6:.1f} M parameters in float32 ({report['source']}), {report['optimizer']}, "
        f"{report['budget']} frames a micro-batch at most, the longest clip has {report['longest_clip']}",
        *([f"{extra / 1e6:.2f} M of them for training alone"] if extra else []),
        *([f"the teacher's weights take {_mega(teacher)} MB of every rank, in the sum"] if teacher else []),
        "",
    ]
    table = [_HEADINGS, *(_cells(row) for row in report["rows"])]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
    return "\n".join([*lines, "", *_notes(report)])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    fits = {None: "-", True: "yes", False: "no"}[row["fits"]]
    return (
        f"{row['world_size']}",
        row["backend"],
        *(_mega(row[name]) for name in ("parameters", "gradients", "optimizer")),
        _mega(max(row["buffers_in_passes"], row["buffers_in_update"])),
        "-" if row["activations"] is None else _mega(row["activations"]),
        _mega(row["read_ahead"]),
        _mega(row["sum"]),
        _mega(row["host"]),
        fits,
    )


def _mega(count: float) -> str:
    return f"{count / 1e6:,.0f}"


def _notes(report: dict[str, Any]) -> list[str]:
    """Say what was measured, what is estimated, and what to do."""
    code = "the CUDA context (some 500 MB)" if report["device"] == "cuda" else "the code of torch (some 400 MB)"
    notes = [
        "MB per rank. buffers: gathered weights and reductions, in passes or in the update, whichever is more. read\n"
        f"ahead: features of the cells to come. sum: the larger of the two moments, without {code}\n"
        "and fragmentation. host: what CPU offload keeps there, per rank."
    ]
    if any(row["backend"] == "ZeRO-2" for row in report["rows"]):
        notes.append(
            "ZeRO-2 keeps the local gradient whole until the step, so that passes can be made again: it saves what\n"
            "ZeRO-1 saves."
        )
    measured = report["measured"]
    if measured is None:
        notes.append("Activations were not measured (--no-measure): the sum leaves them out.")
    else:
        notes.append(
            f"Activations: {measured['per_slot'] / 1e3:.1f} kB a frame and {measured['fixed'] / 1e6:.0f} MB a pass, "
            "counted in passes of this model on this machine's\n"
            "CPU, tensor by tensor, so for any device; kernels' own workspaces are not in it. The rest is estimated "
            "from the size\nof the model and how each backend works."
        )
    if not report["shipped_configurations"]:
        notes.append("ZeRO with DeepSpeed's default buffers: there is no configuration in ds_configs/.")
    for chosen in report["recommendations"]:
        ranks = f"{chosen['world_size']} rank(s)"
        if chosen["rung"] is None:
            notes.append(f"{ranks}: {chosen['why']}")
            continue
        flags = f"--max_frames_per_microbatch {chosen['max_frames_per_microbatch']}"
        if chosen["activation_checkpointing"]:
            flags += " --activation_checkpointing true"
        notes.append(f"{ranks}: {chosen['rung']} ({chosen['backend']}, {flags})")
    return notes
