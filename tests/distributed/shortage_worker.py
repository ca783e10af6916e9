"""Train as `trainer.train` does, with memory that runs out where the environment says.

SHORTAGES: JSON list of {"rank", "stage": forward | backward | validation | loading | update, "calls": [numbers] or
"all", "above": clips, "first_attempt_only"}: the calls of that stage on that rank, counted from 0 over the process, in
which memory runs out if the cell has more clips than `above`. An update breaks off with its weights half-way.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import trainer.engine.replicated
import trainer.train
from trainer.engine import Engine
from trainer.exits import exit_on_input_error


def main() -> int:
    """Patch the engine's passes, then train."""
    counts = {"forward": 0, "backward": 0, "validation": 0, "loading": 0, "update": 0}
    plans = json.loads(os.environ["SHORTAGES"])
    once = os.environ.get("SIGNSCALE_RUNGS")

    def run_out(stage: str, rank: int, size: int) -> None:
        number = counts[stage]
        counts[stage] += 1
        for plan in plans:
            if plan["rank"] != rank or plan["stage"] != stage or (once and plan.get("first_attempt_only")):
                continue
            if (plan["calls"] == "all" or number in plan["calls"]) and size > plan.get("above", 0):
                raise torch.OutOfMemoryError(f"injected in call {number} of {stage}")

    def patch(kind: type[Engine]) -> None:
        forward = kind.forward

        def short_forward(self: Any, features: torch.Tensor, layout: Any) -> torch.Tensor:
            size = len(layout.output_lengths) if layout.length > 8 else 0
            if not torch.is_grad_enabled():
                run_out("validation", self.rank, size)
                return forward(self, features, layout)
            run_out("forward", self.rank, size)
            blocks = self.module.blocks()

            def watch(module: Any, inputs: Any, output: torch.Tensor) -> None:
                # In the middle of the backward pass: some weights have their gradient, others do not.
                output.register_hook(lambda gradient: run_out("backward", self.rank, size))

            handle = blocks[len(blocks) // 2].register_forward_hook(watch)
            try:
                return forward(self, features, layout)
            finally:
                handle.remove()

        kind.forward = short_forward  # type: ignore[method-assign]

    from trainer.data.cells import CellLoader
    from trainer.engine.replicated import ReplicatedEngine
    from trainer.engine.sharded import ShardedEngine
    from trainer.engine.zero import ZeroEngine

    load = CellLoader._load

    def short_load(self: Any, plan: Any) -> Any:
        # Those of an evaluation are to be verified.
        if not plan.verify:
            run_out("loading", int(os.environ["RANK"]), len(plan.clips))
        return load(self, plan)

    CellLoader._load = short_load  # type: ignore[method-assign]

    def leave_half_way(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        try:
            run_out("update", int(os.environ["RANK"]), 1)
        except torch.OutOfMemoryError:
            with torch.no_grad():
                for group in optimizer.param_groups:
                    for parameter in group["params"][::2]:
                        parameter.mul_(1.5)
            raise

    def short_step(optimizer: torch.optim.Optimizer) -> None:
        plain_step(optimizer)
        leave_half_way(optimizer)

    # Data parallelism takes its step without torch's hooks.
    plain_step = trainer.engine.replicated.plain_step
    trainer.engine.replicated.plain_step = short_step
    register_optimizer_step_post_hook(leave_half_way)
    for kind in (ReplicatedEngine, ShardedEngine, ZeroEngine):
        patch(kind)
    return trainer.train.main()


if __name__ == "__main__":
    exit_on_input_error(main)
