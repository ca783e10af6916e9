"""Write the first global batch's gradient, before clipping, and terms to a file: OUT CORPUS RUN BUDGET FLAGS…."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.conftest import TINY
from trainer.assembly import build_run
from trainer.engine import Update, open_engine
from trainer.loss import StepLoss
from trainer.observe.progress import Progress
from trainer.parsing import parse_recipe
from trainer.relief import Reload
from trainer.signals import StopRequest
from trainer.step import train_step


def main(out: str, corpus: str, run_dir: str, budget: str, *more: str) -> None:
    """Run forward and backward of one step, and keep what the optimizer would have got."""
    flags = ["--data_dir", corpus, "--output_dir", run_dir, "--dropout", "0.2", "--max_frames_per_microbatch", budget]
    recipe = parse_recipe([*TINY, *flags, "--batch_size", "10", *more])
    engine = open_engine(recipe)
    run = build_run(recipe, engine, Progress(enabled=False), StopRequest())
    steps = run.loader.steps(
        0, 0, size=run.batch_size, rank=engine.rank, world_size=engine.world_size, budget=run.memory.value
    )
    share, cells = next(steps)
    kept = {}

    def keep(learning_rate: float, max_norm: float) -> Update:
        engine._gradients.finish()  # type: ignore[attr-defined]
        kept.update({name: p.grad.clone() for name, p in engine.module.named_parameters() if p.grad is not None})
        return Update(grad_norm=0.0, applied=True)

    engine.update = keep  # type: ignore[method-assign]
    with Reload(run.loader, share) as reload:
        outcome = train_step(
            engine,
            share,
            cells,
            reload=reload,
            learning_rate=0.0,
            gradient_clip=0.0,
            loss=StepLoss(objective=recipe.objective, distillation=run.distillation),
            stop_requested=False,
        )
    kept |= {f"term/{name}": torch.tensor(value).double() for name, value in outcome.terms.items()}
    steps.close()
    # Its thread would otherwise be met by the end of the process inside a call of the store, which aborts.
    run.relief.close()
    if engine.is_main:
        save_file(kept, Path(out))
    engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
