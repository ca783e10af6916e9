"""The corpus, checked as training checks it before its first step, and what CTC can learn of it."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.data.opening import OpenCorpus
from trainer.data.prepare import Ranks, TrainingCorpus, prepare_corpus
from trainer.doctor.finding import Finding, shorten
from trainer.doctor.resume import Start
from trainer.errors import InputError, name_some
from trainer.recipe import VIDEO_MODELS, Recipe

_FEW, _MANY = 0.01, 0.5
"""Shares of the training clips that may leave training without a word, and that make training pointless."""
_STRIDES = (4, 2, 1)


def check_corpus(recipe: Recipe, ranks: Ranks, start: Start, kept: list[TrainingCorpus]) -> Iterator[Finding]:
    """Read all features in shares over the ranks; every rank must call it. The corpus is left in `kept`."""
    said: list[str] = []
    corpus = prepare_corpus(
        recipe.corpus,
        recipe.model.total_stride,
        ranks,
        said.append,
        known=start.normalization,
        checked="",
        video=recipe.model.model in VIDEO_MODELS,
    )
    kept.append(corpus)
    how = "packed, index and file sizes checked" if corpus.is_packed else "every file read"
    yield Finding(
        check="corpus",
        value=f"{len(corpus.train)} training and {len(corpus.dev)} dev clips, {len(corpus.vocabulary) - 1} glosses, "
        f"{corpus.train.input_name}; {how}",
    )
    for line in said:
        yield Finding(check="corpus", value=shorten(line.removeprefix("warning: ")), verdict="warn")
    if start.state is not None and start.state.clips_hash != corpus.clips_hash:
        raise InputError(
            f"{recipe.corpus.data_dir}: the training clips are not those of the run ({start.state.num_clips} clips "
            f"then, {len(corpus.train)} now; ids, order, frames or glosses differ); restore the corpus, or start a new "
            "--output_dir (--init_from keeps the weights)"
        )
    yield from check_ranks(recipe, len(corpus.train), ranks.world_size)


def check_ranks(recipe: Recipe, clips: int, world_size: int) -> Iterator[Finding]:
    """Compare the number of ranks with the clips of the corpus and of a step."""
    if world_size > clips:
        raise InputError(
            f"{clips} training clips for {world_size} ranks; start at most as many ranks as there are clips"
        )
    batch = recipe.global_batch_size(world_size)
    idle = max(0, world_size - batch)
    yield Finding(
        check="global batch",
        value=f"{batch} clips on {world_size} rank(s)" + (f": {idle} rank(s) idle" if idle else ""),
        verdict="warn" if idle else "ok",
        mend="use fewer ranks, or a larger --batch_size (or --batch_scaling linear)" if idle else "",
    )


def check_feasibility(recipe: Recipe) -> Iterator[Finding]:
    """Count the training clips whose glosses do not fit their output frames, at the recipe's stride and below it."""
    split = OpenCorpus(recipe.corpus, lambda text: None, video=recipe.model.model in VIDEO_MODELS).split("train")
    if recipe.corpus.max_frames:
        split = split.cut(recipe.corpus.max_frames)
    total, stride = len(split), recipe.model.total_stride
    lost = {one: total - int(split.feasible(one).sum()) for one in _STRIDES if one <= stride}
    infeasible = lost[stride]
    value = f"{infeasible} of {total} training clips have fewer output frames than glosses at total_stride {stride}"
    if not infeasible:
        yield Finding(check="CTC feasibility", value=f"all {total} training clips at total_stride {stride}")
        return
    feasible = split.feasible(stride)
    names = name_some([split.id(index) for index in range(total) if not feasible[index]], limit=5)
    smaller = [f"{count} at {one}" for one, count in lost.items() if one != stride]
    share = infeasible / total
    mend = "they leave training, aloud"
    if share > _FEW:
        mend = "lower --total_stride" if smaller else "check that glosses and frames belong together"
    yield Finding(
        check="CTC feasibility",
        value=f"{value} ({100 * share:.1f} %{''.join(f', {one}' for one in smaller)}): {names}",
        verdict="FAIL" if share > _MANY else "warn" if share > _FEW else "ok",
        mend=mend,
    )
