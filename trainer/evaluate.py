"""Evaluate a checkpoint: `python -m trainer.evaluate --checkpoint RUN --split test`, on one rank or several."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from trainer.checkpoint.content import Checkpoint
from trainer.checkpoint.store import run_folder_of
from trainer.checkpoint.trained import restore_trained
from trainer.data.loader import EvaluationLoader
from trainer.data.opening import OpenCorpus
from trainer.data.table import Split
from trainer.errors import InputError, name_some
from trainer.exits import Outcome, exit_on_input_error
from trainer.files import FencedFolder
from trainer.job.rank import find_job
from trainer.layout import slot_frames
from trainer.observe.progress import Progress
from trainer.opening import corpus_asked_for, open_checkpoint
from trainer.options import FPS, OptionParser
from trainer.recipe import VIDEO_MODELS
from trainer.scoring.ctm_stm import CtmRow, StmRow, write_ctm, write_stm
from trainer.scoring.decoder import Decoder, add_decoder_options, check_decoder_options, open_decoder
from trainer.scoring.decoding import Emission
from trainer.scoring.protocols import PROTOCOLS
from trainer.signals import StopRequest
from trainer.validation import Evaluation, evaluate

_CLIPS_PER_CELL = 8
_PROBE = ".probe.json"


def main(argv: Sequence[str] | None = None) -> Outcome:
    """Parse, build, evaluate, report; return the exit code: 1 where `--max_wer` names a WER that was exceeded."""
    options = parse_options(argv)
    with ExitStack() as stack:
        job = find_job()
        opened = open_checkpoint(options.checkpoint, stack, mixed_precision=options.mixed_precision)
        folder, checkpoint, engine, progress = opened.folder, opened.checkpoint, opened.engine, opened.progress
        recipe = checkpoint.recipe
        clips = engine.together(lambda: _read_clips(options, checkpoint, progress))
        if engine.world_size > len(clips):
            raise InputError(f"{options.split}: {len(clips)} clips for {engine.world_size} ranks; start fewer ranks")
        decoder = engine.together(lambda: open_decoder(options, checkpoint.vocabulary.glosses, progress.say))
        output = FencedFolder(options.output_dir or _default_output(folder), job.check)
        engine.on_main(lambda: _prepare_output(output))
        frame_rates: list[float] = []
        engine.on_main(lambda: frame_rates.extend(_frame_rates(options.fps, clips)))
        engine.prepare(restore_trained(checkpoint, str(folder)), None)
        loader = EvaluationLoader(
            split=clips,
            normalization=checkpoint.normalization,
            vocabulary=checkpoint.vocabulary,
            total_stride=recipe.model.total_stride,
            num_workers=options.num_workers,
            device=engine.device,
        )
        protocol = options.protocol or recipe.run.protocol
        longest = int(slot_frames(loader.num_frames, loader.total_stride).max())
        budget = options.max_frames_per_microbatch or _CLIPS_PER_CELL * longest
        stop = StopRequest(job, leads=engine.is_main)
        stop.install()
        stack.callback(stop.uninstall)
        result = evaluate(
            engine,
            loader,
            budget=budget,
            protocol=protocol,
            beam=decoder.beam,
            stop_requested=lambda: stop.requested,
        )
        if result is None:
            said = f"stopped {stop.reason}; {options.split} was not evaluated to its end, nothing was written"
            progress.say(said)
            return Outcome(1, said, word="RESUME")
        emissions = {index: found for part in engine.gather_objects(result.emissions) for index, found in part.items()}
        report = _report(options, folder, checkpoint, clips, result, protocol, decoder)
        engine.on_main(lambda: _write(output, report, options, clips, emissions, checkpoint, frame_rates))
        progress.say(_table(report, decoder, output.path / f"{options.split}.json"))
        exceeded = options.max_wer is not None and not result.counts.wer <= options.max_wer
        wer = f"{result.counts.wer:.2f} %" if report["wer"] is not None else "undefined"
        said = f"WER of {options.split} {wer}" + f", not at most {options.max_wer} %" * exceeded
        return Outcome(int(exceeded), said, step=checkpoint.state.step)


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line. Raises `InputError` with every mistake."""
    parser = OptionParser(prog="signscale evaluate", description=__doc__)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="run directory (its best checkpoint), or checkpoint"
    )
    parser.add_argument("--split", default="test", help="split to evaluate (default: test)")
    parser.add_argument("--data_dir", help="corpus folder (default: the run's)")
    parser.add_argument("--annotations", help="annotations (default: the run's, or in DATA_DIR)")
    parser.add_argument("--protocol", choices=PROTOCOLS, help="scoring protocol (default: the run's)")
    parser.add_argument(
        "--output_dir", type=Path, help="where to write <split>.json, .ctm and .stm (default: RUN/evaluation)"
    )
    parser.add_argument("--cache_dir", help="node-local cache of a packed corpus (default: the run's)")
    parser.add_argument("--cache_gb", type=float, help="its largest size, in 10^9 bytes (default: the run's)")
    parser.add_argument("--allow_missing", action="store_true", help="leave out clips without a feature file or frames")
    parser.add_argument(
        "--mixed_precision", choices=("no", "fp16", "bf16"), default="no", help="precision (default: no)"
    )
    parser.add_argument("--num_workers", type=int, default=2, help="reading threads of each rank (default: 2)")
    parser.add_argument(
        "--max_frames_per_microbatch", type=int, default=0, help="memory budget in frames (default: 8 longest clips)"
    )
    parser.add_argument(
        "--fps",
        type=float,
        help="frames per second, for times in the CTM (default: as each video file says; of features and folders of "
        f"frames {FPS:g})",
    )
    parser.add_argument("--max_wer", type=float, help="exit code 1 if the WER, in percent, is above this")
    add_decoder_options(parser)
    options = parser.parse(argv)
    problems = check_decoder_options(options)
    problems += [
        f"--{name} {getattr(options, name)}: expected 0 or more"
        for name in ("num_workers", "max_frames_per_microbatch")
        if getattr(options, name) < 0
    ]
    if options.fps is not None and not 0 < options.fps < float("inf"):
        problems.append(f"--fps {options.fps}: expected a number above 0; 25 is usual")
    if problems:
        raise InputError(problems)
    return options


def _prepare_output(output: FencedFolder) -> None:
    """Make the output folder, and see that it can be written to, before anything is computed."""
    try:
        output.path.mkdir(parents=True, exist_ok=True)
        output.write_json(_PROBE, {})
        output.remove(_PROBE)
    except OSError as error:
        raise InputError(
            f"{output.path}: cannot be written to ({error.strerror}); choose another --output_dir"
        ) from error


def _frame_rates(given: float | None, clips: Split) -> list[float]:
    """Return each clip's frames per second: whoever lays hypotheses over a video goes by that video's clock.

    Before anything is computed: a file that cannot be read by then would take the results with it.
    """
    return [given or clips.frame_rate(index) or FPS for index in range(len(clips))]


def _read_clips(options: argparse.Namespace, checkpoint: Checkpoint, progress: Progress) -> Split:
    """Read the split, and say which of its glosses the vocabulary does not know."""
    corpus = corpus_asked_for(checkpoint, options)
    given = {name: value for name in ("cache_dir", "cache_gb") if (value := getattr(options, name)) is not None}
    corpus = dataclasses.replace(corpus, **given)
    if options.allow_missing:
        corpus = dataclasses.replace(corpus, allow_missing=True)
    opened = OpenCorpus(corpus, progress.say, video=checkpoint.recipe.model.model in VIDEO_MODELS)
    clips = opened.split(options.split, expected_dim=checkpoint.normalization.feature_dim)
    problems = clips.table.find_problems(0, 1)
    if problems:
        raise InputError(problems)
    vocabulary = checkpoint.vocabulary
    glosses = clips.table.all_glosses()
    unknown = sorted(vocabulary.unknown(glosses))
    if len(unknown) == len(glosses):
        raise InputError(
            f"{corpus.annotations or corpus.data_dir}: not one gloss of {options.split} is in the run's vocabulary "
            f"(e.g. {name_some(unknown, 5)}); evaluate on the corpus the run was trained for"
        )
    if unknown:
        progress.say(f"{len(unknown)} glosses are unknown to the run and count as errors: {name_some(unknown)}")
    return clips


def _default_output(folder: Path) -> Path:
    """Return RUN/evaluation; a checkpoint outside a run gets a folder beside it."""
    return run_folder_of(folder) / "evaluation"


def _report(
    options: argparse.Namespace,
    folder: Path,
    checkpoint: Checkpoint,
    clips: Split,
    result: Evaluation,
    protocol: str,
    decoder: Decoder,
) -> dict[str, Any]:
    return {
        "split": options.split,
        "protocol": protocol,
        **decoder.as_dict(),
        "checkpoint": str(folder),
        "step": checkpoint.state.step,
        **result.counts.as_dict(),
        "loss": result.loss if result.loss_clips else None,
        "loss_clips": result.loss_clips,
        "blank_rate": result.blank_rate,
        "unknown_glosses": sum(
            gloss not in checkpoint.vocabulary for index in range(len(clips)) for gloss in clips.glosses(index)
        ),
    }


def _write(
    output: FencedFolder,
    report: dict[str, Any],
    options: argparse.Namespace,
    clips: Split,
    emissions: dict[int, list[Emission]],
    checkpoint: Checkpoint,
    frame_rates: Sequence[float],
) -> None:
    """Write the hypotheses as they were decoded (CTM), the references (STM), and the report last."""
    # Of an output frame, clip by clip.
    seconds = [checkpoint.recipe.model.total_stride / rate for rate in frame_rates]
    write_ctm(
        output.path / f"{options.split}.ctm",
        [
            CtmRow(
                id=clips.id(index),
                gloss=checkpoint.vocabulary.decode([emission.label])[0],
                start=emission.start * seconds[index],
                duration=emission.frames * seconds[index],
            )
            for index in range(len(clips))
            for emission in emissions[index]
        ],
        fence=output.fence,
    )
    write_stm(
        output.path / f"{options.split}.stm",
        [
            StmRow(
                id=clips.id(index),
                glosses=clips.glosses(index),
                signer="_".join(clips.signer(index).split()) or "unknown",
            )
            for index in range(len(clips))
        ],
        fence=output.fence,
    )
    output.write_json(f"{options.split}.json", report)


def _table(report: dict[str, Any], decoder: Decoder, path: Path) -> str:
    rows = [
        ("decoder", str(decoder)),
        ("WER", f"{report['wer']:.2f} %" if report["wer"] is not None else "undefined (no reference words)"),
        *(
            (name, str(report[name]))
            for name in ("substitutions", "deletions", "insertions", "reference_words", "clips")
        ),
        ("empty hypotheses", str(report["empty_hypotheses"])),
        ("blank rate", f"{report['blank_rate']:.3f}"),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{report['split']} ({report['protocol']}), checkpoint of step {report['step']}"]
    return "\n".join([*lines, *(f"  {name:<{width}}  {value}" for name, value in rows), f"written to {path}"])


if __name__ == "__main__":
    exit_on_input_error(main)
