"""A pipeline as jobs: each stage waits for those it needs, and for what they did; all are in the queue, or none."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

import pytest

from launch.jobs.options import parse_options
from launch.jobs.plan import Plan
from launch.jobs.report import report_run
from launch.pipeline.deciding import Decision, decide
from launch.pipeline.definition import Definition, Stage
from launch.pipeline.resolving import Ready
from launch.pipeline.slurm import find_queued, submit_pipeline
from launch.prepare import prepare
from launch.sweep.table import record
from tests.cluster import stub
from tests.cluster.cluster import Cluster
from tests.cluster.jobs import StubJob
from trainer.errors import InputError
from trainer.job.directory import JobDirectory, read_lines

SIZE = ["--launcher", "plain", "--nodes", "1", "--ranks_per_node", "1", "--cpus_per_task", "1", "--mem", "100"]


class StubPipeline:
    """Stages of the stub trainer, submitted as those of a file are."""

    def __init__(
        self, cluster: Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch, options: Sequence[str] = ()
    ) -> None:
        self.cluster, self.folder, self.options = cluster, folder, options
        monkeypatch.setenv("SLURM_CONF", cluster.env()["SLURM_CONF"])
        self.stages: list[Ready] = []
        self.words: dict[str, list[str]] = {}

    def add(self, name: str, *after: str, words: Sequence[str] = ("--steps", "5"), command: str = "train") -> None:
        """Add a stage; `command` is what it passes for."""
        stage = Stage(name=name, command=command, arguments=(), after=after, options={}, own={}, line=1)
        run = self.folder / name
        content = {"words": list(words)}
        self.stages.append(Ready(stage=stage, words=(), folder=run, output=run, content=content))
        self.words[name] = list(words)

    def run(self, name: str) -> Path:
        return self.folder / name

    def job(self, name: str) -> JobDirectory:
        return JobDirectory.of(self.run(name))

    def number(self, name: str) -> str:
        """The newest job of a stage."""
        return str(read_lines(self.job(name).submissions)[-1]["job_id"])

    @property
    def definition(self) -> Definition:
        """The pipeline."""
        stages = tuple(ready.stage for ready in self.stages)
        return Definition(file=self.folder / "pipeline.yaml", name="test", output_dir=self.folder, stages=stages)

    def decide(self, start: str | None = None) -> tuple[Decision, ...]:
        """What is to be done."""
        return decide(self.definition, self.stages, start)

    def submit(self, start: str | None = None) -> None:
        """Do what the command does."""
        decisions = self.decide(start)
        queued = find_queued([decision.ready for decision in decisions if decision.run])
        plans = {
            decision.ready.name: self._plan(decision.ready)
            for decision in decisions
            if decision.run and decision.ready.name not in queued
        }
        submit_pipeline(self.definition, decisions, plans, queued)

    def _plan(self, ready: Ready) -> Plan:
        name = f"test-{self.folder.parent.name}-{ready.name}"
        options = parse_options("slurm", ["--run", str(ready.folder), "--name", name, *SIZE, *self.options])
        command = ["-m", "tests.cluster.stub", "--output_dir", str(ready.folder), *self.words[ready.name]]
        return prepare("slurm", options, command)

    def dependency(self, name: str) -> str:
        """What SLURM still waits for before a stage."""
        return self.cluster.run("squeue", "-h", "-j", self.number(name), "-o", "%E").stdout.strip()


@pytest.fixture
def pipeline(shared_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StubPipeline:
    return StubPipeline(shared_cluster, tmp_path / "out", monkeypatch)


@pytest.mark.slow  # The next test runs a whole chain too.
def test_stages_run_one_after_the_other(pipeline: StubPipeline) -> None:
    pipeline.add("teacher")
    pipeline.add("targets", "teacher")
    pipeline.add("student", "targets", "teacher")
    pipeline.submit()
    for name in ("teacher", "targets", "student"):
        end = pipeline.cluster.wait_for_end(pipeline.number(name))
        assert end.state == "COMPLETED"
        assert pipeline.job(name).last_word().word == "DONE"
    histories = [pipeline.job(name).history() for name in ("teacher", "targets", "student")]
    assert [len(history) for history in histories] == [1, 1, 1]
    assert histories[0][0].ended < histories[1][0].began
    assert histories[1][0].ended < histories[2][0].began
    assert not any(decision.run for decision in pipeline.decide())


def test_a_failing_teacher_takes_its_students_along(pipeline: StubPipeline) -> None:
    pipeline.add("teacher", words=["--mistake", "data_dir: no such folder"])
    pipeline.add("targets", "teacher")
    pipeline.add("student", "targets")
    pipeline.submit()
    for name in ("targets", "student"):
        pipeline.cluster.wait_for_state(pipeline.number(name), "CANCELLED")
    for name in ("targets", "student"):
        report = report_run(pipeline.run(name))
        assert report.state == "CANCELLED"
        assert "stage teacher failed: data_dir: no such folder" in report.why
        assert not pipeline.job(name).history()
    # Mended and typed again, it goes on from there.
    pipeline.words["teacher"] = ["--steps", "5"]
    pipeline.submit()
    assert pipeline.cluster.wait_for_end(pipeline.number("student")).state == "COMPLETED"
    assert pipeline.job("student").last_word().word == "DONE"


def test_a_resubmitted_parent_takes_its_children_along(pipeline: StubPipeline) -> None:
    # Where requeueing is forbidden, the parent goes on under another number, twice, each attempt making progress.
    pipeline.options = ["--no_requeue"]
    pipeline.add("teacher", words=["--steps", "12", "--save_every", "2", "--fail_after", "5"])
    pipeline.add("student", "teacher")
    pipeline.submit()
    first, child = pipeline.number("teacher"), pipeline.number("student")
    pipeline.cluster.wait_until(lambda: len(read_lines(pipeline.job("teacher").submissions)) == 2, "teacher goes on")
    pipeline.cluster.wait_for_state(first, "FAILED")
    assert pipeline.cluster.wait_for_end(child).state == "COMPLETED"
    assert pipeline.number("student") == child
    assert pipeline.number("teacher") != first
    assert pipeline.job("teacher").last_word().word == "DONE"
    assert pipeline.job("teacher").history()[-1].ended < pipeline.job("student").history()[0].began
    weights = stub.expected(12, 1)
    assert weights in (pipeline.run("teacher") / "checkpoints" / "step-000000012" / "weights.json").read_text()


def test_what_waits_for_a_stage_that_is_submitted_again_waits_for_the_new_job(pipeline: StubPipeline) -> None:
    pipeline.options = ["--sbatch", "begin=now+1hour"]
    pipeline.add("teacher")
    pipeline.add("student", "teacher")
    pipeline.submit()
    first, child = pipeline.number("teacher"), pipeline.number("student")
    assert pipeline.dependency("student").startswith(f"afterok:{first}")
    # The child shall survive the cancelling, whichever comes first.
    pipeline.cluster.run("scontrol", "update", f"JobId={child}", "Dependency=")
    pipeline.cluster.run("scancel", first)
    pipeline.cluster.wait_for_state(first, "CANCELLED")
    pipeline.submit()
    assert pipeline.number("student") == child
    assert pipeline.number("teacher") != first
    assert pipeline.dependency("student").startswith(f"afterok:{pipeline.number('teacher')}")
    pipeline.cluster.run("scancel", pipeline.number("teacher"), child)


def test_what_is_to_be_done_again_is_not_done(pipeline: StubPipeline) -> None:
    pipeline.add("targets", command="extract")
    pipeline.submit()
    assert pipeline.cluster.wait_for_end(pipeline.number("targets")).state == "COMPLETED"
    assert not any(decision.run for decision in pipeline.decide())
    pipeline.options = ["--sbatch", "begin=now+1hour"]
    pipeline.submit("targets")
    # A job that never comes to its turn leaves the stage undone.
    pipeline.cluster.run("scancel", pipeline.number("targets"))
    pipeline.cluster.wait_for_state(pipeline.number("targets"), "CANCELLED")
    assert [decision.run for decision in pipeline.decide()] == [True]


def test_a_stage_that_starts_too_early_says_so(pipeline: StubPipeline) -> None:
    pipeline.add("teacher", words=["--steps", "100000", "--step_seconds", "0.5"])
    pipeline.add("student", "teacher")
    pipeline.submit()
    child = pipeline.number("student")
    pipeline.cluster.wait_until(lambda: pipeline.job("teacher").history(), "the teacher has begun")
    # As if SLURM believed that the teacher had succeeded.
    pipeline.cluster.run("scontrol", "update", f"JobId={child}", "Dependency=")
    end = pipeline.cluster.wait_for_state(child, "FAILED")
    pipeline.cluster.run("scancel", pipeline.number("teacher"))
    assert end.restarts == 0
    word = pipeline.job("student").last_word()
    assert word.word == "FAILED"
    assert word.reason == "not begun: stage teacher is not done yet"
    assert not (pipeline.run("student") / "checkpoints").exists()


def test_a_refused_stage_leaves_nothing_behind(
    pipeline: StubPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.add("teacher")
    pipeline.add("targets", "teacher")
    pipeline.add("student", "targets")
    # The real sbatch, which is given an impossible partition at the third submission.
    count, real = tmp_path / "count", pipeline.cluster.run("sh", "-c", "command -v sbatch").stdout.strip()
    wrapper = tmp_path / "bin" / "sbatch"
    wrapper.parent.mkdir()
    wrapper.write_text(
        f'#!/bin/sh\ncase "$*" in *--test-only*) exec {real} "$@";; esac\necho >>{count}\n'
        f'[ "$(wc -l <{count})" -eq 3 ] && exec {real} --partition=nowhere "$@"\nexec {real} "$@"\n'
    )
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    with pytest.raises(InputError) as refused:
        pipeline.submit()
    assert "stage student: sbatch refused the job" in refused.value.problems[0]
    assert "nowhere" in refused.value.problems[0]
    assert refused.value.problems[-1] == "no stage was left in the queue, and no file changed"
    assert not pipeline.folder.exists()
    queue = pipeline.cluster.run("squeue", "-h", "-o", "%j").stdout
    assert f"test-{tmp_path.name}" not in queue
    # And nothing had begun.
    monkeypatch.undo()


def test_a_stage_that_may_never_start_is_queued_with_a_warning(
    pipeline: StubPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    """More nodes than there are now: as for a single job, they may come back."""
    pipeline.add("teacher")
    pipeline.add("student", "teacher")
    pipeline.options = ("--nodes", "99")
    pipeline.submit()
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert ["teacher" in line and "--nodes" in line for line in warnings] == [True, False]
    assert all("may never start" in line for line in warnings)
    for name in ("student", "teacher"):
        assert pipeline.cluster.job(pipeline.number(name)).state == "PENDING"
        pipeline.cluster.run("scancel", pipeline.number(name))


def test_the_last_run_of_a_sweep_shows_the_table(shared_cluster: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    settings = [{"seed": "0"}, {"seed": "1"}, {"seed": "2"}]
    record(out, [(out / str(task), one) for task, one in enumerate(settings)])
    for task, wer in enumerate((30.0, 10.0, 20.0)):
        (out / str(task)).mkdir(parents=True)
        (out / str(task) / "metrics.jsonl").write_text(f'{{"step": 5, "val/wer": {wer}}}\n')
    job = StubJob(shared_cluster, out, nodes=1, ranks_per_node=1, stub_options=["--steps", "5"], tasks=3)
    for task in range(3):
        assert shared_cluster.wait_for_end(f"{job.job_id}_{task}").state == "COMPLETED"
    shown = [text for path in job.job.logs.glob("slurm*.out") if "all runs of this sweep" in (text := path.read_text())]
    assert shown
    table = shown[0].partition("all runs of this sweep have ended\n")[2].splitlines()
    assert [line.split()[0] for line in table[:4]] == ["seed", "1", "2", "0"]
    assert table[4] == f"3 of 3 runs are done; best so far: {out}/1"
    assert (out / "sweep.txt").read_text().splitlines() == table[:5]
    # A task's folder is a run like any other to those who ask for it.
    report = report_run(out / "1")
    assert (report.run, report.state, report.job_ids) == (out / "1", "DONE", (job.job_id,))
