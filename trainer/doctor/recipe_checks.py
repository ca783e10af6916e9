"""What training would check before its first step, check by check instead of up to the first that fails."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from trainer.data.prepare import TrainingCorpus
from trainer.doctor.corpus import check_corpus, check_feasibility
from trainer.doctor.finding import Finding, skipped
from trainer.doctor.memory import check_checkpoint_space, check_memory
from trainer.doctor.resume import Start, check_resume
from trainer.engine import Engine, open_engine
from trainer.recipe import Recipe

if TYPE_CHECKING:
    from trainer.doctor.ranks import Examination


def check_recipe(examination: Examination, recipe: Recipe) -> None:
    """Make the checks that need a recipe; all ranks must call it."""
    engines: list[Engine] = []
    corpora: list[TrainingCorpus] = []
    start = Start()
    main = examination.rank == 0

    def launch() -> Iterable[Finding]:
        engines.append(open_engine(recipe))
        return [Finding(check="backend", value=engines[0].name)]

    def resume() -> Iterable[Finding]:
        # Every rank reads the checkpoint, as in training; one speaks.
        found = list(check_resume(recipe, start))
        return found if main else [one for one in found if one.verdict == "FAIL"]

    def corpus() -> Iterable[Finding]:
        found = list(check_corpus(recipe, engines[0], start, corpora))
        return found if main else ()

    examination.check("resume state", resume, together=False)
    examination.check("backend", launch)
    if engines:
        examination.check("corpus", corpus)
    else:
        examination.findings.append(skipped("corpus", "the backend did not open"))
    examination.check("CTC feasibility", lambda: check_feasibility(recipe) if main else (), together=False)
    if engines and (recipe.distillation.teacher or recipe.distillation.soft_targets):
        examination.check("teacher", lambda: _check_teacher(recipe, engines[0]))
    if not corpora:
        examination.findings.append(skipped("worst batch", "the corpus could not be read"))
        return
    examination.check("worst batch", lambda: check_memory(recipe, corpora[0], engines[0]))
    examination.check(
        "checkpoint space",
        lambda: check_checkpoint_space(recipe, corpora[0], examination.node) if main else (),
        together=False,
    )


def _check_teacher(recipe: Recipe, engine: Engine) -> Iterable[Finding]:
    """Open the teacher or its soft targets as training does, every byte compared with its manifest."""
    from trainer.distillation_sources import open_source

    source = open_source(recipe, engine)
    return [Finding(check="teacher", value=f"{source.where}: sound")] if source else ()
