"""Extract a teacher's soft targets: `python -m trainer.extract --checkpoint RUN --split train`, on any number of ranks.

Each clip passes through the teacher alone, so that its targets depend on nothing else, to the bit. A run that was
killed goes on where it was when the same command is given again, on as many ranks as there are then.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.checkpoint.content import Checkpoint
from trainer.checkpoint.store import run_folder_of
from trainer.checkpoint.trained import restore_trained
from trainer.data.opening import OpenCorpus
from trainer.data.table import Split
from trainer.distillation_sources import evaluation_loader, measure_wer
from trainer.engine.replicated import ReplicatedEngine
from trainer.errors import InputError
from trainer.exits import Outcome, exit_on_input_error
from trainer.job.rank import find_job
from trainer.objectives.ctc import float32_log_probs
from trainer.observe.progress import Progress
from trainer.opening import corpus_asked_for, open_checkpoint
from trainer.options import OptionParser
from trainer.recipe import VIDEO_MODELS
from trainer.signals import StopRequest
from trainer.softtargets.compression import Compression
from trainer.softtargets.store import (
    Extraction,
    ShardFolder,
    SoftTargets,
    StoredClip,
    checkpoint_fingerprint,
    totals,
)

_ONE_CLIP = 1
"""Budget of a cell in frames that no two clips share."""
_LINES = 10
"""Lines of progress."""


def main(argv: Sequence[str] | None = None) -> Outcome:
    """Parse, build, extract, report; return the exit code."""
    options = parse_options(argv)
    with ExitStack() as stack:
        owner = find_job()
        as_run = {"mixed_precision": options.mixed_precision, "compile": False, "activation_checkpointing": False}
        opened = open_checkpoint(options.checkpoint, stack, **as_run)
        folder, checkpoint, engine, progress = opened.folder, opened.checkpoint, opened.engine, opened.progress
        is_video = checkpoint.recipe.model.model in VIDEO_MODELS
        corpus = OpenCorpus(corpus_asked_for(checkpoint, options), progress.say, video=is_video)
        clips = engine.together(lambda: corpus.split(options.split, expected_dim=checkpoint.normalization.feature_dim))
        job = engine.on_main(lambda: _describe(options, folder, checkpoint, clips))
        output = options.output or _default_output(folder, options.split)
        shards = ShardFolder(output, job, owner)
        count = -(-len(clips) // job.shard_clips)
        if engine.on_main(shards.claim):
            progress.say(f"{output}: is complete already")
        else:
            engine.prepare(restore_trained(checkpoint, str(folder)), None)
            engine.training(False)
            todo = engine.on_main(lambda: [number for number in range(count) if shards.find(number) is None])
            if len(todo) < count:
                progress.say(f"{output}: {count - len(todo)} of {count} shards are there already; going on")
            # Ranks go their own ways: each looks for itself.
            stop = StopRequest(owner)
            stop.install()
            stack.callback(stop.uninstall)
            try:
                left = _extract(engine, shards, checkpoint, clips, todo, options, progress, stop)
            except InputError as error:
                # This rank speaks: to be heard together it would have to wait until all others have done their share.
                error.local = True
                raise
            left = int(engine.all_reduce(torch.tensor([left])).item())
            wer = None if left else _teacher_wer(engine, corpus, checkpoint, options, progress, stop)
            if engine.all_reduce(torch.tensor([int(left > 0 or stop.requested)])).item():
                said = f"stopped {stop.reason} with {left} of {count} shards to go; the same command goes on ({output})"
                progress.say(said)
                return Outcome(1, said, step=count - left, word="RESUME")
            facts = {"checkpoint": str(folder), "teacher_wer": wer, "protocol": checkpoint.recipe.run.protocol}
            engine.on_main(lambda: shards.publish(count, checkpoint.vocabulary, facts))
        written = engine.on_main(lambda: SoftTargets(output))
        engine.together(lambda: written.check(engine.rank, engine.world_size))
        progress.say(_table(written))
        return Outcome(0, f"soft targets of {len(clips)} clips are complete ({output})")


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line. Raises `InputError` with every mistake."""
    parser = OptionParser(prog="signscale extract", description=__doc__)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="the teacher: run directory (its best checkpoint), or checkpoint"
    )
    parser.add_argument("--split", default="train", help="split to extract (default: train)")
    parser.add_argument("--output", type=Path, help="folder to write (default: RUN/soft_targets/SPLIT)")
    parser.add_argument(
        "--dtype", choices=("float16", "float32"), default="float16", help="of values (default: float16)"
    )
    parser.add_argument(
        "--top_k", type=int, default=0, help="keep the K likeliest classes of a frame and the mass of the rest (0: all)"
    )
    parser.add_argument(
        "--temperature", type=float, default=3.0, help="where errors are measured, besides 1 (default: 3)"
    )
    parser.add_argument("--shard_clips", type=int, default=64, help="clips of a shard (default: 64)")
    parser.add_argument("--data_dir", help="corpus folder (default: the teacher's)")
    parser.add_argument("--annotations", help="annotations (default: the teacher's, or in DATA_DIR)")
    parser.add_argument(
        "--mixed_precision", choices=("no", "fp16", "bf16"), default="no", help="of the teacher (default: no)"
    )
    parser.add_argument("--num_workers", type=int, default=2, help="reading threads of each rank (default: 2)")
    options = parser.parse(argv)
    problems = [
        f"--{name} {getattr(options, name)}: expected {least} or more"
        for name, least in (("top_k", 0), ("shard_clips", 1), ("num_workers", 0))
        if getattr(options, name) < least
    ]
    if not 0 < options.temperature < float("inf"):
        problems.append(f"--temperature {options.temperature}: expected a number above 0; 3 is usual")
    if problems:
        raise InputError(problems)
    return options


def _default_output(folder: Path, split: str) -> Path:
    """Return RUN/soft_targets/SPLIT; a checkpoint outside a run gets a folder beside it."""
    return run_folder_of(folder) / "soft_targets" / split


def _describe(options: argparse.Namespace, folder: Path, checkpoint: Checkpoint, clips: Split) -> Extraction:
    classes = len(checkpoint.vocabulary)
    if options.top_k >= classes:
        raise InputError(f"--top_k {options.top_k}: the teacher has {classes} classes; choose fewer, or 0 for all")
    return Extraction(
        teacher=checkpoint_fingerprint(folder),
        vocabulary=checkpoint.vocabulary.fingerprint,
        num_classes=classes,
        total_stride=checkpoint.recipe.model.total_stride,
        split=options.split,
        clips_hash=clips.hash_clips(),
        files_hash=clips.stamp(),
        precision=options.mixed_precision,
        dtype=options.dtype,
        top_k=options.top_k,
        temperature=options.temperature,
        shard_clips=options.shard_clips,
    )


def _extract(
    engine: ReplicatedEngine,
    shards: ShardFolder,
    checkpoint: Checkpoint,
    clips: Split,
    todo: list[int],
    options: argparse.Namespace,
    progress: Progress,
    stop: StopRequest,
) -> int:
    """Write this rank's share of the shards that are missing; return how many a request to stop has left."""
    job = shards.job
    measured = _compressions(job)
    mine = todo[engine.rank :: engine.world_size]
    for done, number in enumerate(mine):
        if done and done * _LINES // len(mine) > (done - 1) * _LINES // len(mine):
            # The other ranks are about as far.
            progress.say(f"{done * 100 // len(mine)} % of {len(todo)} shards")
        chosen = np.arange(number * job.shard_clips, min((number + 1) * job.shard_clips, len(clips)))
        part = clips.choose(chosen)
        loader = evaluation_loader(checkpoint, part, num_workers=options.num_workers, device=engine.device)
        stored: dict[int, dict[str, torch.Tensor]] = {}
        errors = {one.name: [0.0, 0.0] for one in measured}
        with torch.no_grad(), closing(loader.cells(rank=0, world_size=1, budget=_ONE_CLIP)) as cells:
            started = time.perf_counter()
            for cell in cells:
                if stop.requested:
                    # The shard at hand is begun anew by whoever goes on.
                    return len(mine) - done
                [index] = cell.clips
                log_probs = float32_log_probs(engine.forward(cell.features, cell.layout).logits).cpu()
                if not bool(log_probs.isfinite().all()):
                    raise InputError(
                        f"clip {part.id(index)}: the teacher's outputs are not finite; extract in another "
                        "--mixed_precision, or use a sound checkpoint"
                    )
                stored[index] = job.compression.compress(log_probs)
                for one in measured:
                    for place, temperature in enumerate((1.0, job.temperature)):
                        errors[one.name][place] += one.error(log_probs, temperature)
                started, before = time.perf_counter(), started
                stop.time.note_step(started - before)
        order = range(len(part))
        shards.write(
            number,
            [
                StoredClip(id=part.id(i), frames=int(part.num_frames[i]), digest=int(part.table.digests[part.row(i)]))
                for i in order
            ],
            [stored[i] for i in order],
            {name: (one, other) for name, (one, other) in errors.items()},
        )
        stop.time.note_save(time.perf_counter() - started)
    return 0


def _compressions(job: Extraction) -> list[Compression]:
    """List what is measured: what is written, and what could have been."""
    found = [Compression(dtype="float32"), Compression(dtype="float16"), job.compression]
    if job.top_k:
        found.insert(2, Compression(dtype="float16", top_k=job.top_k))
    return list(dict.fromkeys(found))


def _teacher_wer(
    engine: ReplicatedEngine,
    corpus: OpenCorpus,
    checkpoint: Checkpoint,
    options: argparse.Namespace,
    progress: Progress,
    stop: StopRequest,
) -> float | None:
    """Measure the teacher's dev WER, which a student is compared with; None if the corpus has no dev split."""
    try:
        dev = engine.together(lambda: corpus.split("dev", expected_dim=checkpoint.normalization.feature_dim))
    except InputError as error:
        progress.say(f"warning: the teacher's dev WER stays unknown: {error.problems[0]}")
        return None
    loader = evaluation_loader(checkpoint, dev, num_workers=options.num_workers, device=engine.device)
    return measure_wer(engine, loader, checkpoint.recipe.run.protocol, lambda: stop.requested)


def _table(written: SoftTargets) -> str:
    job = written.job
    clips, outputs, errors = totals(written.shards)
    on_disk = sum(shard.bytes for shard in written.shards)
    wer: Any = written.facts["teacher_wer"]
    lines = [
        f"soft targets of {job.split}: {clips} clips, {outputs} output frames of stride {job.total_stride}, "
        f"{job.num_classes} classes, {len(written.shards)} shards of {on_disk / 1e6:.2f} MB in all; "
        + ("dev WER of the teacher unknown" if wer is None else f"dev WER of the teacher {wer:.2f} %"),
        f"  {'compression':<20}{'MB':>10}{'KL at T = 1':>16}{f'KL at T = {job.temperature:g}':>16}   nats a frame",
    ]
    for one in _compressions(job):
        size = one.bytes_per_frame(job.num_classes) * outputs / 1e6
        at_one, at_other = errors[one.name]
        mark = "   written" if one == job.compression else ""
        lines.append(f"  {one.name:<20}{size:>10.3f}{at_one:>16.3g}{at_other:>16.3g}{mark}")
    return "\n".join([*lines, f"written to {written.folder}"])


if __name__ == "__main__":
    exit_on_input_error(main)
