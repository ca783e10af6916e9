"""Start: the processor time that a process takes from its beginning to its first step, and what it is spent on.

A tiny recipe on a tiny corpus, so that nearly all of it is start. The same with torch's compiler loaded, as an
optimizer of torch would load it, and the imports alone. The ways take turns in every round; a ratio is the median of
the ratios round by round. One thread. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TINY = ("--width", "0.02", "--rnn_size", "12", "--rnn_layers", "1", "--max_steps", "1", "--train_wer_clips", "0")
TRAIN = "import runpy; runpy.run_module('trainer.train', run_name='__main__', alter_sys=True)"
WAYS = {
    "to the first step": TRAIN,
    "to the first step, the compiler loaded": f"import torch._dynamo; {TRAIN}",
    "import of trainer.train": "import trainer.train",
    "import of torch": "import torch",
    "import of the compiler, torch included": "import torch._dynamo",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="times that each way is measured, in turn (default 5)")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: expected 1 or more")
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    spent: dict[str, list[float]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        corpus, run = Path(folder) / "corpus", Path(folder) / "run"
        start("from launch.cli import main; main()", ["synth", "--clips", "20", "--out", str(corpus)])
        flags = ["--data_dir", str(corpus), "--output_dir", str(run), "--trackers", "[]", *TINY]
        for number in range(args.rounds + 1):
            for name, code in WAYS.items():
                shutil.rmtree(run, ignore_errors=True)
                seconds = start(code, flags if TRAIN in code else [])
                # The round before the first warms caches up.
                if number:
                    spent[name].append(seconds)
    whole = spent["to the first step"]
    figures: dict[str, float] = {}
    print(f"\n{'':<44}{'CPU seconds':>14}{'of a start':>12}")
    for name, seconds in spent.items():
        ratio = statistics.median(own / all_of_it for own, all_of_it in zip(seconds, whole, strict=True))
        print(f"{name:<44}{statistics.median(seconds):>14.2f}{ratio:>12.2f}")
        figures[name.replace(",", "").replace(" ", "_")] = round(ratio, 3)
    print(f"\nload {os.getloadavg()[0]:.1f}")
    print(json.dumps(figures | {"seconds": round(statistics.median(whole), 3)}))
    return 0


def start(code: str, arguments: Sequence[str]) -> float:
    """Run a process of its own to its end and return the processor seconds that it took."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{code}: exit code {done.returncode}\n{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


if __name__ == "__main__":
    raise SystemExit(main())
