"""The recipe: everything that defines a run, as one typed tree.

The tree groups the fields by what they govern; names are unique across groups, so that a YAML file and
the command line stay flat (`batch_size: 8`, `--batch_size 8`). The line under a field is its `--help` text.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

DEFAULT_OUTPUT_DIR = "runs/teacher"

ARCHITECTURE_HEADS = {
    "teacher": (512, 2),
    "student": (192, 1),
    "i3d": (512, 2),
    "mobilenet_v3_small": (256, 1),
    "mobilenet_v3_large": (256, 1),
}
"""Units of each direction of the BiLSTM and its layers, where the recipe names none."""

VIDEO_MODELS = frozenset(("i3d", "mobilenet_v3_small", "mobilenet_v3_large"))
"""Values of `model` that take frames; all others take features."""


@dataclass(frozen=True, kw_only=True)
class CorpusRecipe:
    """Corpus: which clips, and how their features or frames are prepared."""

    data_dir: str = ""
    """Folder with {train,dev,test}/<id>.npz, frames or videos (docs/video.md), or a packed corpus, also at s3://…."""
    annotations: str = ""
    """Folder with {split}.corpus.csv, or a pattern such as ann/{split}.SI5.corpus.csv (default: in DATA_DIR)."""
    allow_missing: bool = False
    """Train without the annotated clips whose feature file or frames are missing, and say which."""
    max_frames: NonNegativeInt = 0
    """Cut training clips to their first frames, this many at most (0: never)."""
    skip_clips: list[str] = field(default_factory=list)
    """Ids of training clips to leave out, aloud."""
    normalization: Literal["corpus", "clip", "none"] = "corpus"
    """Features: zero mean and unit variance per dimension over the training split, over each clip, or as they are."""
    frame_size: PositiveInt = 256
    """Video: pixels a side to which frames are brought, whatever their own size."""
    crop_size: NonNegativeInt = 0
    """Video: pixels a side that the model sees of them, the middle in evaluation (0: seven eighths, 224 of 256)."""
    overfit_clips: NonNegativeInt = 0
    """Train on this many training clips alone and evaluate on the same ones (0: off)."""
    limit_clips: NonNegativeInt = 0
    """Take the first clips of each split alone, this many at most, to try a recipe out (0: all)."""
    augment: bool = False
    """Augment training clips, seeded by (seed, epoch, clip id)."""
    augment_rescale: ClosedUnitInterval = 0.2
    """Temporal rescaling: a clip's speed changes by up to this fraction either way."""
    augment_frame_drop: ClosedUnitInterval = 0.1
    """Frame dropping: up to this fraction of the frames of a clip is left out."""
    augment_time_mask: ClosedUnitInterval = 0.1
    """Features, time masking: two spans of up to this fraction of a clip are set to the mean."""
    augment_feature_mask: ClosedUnitInterval = 0.1
    """Features: up to this fraction of the dimensions, in two bands, is set to the mean for a whole clip."""
    augment_noise: NonNegativeFloat = 0.05
    """Features: standard deviation of the Gaussian noise added to them, normalised."""
    augment_flip: bool = False
    """Video: mirror every second clip. Off, since most signers have a dominant hand and some signs a direction."""
    augment_color: ClosedUnitInterval = 0.2
    """Video: brightness, contrast and saturation of a clip change by up to this fraction either way."""
    num_workers: NonNegativeInt = 2
    """Threads of each rank that read and augment clips ahead of time (0: in the training thread)."""
    cache_dir: str = ""
    """Folder of this node for what is read of a packed corpus (default: none for a folder, ~/.cache/signscale else)."""
    cache_gb: PositiveFloat = 50.0
    """Largest size of that folder, in 10^9 bytes; all processes of the node share it."""

    @property
    def frame_crop(self) -> int:
        """Return the pixels a side that a model of video sees."""
        return self.crop_size or max(1, self.frame_size * 7 // 8)


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """Model."""

    model: Literal["teacher", "student", "i3d", "mobilenet_v3_small", "mobilenet_v3_large"] = "teacher"
    """Architecture: teacher, student = large and small over features; i3d, mobilenet_v3_… = the same over video."""
    total_stride: Literal[1, 2, 4] = 4
    """Input frames per output frame."""
    width: PositiveFloat = 1.0
    """Multiplier of every channel count (teacher and video 1.0: the published widths; student 1.0: 192 channels)."""
    rnn_size: PositiveInt | None = None
    """Units of each direction of each BiLSTM layer (default: teacher and i3d 512, student 192, mobilenet_v3_… 256)."""
    rnn_layers: PositiveInt | None = None
    """BiLSTM layers (default: teacher and i3d 2, student and mobilenet_v3_… 1)."""
    dropout: ClosedUnitInterval = 0.3
    """Dropout, drawn per (seed, epoch, clip, frame): the same on any number of ranks."""
    streams: dict[str, list[int]] | None = None
    """Named feature streams as slices of D, fused by learned gates: {pose: [0, 99], hands: [99, 225], …}."""
    norm: Literal["frozen", "group"] | None = None
    """Video: BatchNorm by its loaded statistics, or GroupNorm per frame (default: frozen with loaded weights)."""
    pretrained: bool = False
    """Start mobilenet_v3_… from torchvision's ImageNet weights, fetched when online (else --init_from FILE)."""

    def __post_init__(self) -> None:
        """Put the architecture's own sizes where none are given: a stored recipe names the model it built."""
        for name, value in zip(("rnn_size", "rnn_layers"), ARCHITECTURE_HEADS[self.model], strict=True):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)


@dataclass(frozen=True, kw_only=True)
class BatchRecipe:
    """Batches: batch_size x gradient_accumulation_steps is the global batch in clips, on any hardware."""

    batch_size: PositiveInt = 8
    """Clips per accumulation step."""
    gradient_accumulation_steps: PositiveInt = 2
    """Accumulation steps per optimizer step."""
    batch_scaling: Literal["none", "linear"] = "none"
    """linear: multiply the global batch by the world size (the curve then depends on the hardware)."""
    learning_rate_rule: Literal["linear", "sqrt", "none"] = "linear"
    """How batch_scaling changes the learning rate: times world size, times its square root, or not."""
    shuffle_window: PositiveInt = 1
    """Global batches drawn together, sorted by length and cut, so that a step's clips are alike (1: plain shuffle)."""
    max_frames_per_microbatch: NonNegativeInt = 0
    """Memory budget of one forward and backward pass, in frames (0: batch_size x the longest training clip)."""
    cost_model: str = ""
    """cost_model.json of an earlier run (or that run), by which ranks share a step (default: by frames alone)."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveRecipe:
    """Objective."""

    loss_normalization: Literal["clip_target", "clip", "target"] = "clip_target"
    """Mean over the global batch of loss per gloss (PyTorch's "mean"), of loss per clip, or loss over all glosses."""
    label_smoothing: ClosedUnitInterval = 0.0
    """Weight of the KL term towards the uniform distribution on valid frames."""
    mixup_alpha: NonNegativeFloat = 0.0
    """Beta parameter of temporal mixup between two clips of a global batch (0: off)."""
    visual_ctc_weight: NonNegativeFloat = 0.0
    """Weight of CTC on an auxiliary classifier of the visual features, before the BiLSTM (0: off; VAC: 1)."""
    alignment_weight: NonNegativeFloat = 0.0
    """Weight of T^2 x KL(model || that classifier) per frame, which aligns it with the model (0: off)."""
    alignment_temperature: PositiveFloat = 8.0
    """Temperature T of both distributions in that divergence."""

    @property
    def classifies_visually(self) -> bool:
        """Tell whether training needs the auxiliary classifier."""
        return self.visual_ctc_weight > 0 or self.alignment_weight > 0


@dataclass(frozen=True, kw_only=True)
class DistillationRecipe:
    """Distillation: alpha x T^2 x KL(teacher || student) + (1 - alpha) x CTC, where a teacher is named."""

    teacher: str = ""
    """Run or checkpoint of the teacher, which sees each clip as the student does: augmented, mixed up (online)."""
    soft_targets: str = ""
    """Folder that trainer.extract wrote: the teacher's distributions over the clips as they are (cached)."""
    distill_alpha: ClosedUnitInterval = 0.7
    """Weight of the divergence from the teacher; CTC has the rest."""
    distill_temperature: PositiveFloat = 3.0
    """Temperature of both distributions."""
    distill_blank_weight: ClosedUnitInterval = 1.0
    """Weight of the frames on which the teacher's likeliest class is the blank (1: kept, 0: excluded)."""
    distill_labels: Literal["annotations", "teacher"] = "annotations"
    """Glosses that CTC learns: those annotated, or as the teacher decodes the clip (sequence-level distillation)."""
    feature_weight: NonNegativeFloat = 0.0
    """Weight of 1 - cos of the features that the classifiers of teacher and student see, per frame (online; 0: off)."""
    teacher_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of the teacher's forward pass, whatever the student's is."""
    target_ratio: PositiveFloat | None = None
    """Say at the end whether the best dev WER is at most this many times the teacher's (1.1: within 10 %)."""


@dataclass(frozen=True, kw_only=True)
class OptimizationRecipe:
    """Optimization."""

    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """Optimizer."""
    fused_optimizer: bool = False
    """Take torch's fused kernel of the optimizer: the same rule in one pass over the weights."""
    learning_rate: PositiveFloat = 3e-4
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 1e-6
    """Learning rate at the end of the schedule."""
    scheduler: Literal["cosine", "cosine_with_restarts", "onecycle", "constant"] = "cosine"
    """Learning-rate schedule, stepped per optimizer step."""
    warmup_epochs: NonNegativeFloat = 5.0
    """Epochs of linear warm-up, starting above zero."""
    restarts: PositiveInt = 4
    """Cycles of cosine_with_restarts."""
    weight_decay: NonNegativeFloat = 1e-4
    """Weight decay (decoupled for adamw), on weight matrices only."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates; sgd takes the first as its momentum."""
    gradient_clip: NonNegativeFloat = 1.0
    """Largest norm of the global gradient (0: no clipping)."""


@dataclass(frozen=True, kw_only=True)
class RunRecipe:
    """Run: how long, how often, where to."""

    output_dir: str = DEFAULT_OUTPUT_DIR
    """Run directory, the only place a run writes to."""
    epochs: PositiveInt = 150
    """Passes over the training split."""
    max_steps: NonNegativeInt = 0
    """End, and end the schedule, after this many optimizer steps at the latest (0: epochs decide)."""
    stop_after_steps: NonNegativeInt = 0
    """Save and leave after this many steps of this attempt, schedule untouched; --resume auto goes on (0: off)."""
    seed: NonNegativeInt = 42
    """Seed of weights, order, augmentation, mixup and dropout."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of the forward pass; CTC and softmax are always float32."""
    activation_checkpointing: bool = False
    """Keep the inputs of the model's blocks alone, and compute the rest again in the backward pass: less memory."""
    compile: bool = False
    """Compile the model's blocks (torch.compile, one graph each for cells of any size); needs a C++ compiler."""
    deterministic: bool = False
    """Bit-identical repetition on a GPU too, at some cost (on the CPU it is always so)."""
    detect_anomaly: bool = False
    """Stop at the first operation whose gradient is not a number, and name it (several times slower; for debugging)."""
    log_every: PositiveInt = 50
    """Steps between two lines of metrics."""
    evaluate_every: NonNegativeInt = 0
    """Steps between two validations (0: each epoch)."""
    save_every: NonNegativeInt = 0
    """Steps between two checkpoints, besides the one at each validation (0: only those)."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints kept, besides the best."""
    selection_metric: Literal["wer", "loss"] = "wer"
    """Metric of the dev split that chooses the best checkpoint and stops early."""
    early_stopping_patience: NonNegativeInt = 0
    """Stop after this many validations without a better one (0: never; CTC may rest near 100 % for 20 epochs)."""
    target_wer: float | None = None
    """Stop as soon as the dev WER, in percent, is at most this; exit code 1 if it never is."""
    train_wer_clips: NonNegativeInt = 64
    """Size of the fixed training subset whose WER is measured at each validation (0: off)."""
    protocol: Literal["plain", "phoenix2014", "phoenix2014_merge"] = "plain"
    """Scoring protocol of the WER."""
    trackers: list[Literal["tensorboard", "wandb"]] = field(default_factory=lambda: ["tensorboard"])
    """Trackers beside metrics.jsonl."""
    wandb_project: str = "signscale"
    """Project of the wandb tracker (offline unless a key is configured)."""
    resume: str = ""
    """auto: go on from the newest sound checkpoint of the run directory, or start; PATH: go on from this checkpoint."""
    init_from: str = ""
    """Checkpoint or run whose weights, vocabulary and normalisation start this one; video: or a backbone's .pt file."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that defines a run; `flat()` is its YAML form."""

    corpus: CorpusRecipe = field(default_factory=CorpusRecipe)
    model: ModelRecipe = field(default_factory=ModelRecipe)
    batch: BatchRecipe = field(default_factory=BatchRecipe)
    objective: ObjectiveRecipe = field(default_factory=ObjectiveRecipe)
    distillation: DistillationRecipe = field(default_factory=DistillationRecipe)
    optimization: OptimizationRecipe = field(default_factory=OptimizationRecipe)
    run: RunRecipe = field(default_factory=RunRecipe)

    def flat(self) -> dict[str, Any]:
        """Return every field by its flat name, in the order of declaration."""
        return {name: value for group in dataclasses.asdict(self).values() for name, value in group.items()}

    @classmethod
    def from_flat(cls, values: dict[str, Any]) -> Recipe:
        """Build the tree from flat names; a name that is absent keeps its default."""
        groups = {
            group: kind(**{f.name: values[f.name] for f in dataclasses.fields(kind) if f.name in values})
            for group, kind in GROUPS.items()
        }
        return cls(**groups)

    def global_batch_size(self, world_size: int) -> int:
        """Count the clips of one optimizer step."""
        clips = self.batch.batch_size * self.batch.gradient_accumulation_steps
        return clips * world_size if self.batch.batch_scaling == "linear" else clips

    def peak_learning_rate(self, world_size: int) -> float:
        """Return the peak learning rate after `learning_rate_rule` (linear: Goyal et al. 2017)."""
        rate = float(self.optimization.learning_rate)
        if self.batch.batch_scaling == "none" or self.batch.learning_rate_rule == "none":
            return rate
        return rate * (world_size if self.batch.learning_rate_rule == "linear" else world_size**0.5)


GROUPS: dict[str, type[Any]] = {
    "corpus": CorpusRecipe,
    "model": ModelRecipe,
    "batch": BatchRecipe,
    "objective": ObjectiveRecipe,
    "distillation": DistillationRecipe,
    "optimization": OptimizationRecipe,
    "run": RunRecipe,
}

FREE_ON_RESUME = frozenset(
    # What may differ between two attempts of one run: where things lie, how the labour is divided, what is reported.
    (
        "data_dir",
        "annotations",
        "output_dir",
        "num_workers",
        "cache_dir",
        "cache_gb",
        "cost_model",
        # Who the teacher is, the run directory knows; how it is asked, online or by its soft targets, is free.
        "teacher",
        "soft_targets",
        "target_ratio",
        "max_frames_per_microbatch",
        "activation_checkpointing",
        "compile",
        "detect_anomaly",
        "stop_after_steps",
        "log_every",
        "save_every",
        "keep_checkpoints",
        "early_stopping_patience",
        "target_wer",
        "trackers",
        "wandb_project",
        "resume",
        "init_from",
    )
)


def combination_problems(recipe: Recipe, *, needs_corpus: bool = True) -> list[str]:
    """List what is impossible in combination, each with its mend; without a corpus nothing is, where one is needed."""
    corpus, model, opt, run = recipe.corpus, recipe.model, recipe.optimization, recipe.run
    problems = [
        f"{name}: {value} is not a finite number; choose one"
        for name, value in recipe.flat().items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    if run.seed >= 2**64:
        problems.append(f"seed: {run.seed} has more than 64 bits; choose a smaller one")
    if needs_corpus and not corpus.data_dir:
        problems.append("data_dir: not given; name the folder that holds train/, dev/ and test/ (--data_dir DIR)")
    if "{" in corpus.annotations and "{split}" not in corpus.annotations:
        problems.append(
            f"annotations: the pattern {corpus.annotations!r} has no {{split}}; write e.g. ann/{{split}}.csv"
        )
    if opt.min_lr > opt.learning_rate:
        problems.append(f"min_lr: {opt.min_lr} is above learning_rate {opt.learning_rate}; lower it")
    if opt.warmup_epochs >= run.epochs and opt.warmup_epochs > 0:
        problems.append(
            f"warmup_epochs: {opt.warmup_epochs} leaves nothing of {run.epochs} epochs; lower it or raise epochs"
        )
    problems += [f"betas: {b} is outside [0, 1); 0.9 and 0.999 are usual" for b in opt.betas if not 0 <= b < 1]
    if model.dropout >= 1:
        problems.append("dropout: 1.0 leaves no signal; choose a value below 1")
    if recipe.objective.label_smoothing >= 1:
        problems.append("label_smoothing: 1.0 leaves no labels; choose a value below 1 (0.1 is usual)")
    if run.resume and run.resume != "auto" and run.init_from:
        problems.append("resume and init_from: a run goes on or starts from weights, not both; drop one of them")
    if run.target_wer is not None and run.target_wer < 0:
        problems.append(f"target_wer: {run.target_wer} is below 0; give a WER in percent")
    if corpus.augment_frame_drop >= 1 or corpus.augment_rescale >= 1:
        problems.append("augment_frame_drop and augment_rescale: 1.0 leaves no frame; choose values below 1")
    if corpus.crop_size > corpus.frame_size:
        problems.append(
            f"crop_size: {corpus.crop_size} pixels of frames of {corpus.frame_size}; lower it, or raise frame_size"
        )
    problems += _distillation_problems(recipe)
    problems += _video_problems(recipe)
    for name, edges in (model.streams or {}).items():
        if not edges or len(edges) % 2 or any(a < 0 or a >= b for a, b in zip(edges[::2], edges[1::2], strict=False)):
            problems.append(
                f"streams: {name} is {edges}; write start and stop of each slice, e.g. [0, 99], start < stop"
            )
    return problems


def _distillation_problems(recipe: Recipe) -> list[str]:
    distillation, corpus = recipe.distillation, recipe.corpus
    problems = []
    if distillation.teacher and distillation.soft_targets:
        problems.append(
            "teacher and soft_targets: a student learns from one of them; drop --soft_targets (online), or --teacher "
            "(cached)"
        )
    if distillation.feature_weight and not distillation.teacher:
        problems.append(
            "feature_weight: stored soft targets hold no features; let the teacher be asked in every step (--teacher "
            "RUN instead of --soft_targets), or set feature_weight to 0"
            if distillation.soft_targets
            else "feature_weight: compares with a teacher's features, and none is named; add --teacher RUN, or drop it"
        )
    if distillation.distill_labels == "teacher":
        if not (distillation.teacher or distillation.soft_targets):
            problems.append(
                "distill_labels: teacher decodes nothing where none is named; add --teacher or --soft_targets"
            )
        if recipe.objective.mixup_alpha:
            problems.append("distill_labels: teacher decodes a clip as one; set mixup_alpha to 0, or keep annotations")
    if distillation.soft_targets:
        changes = [
            f"{name} {value}"
            for name, value, changed in (
                ("augment_rescale", corpus.augment_rescale, corpus.augment and corpus.augment_rescale > 0),
                ("augment_frame_drop", corpus.augment_frame_drop, corpus.augment and corpus.augment_frame_drop > 0),
                ("mixup_alpha", recipe.objective.mixup_alpha, recipe.objective.mixup_alpha > 0),
            )
            if changed
        ]
        if changes:
            problems.append(
                f"soft_targets: fit the frames of the clips as they are, but {', '.join(changes)} changes them; let "
                "the teacher see what the student sees (--teacher RUN instead), or set these to 0"
            )
    return problems


def _video_problems(recipe: Recipe) -> list[str]:
    model, run = recipe.model, recipe.run
    if model.model not in VIDEO_MODELS:
        return [
            f"{name}: is for models of video, {model.model} takes features; drop it"
            for name in ("norm", "pretrained")
            if getattr(model, name)
        ]
    problems = []
    if recipe.objective.mixup_alpha:
        problems.append(f"mixup_alpha: mixes features, {model.model} takes video; set it to 0")
    if model.streams:
        problems.append(f"streams: are slices of features, {model.model} takes video; drop them")
    if model.pretrained and model.model == "i3d":
        problems.append("pretrained: is for mobilenet_v3_…; give i3d its Kinetics weights by --init_from FILE instead")
    if model.pretrained and run.init_from:
        problems.append("pretrained and init_from: a run starts from one set of weights; drop one of them")
    if model.pretrained and model.width != 1.0:
        problems.append(f"pretrained: the ImageNet weights are of width 1.0, not {model.width}; set width to 1.0")
    # Whether --resume auto finds a checkpoint shows later.
    if model.norm == "frozen" and not (model.pretrained or run.init_from or run.resume):
        problems.append(
            "norm: frozen statistics come with loaded weights; add --pretrained true or --init_from FILE, or use "
            "--norm group"
        )
    return problems
