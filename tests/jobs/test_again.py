"""The command that starts a job again means what the first one meant."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

from launch.jobs.again import command_again
from launch.jobs.options import LaunchOptions, parse_options
from launch.jobs.plan import Plan, unique_name
from launch.pipeline.record import StageRecord
from trainer.job.directory import JobDirectory

COMMAND = ("train", "--config", "/a folder/recipe.yaml", "--output_dir", "/runs/it's $(mine)")


def remembered(options: LaunchOptions, run: Path, **fields: object) -> dict[str, object]:
    plan = Plan(
        way="slurm",
        name=options.common.name or run.name,
        run=run,
        command=COMMAND,
        module="trainer.train",
        arguments=(),
        interpreter="/usr/bin/python3",
        max_attempts_without_progress=options.common.max_attempts_without_progress,
        meeting_seconds=float(options.common.meeting_seconds),
        created=0.0,
        slurm=dataclasses.asdict(options.slurm),
    )
    return dataclasses.asdict(plan) | {"run": str(run)} | fields


def test_all_options_of_a_batch_job_come_back(tmp_path: Path) -> None:
    typed = [
        *("--nodes", "2", "--gpus_per_node", "a100:4", "--time", "8:00:00", "--exclusive", "--no_requeue"),
        *("--modules", "cuda/12", "--modules", "gcc", "--setup", "export A='b c'", "--comment", "$(date)"),
        *("--meeting_seconds", "60", "--max_attempts_without_progress", "5", "--name", "a name"),
    ]
    first = parse_options("slurm", typed)
    command = command_again(remembered(first, tmp_path), JobDirectory.of(tmp_path))
    assert command is not None
    words = shlex.split(command)
    cut = words.index("--")
    assert words[:3] == ["signscale", "launch", "slurm"]
    again = parse_options("slurm", words[3:cut])
    assert (again.slurm, again.common) == (first.slurm, first.common)
    assert tuple(words[cut + 1 :]) == COMMAND


def test_a_name_that_was_not_given_is_not_asked_for(tmp_path: Path) -> None:
    options = parse_options("slurm", [])
    for name in (tmp_path.name, unique_name(tmp_path)):
        assert "--name" not in str(command_again(remembered(options, tmp_path, name=name), JobDirectory.of(tmp_path)))
    other = remembered(options, tmp_path, name=unique_name(tmp_path / "other"))
    assert "--name" in str(command_again(other, JobDirectory.of(tmp_path)))


def test_a_stage_is_started_by_its_pipeline(tmp_path: Path) -> None:
    job = JobDirectory.of(tmp_path)
    record = StageRecord(
        pipeline="/my pipelines/a.yaml", stage="teacher", command="train", fingerprint="", content={}, output=None
    )
    record.save(job)
    plan = remembered(parse_options("slurm", []), tmp_path)
    assert command_again(plan, job) == "signscale pipeline '/my pipelines/a.yaml' --on slurm"
