"""What the doctor looks at on every rank: devices, all-reduce, and with a recipe all that training checks at its start.

`python -m trainer.doctor.ranks REPORT [flags of train]`, started by the node processes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from trainer.doctor.finding import Finding, broken, guarded, skipped
from trainer.doctor.meeting import Meeting, Phases
from trainer.doctor.node import Options, own_name
from trainer.doctor.rank_stage import RANKS
from trainer.files import write_json
from trainer.orphans import end_with_launcher
from trainer.recipe import Recipe

RECIPE_CHECKS = ("corpus", "CTC feasibility", "worst batch", "resume state")
_MEETING_SECONDS = 60.0


class Examination:
    """The checks of one rank, in an order that all ranks share."""

    def __init__(self, report: Path, options: Options, recipe: Recipe | None) -> None:
        self.report, self.options, self.recipe = report, options, recipe
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.node = own_name()
        self.phases = Phases(report, self.rank)
        self.findings: list[Finding] = []
        self._broken_by: str | None = None

    def run(self) -> None:
        """Make all checks; rank 0 writes what all found."""
        self.phases.enter("importing torch")
        from trainer.engine.processes import meeting_store

        self.phases.enter("meeting the other ranks")
        store = meeting_store("doctor", may_serve=True) if self.world_size > 1 else None
        # A check that takes long on one rank, such as reading a large corpus, may take to the limit.
        self.meeting = Meeting(store, self.rank, self.world_size, seconds=self.options.limit)
        self._check_machines()
        if self.recipe is not None:
            from trainer.doctor.recipe_checks import check_recipe

            check_recipe(self, self.recipe)
        else:
            why = "no recipe given (--config FILE --data_dir DIR)"
            self.findings += [skipped(check, why) for check in RECIPE_CHECKS]
        self._write(done=True)
        # Rank 0 keeps the store: it leaves last.
        self.meeting.exchange("end", self.rank)

    def check(self, name: str, act: Callable[[], Iterable[Finding]], *, together: bool = True) -> None:
        """Make a check on every rank and take in what each of them found.

        `together`: whether it needs all ranks at once; once such a check broke, no other one is made.
        """
        if together and self._broken_by:
            self.findings.append(skipped(name, f"{self._broken_by} broke before"))
            return
        self.phases.enter(name)
        found = guarded(name, act)
        everyone = self.meeting.exchange(name, [one.to_json() for one in found])
        merged = dict.fromkeys(Finding.from_json(one) for mine in everyone for one in mine or [])
        silent = [rank for rank, mine in enumerate(everyone) if mine is None]
        if silent:
            text = f"rank(s) {', '.join(map(str, silent))} did not answer"
            merged[Finding(check=name, value=text, verdict="FAIL", mend=f"read the logs in {self.report}")] = None
        self.findings += merged
        # What was found is not lost with the ranks, should a later check be the end of them.
        self._write(done=False)
        if silent or any(one.value.startswith("the check broke") for one in merged):
            self._broken_by = name

    def end_with(self, finding: Finding) -> None:
        """End the examination with what ended it."""
        self.findings.append(finding)
        self._write(done=True)

    def _write(self, *, done: bool) -> None:
        if self.rank == 0:
            found = [one.to_json() for one in self.findings]
            write_json(self.report / RANKS, {"done": done, "findings": found})

    def _check_machines(self) -> None:
        import torch
        import torch.distributed as dist

        from trainer.doctor.collective import Reduced, check_all_reduce, measure_all_reduce
        from trainer.doctor.devices import RankFacts, check_compute, check_devices, find_rank_facts, measure_compute
        from trainer.engine.processes import meeting_store, runs_on_cpu

        on_cuda = not runs_on_cpu()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_cuda else torch.device("cpu")
        everyone: list[RankFacts] = []

        def look() -> Iterable[Finding]:
            if on_cuda:
                torch.cuda.set_device(device)
            facts = find_rank_facts(self.rank, self.node, device)
            everyone.extend(RankFacts(**one) for one in self.meeting.exchange("facts", facts.to_json()) if one)
            return check_devices(everyone) if self.rank == 0 else ()

        self.check("devices", look, together=False)
        backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"

        def reduce() -> Iterable[Finding]:
            self.phases.enter("joining the process group")
            dist.init_process_group(
                backend,
                store=meeting_store("doctor_ranks"),
                rank=self.rank,
                world_size=self.world_size,
                timeout=timedelta(seconds=self.options.limit),
            )
            self.phases.enter("all-reduce")
            mine = [asdict(one) for one in measure_all_reduce(device, self.rank, self.world_size)]
            found = self.meeting.exchange("reduced", mine)
            if self.rank or any(one is None for one in found):
                return ()
            reduced = [[Reduced(**one) for one in share] for share in found]
            nodes = [one.node for one in everyone]
            return check_all_reduce(reduced, nodes, backend="nccl" if on_cuda else "gloo", on_cuda=on_cuda)

        if self.world_size > 1:
            self.check("all-reduce", reduce)
        else:
            self.findings.append(Finding(check="all-reduce", value="one rank"))

        def compute() -> Iterable[Finding]:
            speeds: list[Any] = self.meeting.exchange("speed", measure_compute(device))
            return [check_compute(everyone, speeds)] if self.rank == 0 and None not in speeds else ()

        if on_cuda:
            self.check("compute", compute)


def main(argv: Sequence[str]) -> int:
    """Examine on this rank; what it finds is told by files alone."""
    end_with_launcher()
    report = Path(argv[0])
    options = Options.read(report)
    recipe = None
    if options.recipe is not None:
        from trainer.parsing import parse_recipe

        recipe = parse_recipe(argv[1:], "signscale doctor")
    examination = Examination(report, options, recipe)
    try:
        examination.run()
    except Exception as error:
        if examination.rank:
            raise
        # What was found until then is not lost.
        examination.end_with(broken("ranks", error))
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of gloo and of a broken group may outlive the interpreter's end.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
