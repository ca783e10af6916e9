"""A trainer without torch: numbered steps, checkpoints under the fence, a last word; for tests of what surrounds one.

Ranks meet over TCP at MASTER_ADDR:MASTER_PORT and wait for one another in every step without a limit, as collectives
do: a rank that is gone without a farewell makes the others hang. The "weights" are a chain of hashes over the steps, so
that a step left out, repeated or computed by other ranks changes all that follows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import socket
import struct
import sys
import time
from pathlib import Path

from trainer.errors import TrainingFailedError
from trainer.files import write_json
from trainer.job.directory import read_lines
from trainer.job.rank import Job, find_job

START = hashlib.sha256(b"start").hexdigest()
FINISH = "FINISH"
"""File in the run's folder: the next step is the last."""
REFUSED = 77
"""Exit code of an attempt that may not publish any more."""


def follow(weights: str, step: int, contributions: int) -> str:
    """Return the weights after a step."""
    return hashlib.sha256(f"{weights} {step} {contributions}".encode()).hexdigest()


def expected(steps: int, world_size: int) -> str:
    """Return the weights after all steps, each done once by all ranks."""
    weights = START
    for step in range(1, steps + 1):
        weights = follow(weights, step, sum((rank + 1) * step for rank in range(world_size)))
    return weights


class Ranks:
    """The other ranks: rank 0 adds up what all send it and answers with the sums."""

    def __init__(self, rank: int, world_size: int, address: str, port: int) -> None:
        self.rank, self.world_size = rank, world_size
        self._peers: list[socket.socket] = []
        if world_size == 1:
            return
        if rank == 0:
            with socket.create_server(("", port)) as server:
                self._peers = [server.accept()[0] for _ in range(world_size - 1)]
        else:
            self._peers = [self._reach(address, port)]

    def sum(self, *values: int) -> tuple[int, ...]:
        """Add up over the ranks; waits for all of them, for as long as it takes."""
        form = struct.Struct(f"!{len(values)}q")
        if self.rank == 0:
            received = [form.unpack(self._read(peer, form.size)) for peer in self._peers]
            totals = tuple(map(sum, zip(values, *received, strict=True)))
            for peer in self._peers:
                peer.sendall(form.pack(*totals))
            return totals
        self._peers[0].sendall(form.pack(*values))
        return form.unpack(self._read(self._peers[0], form.size))

    @staticmethod
    def _reach(address: str, port: int) -> socket.socket:
        deadline = time.monotonic() + 60
        while True:
            try:
                reached = socket.create_connection((address, port), timeout=5)
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
            else:
                reached.settimeout(None)
                return reached

    @staticmethod
    def _read(peer: socket.socket, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = peer.recv(size - len(data))
            if not more:
                raise ConnectionError("Connection closed by peer")
            data += more
        return data


def train(options: argparse.Namespace, ranks: Ranks, job: Job) -> int:
    """Do the steps that are left."""
    requested: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: requested.append(number))
    folder = options.output_dir / "checkpoints"
    step, weights = _load(folder)
    print(f"rank {ranks.rank} of {ranks.world_size} on {socket.gethostname()} starts at step {step}", flush=True)
    begun, last = step, options.steps
    while step < last:
        time.sleep(options.step_seconds)
        if step - begun >= options.fail_after:
            raise RuntimeError(f"this attempt fails after {options.fail_after} steps")
        stop = not options.deaf and (bool(requested) or (ranks.rank == 0 and job.directory.stop.exists()))
        finish = ranks.rank == 0 and (options.output_dir / FINISH).exists()
        total, stops, finishes = ranks.sum((ranks.rank + 1) * (step + 1), int(stop), int(finish))
        step += 1
        weights = follow(weights, step, total)
        last = step if finishes else last
        leaving = stops > 0 and step < last
        if leaving or step % options.save_every == 0 or step == last:
            if ranks.rank == 0:
                _save(folder, step, weights, job)
            ranks.sum(0)
        if leaving:
            if ranks.rank == 0:
                job.leave_word("RESUME", step=step, reason=f"stopped on request at step {step}", code=0)
            return 0
    if ranks.rank == 0:
        job.leave_word("DONE", step=step, reason=f"all {step} steps are done", code=0)
    return 0


def _load(folder: Path) -> tuple[int, str]:
    try:
        name = json.loads((folder / "last.json").read_text())["checkpoint"]
    except FileNotFoundError:
        return 0, START
    return int(name.removeprefix("step-")), json.loads((folder / name / "weights.json").read_text())


def _save(folder: Path, step: int, weights: str, job: Job) -> None:
    """Publish, if this attempt still may: the trainer's own check decides; the test finds both noted."""
    saves = folder.parent / "saves.jsonl"
    job.look_at_limit()
    facts = {"attempt": job.attempt, "step": step, "end_time": job.end_time}
    try:
        job.check()
    except TrainingFailedError as error:
        note(saves, **facts, published=False, time=time.time())
        print(f"step {step}: {error}", flush=True)
        sys.exit(REFUSED)
    note(saves, **facts, published=True, time=time.time())
    final = folder / f"step-{step:09d}"
    final.mkdir(parents=True, exist_ok=True)
    write_json(final / "weights.json", weights)
    write_json(folder / "last.json", {"checkpoint": final.name, "value": None})


def note(path: Path, **fields: object) -> None:
    """Append a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(fields) + "\n")


def saves(run: Path) -> list[dict[str, object]]:
    """Read what was published, and what an older attempt tried to."""
    return read_lines(run / "saves.jsonl")


def main() -> int:
    """Train as one rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=sys.maxsize, help="default: until there is FINISH")
    parser.add_argument("--step_seconds", type=float, default=0.1)
    parser.add_argument("--save_every", type=int, default=5)
    parser.add_argument("--fail_after", type=int, default=sys.maxsize, help="steps of an attempt, then raise")
    parser.add_argument("--deaf", action="store_true", help="do not leave when asked to")
    parser.add_argument("--mistake", default="", help="leave as after a mistake of the user's")
    options, _ = parser.parse_known_args()
    job = find_job()
    assert isinstance(job, Job)
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    world_size = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")))
    if options.mistake:
        if rank == 0:
            job.leave_word("FAILED", step=None, reason=options.mistake, code=2)
        else:
            # As in the trainer: whoever leaves first takes the others along, and rank 0 has something to say.
            time.sleep(30)
        return 2
    ranks = Ranks(rank, world_size, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    return train(options, ranks, job)


if __name__ == "__main__":
    sys.exit(main())
