"""What is done is left alone; what changed is done again only where that destroys nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from launch.pipeline.deciding import decide
from launch.pipeline.definition import Definition, Stage
from launch.pipeline.planning import make_records
from launch.pipeline.record import begin, find_lacking
from launch.pipeline.resolving import Ready
from trainer.errors import InputError
from trainer.files import write_json
from trainer.job.directory import AttemptRecord, JobDirectory, Word


class Chain:
    """A teacher, its soft targets, a student and a comparison, whose files are written as their commands do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.contents: dict[str, dict[str, object]] = {
            name: {"seed": 1} for name in ("teacher", "targets", "student", "compare")
        }

    @property
    def stages(self) -> list[Ready]:
        return [
            self._ready("teacher", "train", (), ()),
            self._ready("targets", "extract", ("teacher",), ("{teacher.run}",)),
            self._ready("student", "train", ("targets",), ("{targets.output}",)),
            self._ready("compare", "compare", ("student", "teacher"), ("{teacher.run}", "{student.run}")),
        ]

    def _ready(self, name: str, command: str, after: tuple[str, ...], arguments: tuple[str, ...]) -> Ready:
        stage = Stage(name=name, command=command, arguments=arguments, after=after, options={}, own={}, line=1)
        folder = self.folder / name
        output = None if command == "compare" else folder
        return Ready(stage=stage, words=(), folder=folder, output=output, content=self.contents[name])

    @property
    def definition(self) -> Definition:
        stages = tuple(ready.stage for ready in self.stages)
        return Definition(file=self.folder / "p.yaml", name="p", output_dir=self.folder, stages=stages)

    def job(self, name: str) -> JobDirectory:
        return JobDirectory.of(self.folder / name)

    def do(self, *names: str, word: Word = "DONE", reason: str = "finished", code: int = 0, weights: str = "a") -> None:
        """Do stages, as an attempt of each would."""
        stages = {ready.name: ready for ready in self.stages}
        records = make_records(self.definition, list(stages.values()))
        for name in names:
            job, attempt = self.job(name), f"local-{time.monotonic_ns()}-1"
            records[name].save(job)
            assert begin(job) is None
            job.begin(AttemptRecord(attempt=attempt, began=time.time()))
            if name != "compare":
                checkpoints = self.folder / name / "checkpoints"
                place = checkpoints / "step-1" if name != "targets" else self.folder / name
                place.mkdir(parents=True, exist_ok=True)
                write_json(place / "manifest.json", {"weights": weights})
                if name != "targets":
                    write_json(checkpoints / "best.json", {"checkpoint": "step-1", "value": 1.0})
            job.leave_word(word, attempt=attempt, step=None, reason=reason, code=code)
            job.end(attempt, step=None, word=word, reason=reason)

    def decide(self, start: str | None = None) -> dict[str, str]:
        """Why each stage is run that is."""
        return {one.ready.name: one.why for one in decide(self.definition, self.stages, start) if one.run}

    def refusal(self, start: str | None = None) -> Sequence[str]:
        with pytest.raises(InputError) as refused:
            decide(self.definition, self.stages, start)
        return [problem.replace(str(self.folder), "DIR") for problem in refused.value.problems]


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path)


def test_everything_is_run_once(chain: Chain) -> None:
    assert list(chain.decide()) == ["teacher", "targets", "student", "compare"]
    chain.do("teacher", "targets")
    assert list(chain.decide()) == ["student", "compare"]
    chain.do("student", "compare")
    assert chain.decide() == {}


def test_a_stage_that_was_broken_off_goes_on(chain: Chain) -> None:
    chain.do("teacher", word="RESUME", reason="stopped on request")
    assert chain.decide()["teacher"] == "goes on: stopped on request"
    chain.do("teacher")
    chain.do("targets", word="FAILED", reason="disk full")
    assert chain.decide()["targets"] == "goes on: disk full"
    assert "teacher" not in chain.decide()


def test_done_but_not_as_well_as_asked_for_is_not_done(chain: Chain) -> None:
    chain.do("teacher", code=1, reason="target missed")
    assert "teacher" in chain.decide()
    make_records(chain.definition, chain.stages)["targets"].save(chain.job("targets"))
    assert find_lacking(chain.job("targets")) == [
        "stage teacher is done, but not as well as was asked for: target missed"
    ]


def test_another_recipe_in_a_finished_run_is_refused(chain: Chain) -> None:
    chain.do("teacher", "targets", "student", "compare")
    chain.contents["teacher"] = {"seed": 2}
    assert chain.refusal()[0] == (
        "DIR/p.yaml:1: stage teacher: DIR/teacher holds a run of another recipe (seed 1 -> 2); "
        "name another output_dir, or move that run away: mv DIR/teacher DIR/teacher-old"
    )


def test_another_definition_of_other_stages_is_refused_until_asked_for(chain: Chain) -> None:
    chain.do("teacher", "targets", "student")
    chain.contents["targets"] = {"seed": 2}
    found = chain.refusal()
    assert found[0].endswith(
        "is done by another definition (seed 1 -> 2); take it back, or do the stage again: --from targets"
    )
    # Doing it again would train the student over its finished run.
    assert chain.refusal("targets")[0].startswith("DIR/p.yaml:1: stage student: DIR/student is trained to its end")


def test_from_does_a_stage_and_what_follows_again(chain: Chain) -> None:
    chain.do("teacher", "targets", "student", "compare")
    assert list(chain.decide("compare")) == ["compare"]
    assert chain.refusal("studnt") == ["--from studnt: DIR/p.yaml has no stage of that name; did you mean student?"]


def test_from_needs_what_comes_before(chain: Chain) -> None:
    chain.do("teacher")
    assert chain.refusal("student")[0].endswith(
        "stage targets: is not done, so that --from student has nothing to start from; leave --from out"
    )


def test_what_works_from_another_teacher_is_outdated(chain: Chain) -> None:
    chain.do("teacher", "targets", "student", "compare")
    # Launched once more, with the same result: nothing follows from that.
    chain.do("teacher")
    assert chain.decide() == {}
    # Trained anew.
    chain.do("teacher", weights="b")
    assert chain.refusal() == [
        "DIR/p.yaml:1: stage student: DIR/student was trained from an earlier targets; move it away to train it again: "
        "mv DIR/student DIR/student-old"
    ]
    (chain.folder / "student").rename(chain.folder / "student-old")
    assert chain.decide() == {
        "targets": "again, since teacher changed",
        "student": "new",
        "compare": "again, since student, teacher changed",
    }


def test_why_a_stage_was_not_begun_is_followed_to_its_cause(chain: Chain) -> None:
    records = make_records(chain.definition, chain.stages)
    for name in ("targets", "student"):
        records[name].save(chain.job(name))
    assert find_lacking(chain.job("targets")) == ["stage teacher has not been started"]
    chain.do("teacher", word="FAILED", reason="no such corpus")
    assert begin(chain.job("targets")) == "not begun: stage teacher failed: no such corpus"
    assert begin(chain.job("student")) == (
        "not begun: stage targets was not begun, since stage teacher failed: no such corpus"
    )
