"""The keys of a DeepSpeed configuration: which this engine drives, with which values, and where others belong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Key:
    """What a key may hold."""

    expected: str
    """What is expected, as an error says it."""
    fits: Callable[[Any], bool]
    """Whether a value is that."""
    reason: str = ""
    """Why nothing else will do, or where the user says it instead."""
    stages: tuple[int, ...] = (1, 2, 3)
    """Stages under which it does something."""


def only(value: Any, reason: str, *, stages: tuple[int, ...] = (1, 2, 3)) -> Key:
    """Expect one value, because the engine builds on it."""
    return Key(
        expected=_literal(value),
        fits=lambda found: found == value and isinstance(found, bool) == isinstance(value, bool),
        reason=reason,
        stages=stages,
    )


def choice(*values: Any) -> Key:
    """Expect one of several values."""
    return Key(
        expected=" or ".join(map(_literal, values)),
        fits=lambda found: not isinstance(found, bool) and found in values,
    )


def flag(*, stages: tuple[int, ...] = (1, 2, 3)) -> Key:
    """Expect true or false."""
    return Key(expected="true or false", fits=lambda found: isinstance(found, bool), stages=stages)


def count(least: int = 0, *, stages: tuple[int, ...] = (1, 2, 3)) -> Key:
    """Expect a whole number; 5e8 is one."""
    return Key(
        expected=f"a whole number from {least} on",
        fits=lambda found: (
            isinstance(found, int | float) and not isinstance(found, bool) and found >= least and found == int(found)
        ),
        stages=stages,
    )


def section(*, stages: tuple[int, ...] = (1, 2, 3)) -> Key:
    """Expect an object, whose own keys are read apart."""
    return Key(expected="an object", fits=lambda found: isinstance(found, dict), stages=stages)


def text() -> Key:
    """Expect a string."""
    return Key(expected="a path", fits=lambda found: isinstance(found, str) and bool(found))


def _literal(value: Any) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value).replace("'", '"')


_SUMS = "the engine adds gradients up in float32 over the whole global batch"
_PRECISION = "precision is the run's, the same under every backend: --mixed_precision"
_CHECKPOINTS = "checkpoints are the trainer's, the same under every backend"
_TRACKERS = "metrics go to the recipe's trackers: --trackers"
_THIRD = (3,)

FILLED: Mapping[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "managed_gradient_accumulation": False,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
"""What the engine needs and a file may leave out."""

TOP_LEVEL: Mapping[str, Key] = {
    "train_micro_batch_size_per_gpu": only(1, "micro-batches are cut by frames: --max_frames_per_microbatch"),
    "gradient_accumulation_steps": only(1, "accumulation is the recipe's: --gradient_accumulation_steps"),
    "managed_gradient_accumulation": only(False, "the engine says itself where a step ends"),
    "zero_allow_untested_optimizer": only(True, "the optimizer is the recipe's"),
    "zero_force_ds_cpu_optimizer": only(
        False, "the optimizer is torch's own on the CPU too, which needs no compiler and gives the same bits"
    ),
    "gradient_clipping": Key(
        expected="a number", fits=lambda found: isinstance(found, int | float) and not isinstance(found, bool)
    ),
    "zero_optimization": section(),
    "aio": section(stages=_THIRD),
    "steps_per_print": count(1),
    "wall_clock_breakdown": flag(),
    "memory_breakdown": flag(),
    "dump_state": flag(),
    "log_level": choice("debug", "info", "warning", "error", "critical"),
}
"""Keys that the engine drives."""

ELSEWHERE: Mapping[str, str] = {
    **dict.fromkeys(("fp16", "bf16", "bfloat16", "torch_autocast", "amp", "data_types"), _PRECISION),
    "optimizer": "the optimizer is the recipe's: --learning_rate, --weight_decay and their like",
    "scheduler": "the schedule is the recipe's: --scheduler, --warmup_epochs and their like",
    "train_batch_size": "the global batch is the recipe's: --batch_size",
    **dict.fromkeys(
        (
            "gradient_allreduce_op",
            "prescale_gradients",
            "gradient_predivide_factor",
            "communication_data_type",
            "seq_parallel_communication_data_type",
            "sparse_gradients",
        ),
        _SUMS,
    ),
    "activation_checkpointing": "it is the recipe's: --activation_checkpointing true",
    **dict.fromkeys(("checkpoint", "datastates_ckpt", "nebula"), _CHECKPOINTS),
    **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet", "monitor_config"), _TRACKERS),
    **dict.fromkeys(("curriculum_learning", "data_efficiency", "dataloader_drop_last"), "the plan chooses the clips"),
    **dict.fromkeys(
        (
            "autotuning",
            "comms_logger",
            "compile",
            "compression_training",
            "disable_allgather",
            "disable_python_gc",
            "eigenvalue",
            "elasticity",
            "expert_parallel",
            "flops_profiler",
            "hybrid_engine",
            "pipeline",
            "progressive_layer_drop",
            "quantize_training",
            "sequence_parallel_size",
            "sparse_attention",
            "tensor_parallel",
            "timers",
            "use_data_before_expert_parallelism",
            "vocabulary_size",
            "weight_quantization",
            "zero_quantized_weights",
        ),
        "this engine does not drive it",
    ),
}
"""Keys that DeepSpeed knows and this engine does not take, and why."""

_COALESCED = "below stage 3 there is one reduction at the end of a step, which overlaps with nothing"

ZERO: Mapping[str, Key] = {
    "stage": Key(
        expected="1, 2 or 3",
        fits=lambda found: not isinstance(found, bool) and found in (1, 2, 3),
        reason="without ZeRO launch with accelerate_configs/multi_gpu.yaml",
    ),
    "contiguous_gradients": flag(),
    "reduce_scatter": only(True, "the engine was not proven without it"),
    "reduce_bucket_size": count(1),
    "use_multi_rank_bucket_allreduce": flag(stages=(1, 2)),
    "allgather_partitions": flag(stages=(1, 2)),
    "allgather_bucket_size": count(1, stages=(1, 2)),
    "overlap_comm": flag(),
    "compute_grad_norm": only(True, "the norm is logged and clipped by", stages=(1, 2)),
    "load_from_fp32_weights": only(True, _CHECKPOINTS),
    "ignore_unused_parameters": only(True, "a teacher's weights may go unused in a step"),
    "offload_optimizer": section(),
    "offload_param": section(stages=_THIRD),
    "sub_group_size": count(1, stages=_THIRD),
    "stage3_prefetch_bucket_size": count(stages=_THIRD),
    "stage3_param_persistence_threshold": count(stages=_THIRD),
    "stage3_model_persistence_threshold": count(stages=_THIRD),
    "stage3_max_live_parameters": count(stages=_THIRD),
    "stage3_max_reuse_distance": count(stages=_THIRD),
    "stage3_module_granularity_threshold": count(stages=_THIRD),
    "stage3_use_all_reduce_for_fetch_params": flag(stages=_THIRD),
    "stage3_allgather_sequential": flag(stages=_THIRD),
    "memory_efficient_linear": flag(stages=_THIRD),
    "stage3_gather_16bit_weights_on_model_save": only(False, _CHECKPOINTS, stages=_THIRD),
    "log_trace_cache_warnings": flag(stages=_THIRD),
    "enable_sanity_checks": flag(),
    "round_robin_gradients": only(False, "optimizer states could no longer be read by name"),
    "zero_hpz_partition_size": only(1, "this engine does not drive it"),
    "zero_quantized_weights": only(False, "weights would no longer be those of the other backends"),
    "zero_quantized_nontrainable_weights": only(False, "weights would no longer be those of the other backends"),
    "zero_quantized_gradients": only(False, _SUMS),
    "elastic_checkpoint": only(False, _CHECKPOINTS),
    "legacy_stage1": only(False, "DeepSpeed itself has given it up"),
}
"""Keys of `zero_optimization` that the engine drives; any other that DeepSpeed knows is not driven."""

BELOW_THIRD: Mapping[str, Key] = {"overlap_comm": only(False, _COALESCED)}
"""What holds under stages 1 and 2 instead."""

_OFFLOAD: Mapping[str, Key] = {
    "device": choice("none", "cpu", "nvme"),
    "nvme_path": text(),
    "buffer_count": count(1),
    "pin_memory": flag(),
}

SECTIONS: Mapping[str, Mapping[str, Key]] = {
    "offload_optimizer": {
        **_OFFLOAD,
        "pipeline_read": flag(),
        "pipeline_write": flag(),
        "fast_init": only(False, "the engine was not proven with it"),
        "ratio": only(1.0, "the optimizer's states lie in one place: all of them there, or device none"),
        "super_offload": only(False, "the optimizer is torch's own on the CPU too"),
    },
    "offload_param": {**_OFFLOAD, "buffer_size": count(1), "max_in_cpu": count()},
    "aio": {
        "block_size": count(1),
        "queue_depth": count(1),
        "intra_op_parallelism": count(1),
        "single_submit": flag(),
        "overlap_events": flag(),
        "use_gds": only(False, "the engine was not proven with it"),
    },
}
"""Keys of the sections below."""
