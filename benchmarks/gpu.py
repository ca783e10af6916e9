"""One NVIDIA GPU, under ten minutes: are the losses right, is memory that runs out survived, how fast is it.

    python benchmarks/gpu.py --out gpu.json --markdown gpu_figures.md

Sections, each under a time limit, each run in processes of its own:

- machine: device, driver, versions.
- corpus: synthetic, written for this benchmark and packed to float16: PHOENIX-2014's lengths, 6,516 features a frame.
- correctness: losses of the full-width teacher in bf16, fp16 and under ZeRO-2, ZeRO-3, ZeRO-2 with the optimizer on the
  host, and FSDP2, against one process in float32. The memory of each comes with it.
- relief: the allocator is given less memory than a batch, a clip, or the optimizer's states need. The run must go on by
  itself, one rung of the ladder lower, with the losses of a run that had all the memory.
- throughput: the teacher, and a plain loop over padded random batches.

Without a GPU everything is tiny, no figure says anything about speed, and what needs a GPU is reported as skipped.
Progress goes to stderr, a table to stdout, its last line is JSON. Exit code 1 if anything failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Run as a file, Python looks beside the file and not where the packages are.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu_correctness import BACKENDS, PRECISIONS, check_losses
from gpu_relief import relieve
from gpu_report import render
from gpu_runs import ROOT, Runner, Section, SkippedError
from gpu_sizes import FULL, QUICK, Sizes
from gpu_throughput import measure_throughput

SECTIONS = {"machine": 40.0, "corpus": 100.0, "correctness": 190.0, "relief": 140.0, "throughput": 130.0}
"""Sections and the seconds that each may take on a GPU: ten minutes in all."""
_CPU_PATIENCE = 4.0
"""Times that, where there is none: nobody promised a time there."""
STUDENT = "there is no student model yet"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections, print a table, end with one line of JSON."""
    args = parse_args(argv)
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpu_benchmark_")))
        report = run_sections(args, folder)
    table = render(report)
    print(table)
    if args.markdown:
        args.markdown.write_text(table, encoding="utf-8")
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))
    return 1 if report["status"] == "failed" else 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    variants = [*PRECISIONS, *BACKENDS]
    add("--out", type=Path, help="file for the JSON report, which is also the last line of stdout")
    add("--markdown", type=Path, help="file for the table")
    add("--quick", action="store_true", help="tiny sizes, as without a GPU: to see it run, not to measure")
    add("--sections", nargs="+", choices=list(SECTIONS)[2:], default=list(SECTIONS)[2:], help="what to run")
    add("--variants", nargs="+", choices=variants, default=variants, help="what to compare with float32")
    add("--folder", type=Path, help="empty folder to keep the corpus and all runs in (default: nowhere)")
    args = parser.parse_args(argv)
    if args.folder and args.folder.exists() and any(args.folder.iterdir()):
        parser.error(f"--folder {args.folder}: expected an empty folder, found files in it; name another")
    return args


def run_sections(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run what was asked for and return the report."""
    # A process that never touches the GPU: its memory, and its failures, are those of the runs.
    machine = Section(name="machine", seconds=SECTIONS["machine"])
    asking = Runner(folder=folder, on_gpu=True)
    found = machine.run(
        "device", lambda: asking.json_of([str(ROOT / "benchmarks" / "gpu_machine.py"), "machine"], machine)
    )
    on_gpu = bool(found.figures.get("cuda_available"))
    sizes = FULL if on_gpu and not args.quick else QUICK
    machine.run("what runs", lambda: _what_runs(on_gpu=on_gpu, sizes=sizes))
    runner = Runner(folder=folder, on_gpu=on_gpu)
    sections = [machine]
    if found.status == "ok":
        sections += _measure(args, runner, sizes, found.figures)
    statuses = [section.status for section in sections]
    return {
        "benchmark": "gpu",
        "status": "failed" if "failed" in statuses else "ok",
        "on_gpu": on_gpu,
        "sizes": sizes.name,
        "seconds": round(sum(section.took for section in sections), 1),
        "sections": {section.name: section.to_json() for section in sections},
    }


def _what_runs(*, on_gpu: bool, sizes: Sizes) -> dict[str, Any]:
    if not on_gpu:
        raise SkippedError("no CUDA device: everything runs on the CPU at tiny sizes; speeds and MFU say nothing")
    return {"sizes": sizes.name, "deepspeed": importlib.util.find_spec("deepspeed") is not None}


def _measure(args: argparse.Namespace, runner: Runner, sizes: Sizes, machine: dict[str, Any]) -> list[Section]:
    patience = 1.0 if runner.on_gpu else _CPU_PATIENCE
    corpus = Section(name="corpus", seconds=patience * SECTIONS["corpus"])
    written = corpus.run("synthetic", lambda: sizes.write_corpus(runner, corpus))
    sections = [corpus]
    if written.status != "ok":
        return sections
    acts = {"correctness": check_losses, "relief": relieve, "throughput": measure_throughput}
    for name, act in acts.items():
        if name in args.sections:
            section = Section(name=name, seconds=patience * SECTIONS[name])
            act(runner, section, sizes, machine=machine, variants=args.variants)
            sections.append(section)
    if "throughput" in args.sections:
        sections[-1].run("student", _no_student)
    return sections


def _no_student() -> dict[str, Any]:
    raise SkippedError(STUDENT)


if __name__ == "__main__":
    raise SystemExit(main())
