"""Another cluster than the default one: each command about a job names it. Tools that note their words stand for it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch import doctor_slurm
from launch.cli import run
from launch.jobs.report import report_run
from launch.pipeline.record import StageRecord
from launch.pipeline.slurm import check_clusters
from launch.slurm.needs import redirect_children
from launch.slurm.options import SlurmOptions
from tests.slurm.test_director import director, job  # noqa: F401
from trainer.doctor.node import Options
from trainer.errors import InputError
from trainer.job.directory import JobDirectory, read_lines

_TOOL = f"""#!{sys.executable}
import json, pathlib, sys
here = pathlib.Path(__file__)
with (here.parent / "said").open("a") as file:
    file.write(json.dumps([here.name, *sys.argv[1:]]) + "\\n")
"""
_SBATCH = """
if "--test-only" not in sys.argv:
    count = here.parent / "count"
    number = int(count.read_text()) + 1 if count.exists() else 17
    count.write_text(str(number))
    if number >= int((here.parent / "limit").read_text()):
        sys.exit("sbatch: error: Job violates accounting/QOS policy")
    print(f"{number};far")
"""
_QUEUED = ["17", "17", "N/A", "PENDING", "JobHeldUser", "N/A", "N/A", "0:00", "1:00:00", "", "(null)"]


class Tools:
    """SLURM's commands, which note what they were told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name in ("sinfo", "scancel", "sacct", "squeue"):
            self.write(name, "")
        self.write("sbatch", _SBATCH)
        self.write("scontrol", 'print("JobId=1 JobState=PENDING Reason=JobHeldUser Requeue=0 Restarts=1")')
        self.take(99)

    def write(self, name: str, body: str) -> None:
        """Write one of them."""
        (self.folder / name).write_text(f"{_TOOL}\n{body}\n")
        (self.folder / name).chmod(0o755)

    def take(self, count: int) -> None:
        """Let sbatch take so many jobs, the first of which is 17."""
        (self.folder / "limit").write_text(str(17 + count))

    def said(self, name: str) -> list[list[str]]:
        """List what one of them was told; of sbatch, without questions."""
        lines = (self.folder / "said").read_text().splitlines() if (self.folder / "said").exists() else []
        found = [json.loads(line) for line in lines]
        return [words[1:] for words in found if words[0] == name and "--test-only" not in words]


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tools:
    """Put them first on PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return Tools(tmp_path / "bin")


def pipeline(folder: Path, *, first: str = "far", second: str = "far") -> list[str]:
    """Write a pipeline of two stages and return the command that submits it."""
    (folder / "p.yaml").write_text(
        f"""\
output_dir: {folder}/out
stages:
  - name: made
    command: synth
    arguments: {{out: {folder}/corpus, clips: 8}}
    slurm: {{clusters: "{first}"}}
  - name: packed
    command: pack
    arguments: ["{{made.output}}", "{folder}/packed"]
    slurm: {{clusters: "{second}"}}
"""
    )
    return ["pipeline", str(folder / "p.yaml"), "--on", "slurm"]


def test_stages_wait_and_are_released_where_they_are(tools: Tools, tmp_path: Path) -> None:
    assert run(pipeline(tmp_path)) == 0
    assert [[word for word in words if word.startswith("--depend")] for words in tools.said("sbatch")] == [
        [],
        ["--dependency=afterok:17"],
    ]
    for name, number in (("made", "17"), ("packed", "18")):
        stage = JobDirectory.of(tmp_path / "out" / name)
        assert "#SBATCH --clusters=far" in stage.script.read_text()
        (line,) = read_lines(stage.submissions)
        assert (line["job_id"], line["cluster"]) == (number, "far")
    assert tools.said("scontrol") == [["--clusters=far", "release", "17"]]


def test_typed_again_the_queue_of_the_other_cluster_is_asked(tools: Tools, tmp_path: Path) -> None:
    command = pipeline(tmp_path)
    run(command)
    # Some releases put the cluster's name above what --noheader asks for.
    script = str(JobDirectory.of(tmp_path / "out" / "made").script)
    line = "\x1f".join([*_QUEUED, script])
    tools.write("squeue", f'print("CLUSTER: far")\nif "17" in sys.argv: print({line!r})')
    assert run(command) == 0
    assert all("--clusters=far" in words for name in ("squeue", "scontrol") for words in tools.said(name))
    assert ["--clusters=far", "--oneliner", "show", "job", "17"] in tools.said("scontrol")
    assert "--dependency=afterok:17" in tools.said("sbatch")[-1]
    report = report_run(tmp_path / "out" / "made")
    assert report.state == "HELD"
    assert report.next[0].startswith("scontrol --clusters=far release 17 ")


def test_a_refused_stage_takes_the_others_out_of_the_other_cluster(tools: Tools, tmp_path: Path) -> None:
    tools.take(1)
    with pytest.raises(InputError, match="no stage was left in the queue"):
        run(pipeline(tmp_path))
    assert tools.said("scancel") == [["--clusters=far", "17"]]


@pytest.mark.parametrize(
    ("first", "second"), [("far", "near"), ("far", ""), ("", "far"), ("far,near", "far,near"), ("all", "all")]
)
def test_no_stage_waits_for_a_job_that_may_be_elsewhere(tools: Tools, tmp_path: Path, first: str, second: str) -> None:
    for more in ([], ["--dry-run"]):
        with pytest.raises(InputError, match=r"stage packed waits for stage made, .*name one and the same cluster"):
            run([*pipeline(tmp_path, first=first, second=second), *more])
    assert tools.said("sbatch") == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("cluster", "refused"), [("far", False), ("near", True)])
def test_no_queued_stage_is_made_to_wait_for_one_elsewhere(tmp_path: Path, cluster: str, refused: bool) -> None:
    def ready(name: str, *after: str) -> Any:
        return SimpleNamespace(name=name, job=JobDirectory.of(tmp_path / name), stage=SimpleNamespace(after=after))

    stages = [ready("parent"), ready("child", "parent"), ready("grandchild", "child")]
    for queued in stages[1:]:
        queued.job.folder.mkdir(parents=True)
        queued.job.plan.write_text(json.dumps({"slurm": {"clusters": "far"}}))
    plans: Any = {"parent": SimpleNamespace(slurm={"clusters": cluster})}
    with pytest.raises(InputError) if refused else contextlib.nullcontext() as caught:
        check_clusters(stages, plans, {"child": "18", "grandchild": "19"})
    if caught is not None:
        (problem,) = caught.value.problems
        assert problem.startswith("stage child waits for stage parent, ")


def test_children_are_redirected_where_they_are(tools: Tools, tmp_path: Path) -> None:
    parent, child = JobDirectory.of(tmp_path / "parent"), JobDirectory.of(tmp_path / "child")
    common = {"pipeline": "p.yaml", "command": "train", "fingerprint": "", "content": {}, "output": None}
    StageRecord(stage="parent", children={"child": str(child.folder)}, **common).save(parent)  # type: ignore[arg-type]
    StageRecord(stage="child", needs={"parent": str(parent.folder)}, **common).save(child)  # type: ignore[arg-type]
    for one, number in ((parent, "7"), (child, "8")):
        one.add_submission(number, cluster="far")
    assert list(redirect_children(parent)) == ["stage child (job 8) now waits for afterok:7"]
    assert [words[0] for words in tools.said("scontrol")] == ["--clusters=far"] * 2
    assert tools.said("scontrol")[-1][1:] == ["update", "JobId=8", "Dependency=afterok:7"]


def test_submitted_anew_a_job_stays_on_its_cluster(
    tools: Tools,
    job: JobDirectory,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = json.loads(job.plan.read_text())
    plan["slurm"] = dataclasses.asdict(SlurmOptions(clusters="far,near", requeue=False))
    job.plan.write_text(json.dumps(plan))
    path = f"{tools.folder}:/usr/bin:/bin"
    process = director(job, "true", SLURM_CLUSTER_NAME="far", SLURM_JOB_END_TIME="9e9", PATH=path)
    said, _ = process.communicate(timeout=120)
    assert "submitted anew as 17" in said
    (words,) = tools.said("sbatch")
    assert "--clusters=far" in words
    # About itself a job asks where it is.
    assert tools.said("scontrol") == [["--oneliner", "show", "job", "7"]]


def test_an_examination_is_cancelled_where_it_is(tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> str | None:
        raise KeyboardInterrupt

    asked = Options(run=str(tmp_path), token="t")
    slurm = SlurmOptions(clusters="far")
    monkeypatch.setattr(doctor_slurm, "_wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        doctor_slurm.examine_on_slurm(tmp_path / "first", asked, slurm)
    assert tools.said("scancel") == [["--clusters=far", "17"]]
    tools.write("scancel", 'sys.exit("scancel: error: Socket timed out on send/recv operation")')
    given_up: Callable[..., str] = lambda *_: "cannot be asked about"  # noqa: E731
    monkeypatch.setattr(doctor_slurm, "_wait", given_up)
    found = doctor_slurm.examine_on_slurm(tmp_path / "second", asked, slurm)
    assert tools.said("scancel")[1:] == [["--clusters=far", "18"]]
    assert "scancel --clusters=far 18" in found["findings"][0]["value"]
