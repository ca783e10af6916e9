"""One rank of the memory benchmark: a few steps of the real trainer, measured from before its model is made.

Started by `memory.py` as `accelerate launch` starts a run: the backend comes from the environment, the recipe from the
command line. Writes `rank<R>.json` to the recipe's output folder.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import numpy as np

# Run as a file, Python looks beside the file and not where the packages are.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.assembly import make_training_loader
from trainer.data.prepare import TrainingCorpus, prepare_corpus
from trainer.engine import Engine, open_engine
from trainer.loss import StepLoss
from trainer.memory.accounting import PeakMeter, in_use, resident_files
from trainer.memory.cells import loss_of, random_cell
from trainer.models.build import build_model
from trainer.optimization import make_optimizer
from trainer.parsing import parse_recipe
from trainer.passes import Passes
from trainer.recipe import Recipe
from trainer.relief import Reload


def main() -> int:
    """Measure, and write what was found."""
    recipe = parse_recipe(sys.argv[1:])
    engine = open_engine(recipe)
    corpus = prepare_corpus(recipe.corpus, recipe.model.total_stride, engine, lambda text: None, known=None, checked="")
    load_code(recipe, corpus)
    files, before = resident_files(), in_use(engine.device)
    phases = measure(recipe, engine, corpus, recipe.run.max_steps)
    found = {"rank": engine.rank, "phases": phases, "library_pages": resident_files() - files, "before": before}
    (Path(recipe.run.output_dir) / f"rank{engine.rank}.json").write_text(json.dumps(found))
    engine.close()
    return 0


def load_code(recipe: Recipe, corpus: TrainingCorpus) -> None:
    """Make a pass of a model of a few thousand weights: what code takes is no part of what a model takes."""
    if "DEEPSPEED" in "".join(name for name in os.environ if name.startswith("ACCELERATE_USE_")):
        from trainer.engine.zero import import_deepspeed

        import_deepspeed()
    dim, classes, stride = corpus.normalization.feature_dim, len(corpus.vocabulary), recipe.model.total_stride
    model = build_model(dataclasses.replace(recipe.model, width=0.02, rnn_size=8), feature_dim=dim, num_classes=classes)
    cell = random_cell(
        np.array([2 * stride, stride]),
        total_stride=stride,
        feature_dim=dim,
        num_classes=classes,
        device=next(model.parameters()).device,
    )
    optimizer = make_optimizer(model, recipe.optimization)
    loss_of(model.outputs(cell.features, cell.layout), cell, recipe.objective).backward()
    optimizer.step()


def measure(recipe: Recipe, engine: Engine, corpus: TrainingCorpus, steps: int) -> dict[str, int]:
    """Return the peak of each phase in bytes, beyond what was in use before there was a model."""
    phases: dict[str, int] = {}
    with PeakMeter(engine.device) as meter:
        before = meter.start
        model = build_model(
            recipe.model, feature_dim=corpus.normalization.feature_dim, num_classes=len(corpus.vocabulary)
        )
        engine.prepare(model, recipe.optimization)
        engine.training(True)
        loader = make_training_loader(recipe, corpus, engine)
    phases["prepare"] = meter.peak - before
    done = 0
    for epoch in range(steps):
        shares = loader.steps(
            epoch,
            0,
            size=recipe.global_batch_size(engine.world_size),
            rank=engine.rank,
            world_size=engine.world_size,
            budget=int(recipe.batch.max_frames_per_microbatch),
        )
        for share, cells in shares:
            done += 1
            with Reload(loader, share) as reload:
                # The two halves of `train_step`, measured apart.
                with PeakMeter(engine.device) as meter:
                    Passes(engine, share, reload, StepLoss(objective=recipe.objective)).run(cells)
                phases[f"passes {done}"] = meter.peak - before
                with PeakMeter(engine.device) as meter:
                    update = engine.update(1e-4, recipe.optimization.gradient_clip)
                phases[f"update {done}"] = meter.peak - before
                assert update.applied, "the step was skipped: what it takes was not measured"
            if done == steps:
                shares.close()
                return phases
    raise AssertionError("an epoch has a step at least")


if __name__ == "__main__":
    status = main()
    # All is written and closed: a library's thread that still runs must not abort what has ended well.
    sys.stdout.flush()
    os._exit(status)
