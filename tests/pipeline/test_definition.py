"""A pipeline file says what it means, and all that is wrong with it is told before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.pipeline.definition import read_definition
from launch.pipeline.planning import option_words, plan_stages
from launch.pipeline.resolving import Ready, absolute_words, resolve
from tests.conftest import ROOT
from trainer.errors import InputError

TEACHER = "  - {name: teacher, command: train, arguments: {data_dir: corpus}}\n"


def write(tmp_path: Path, stages: str, head: str = "output_dir: out\n") -> Path:
    path = tmp_path / "p.yaml"
    path.write_text(f"{head}stages:\n{stages}")
    return path


def read(tmp_path: Path, stages: str, head: str = "output_dir: out\n") -> dict[str, Ready]:
    return {ready.name: ready for ready in resolve(read_definition(write(tmp_path, stages, head)))}


def refusal(tmp_path: Path, stages: str, head: str = "output_dir: out\n") -> list[str]:
    with pytest.raises(InputError) as refused:
        read(tmp_path, stages, head)
    return [problem.replace(str(tmp_path / "p.yaml"), "p.yaml") for problem in refused.value.problems]


@pytest.mark.parametrize("name", ["pipeline.yaml", "pipeline_demo.yaml"])
def test_shipped_pipelines_resolve(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    definition = read_definition(Path("configs") / name)
    stages = {ready.name: ready for ready in resolve(definition)}
    out = definition.output_dir
    assert stages["student"].folder == out / "student"
    assert f"--soft_targets={out}/teacher/soft_targets/train" in stages["student"].words
    assert stages["compare"].words[:2] == (f"{out}/teacher", f"{out}/student")
    assert list(stages)[-1] == "compare"
    two = [stages["teacher"], stages["compare"]]
    plans = plan_stages(definition, two, "slurm", ["--partition", "main", "--time", "90"])
    teacher, compare = plans["teacher"][0], plans["compare"][0]
    assert teacher.slurm["time"] == compare.slurm["time"] == "90"
    assert (compare.nodes, compare.ranks_per_node, compare.launcher, compare.slurm["gpus_per_node"]) == (
        *(1, 1, "plain"),
        "",
    )
    assert compare.arguments[0] == str(ROOT / out / "teacher")
    assert teacher.name == f"{definition.name}-teacher"


def test_values_are_what_they_are_on_a_command_line(tmp_path: Path) -> None:
    stages = read(
        tmp_path,
        "  - name: t\n    command: train\n    slurm: {time: 12:00:00}\n    arguments:\n"
        "      data_dir: ann/{split}.x\n      learning_rate: 1e-3\n      augment: true\n"
        "      streams: {pose: [0, 99]}\n      skip_clips: ['a, b', c]\n",
    )
    assert stages["t"].content["learning_rate"] == 1e-3
    assert stages["t"].content["streams"] == {"pose": [0, 99]}
    assert stages["t"].content["skip_clips"] == ["a, b", "c"]
    assert stages["t"].content["augment"] is True
    assert option_words(stages["t"].stage.options["slurm"]) == ["--time=12:00:00"]


def test_every_problem_of_form_is_told_at_once(tmp_path: Path) -> None:
    found = refusal(
        tmp_path,
        "  - {name: a, comand: train}\n  - {name: a, command: trian}\n"
        "  - {name: c, command: evaluate, arguments: {checkpoint: '{b.run}', split: '{a.runn}'}, after: [d]}\n",
        "output_dir: out\nstges: 1\n",
    )
    assert found == [
        "p.yaml:2: unknown key 'stges'; did you mean stages?",
        "p.yaml:4: stage a: unknown key 'comand'; did you mean command?",
        "p.yaml:4: stage a: command: not given; expected one of "
        "synth, pack, train, evaluate, extract, export, predict, compare, score",
        "p.yaml:5: stage a: command: 'trian' cannot be a stage; did you mean train?",
        "p.yaml:5: stage a: there is another stage of this name; choose another name",
        "p.yaml:6: stage c: there is no stage 'd'; expected one of a, a, c",
        "p.yaml:6: stage c: there is no stage 'b'; expected one of a, a, c",
        "p.yaml:6: stage c: {a.runn}: did you mean run?",
    ]


def test_every_command_line_is_parsed(tmp_path: Path) -> None:
    found = refusal(
        tmp_path,
        "  - {name: t, command: train, arguments: {data_dir: x, learning_rate: fast, droput: 0.1}}\n"
        "  - {name: e, command: evaluate, arguments: {checkpoint: '{t.run}'}}\n"
        "  - {name: s, command: score, arguments: {reference: a.stm}, after: []}\n"
        "  - {name: h, command: train, arguments: [--help], after: []}\n",
    )
    # Stage e refers to one that has problems itself: there is nothing to say of it yet.
    assert len(found) == 4, found
    assert found[0].startswith("p.yaml:3: stage t: command line: learning_rate: ")
    assert found[1] == "p.yaml:3: stage t: command line: unknown flag --droput; did you mean --dropout?"
    assert "stage s: signscale score: the following arguments are required: --hypothesis" in found[2]
    assert found[3] == "p.yaml:6: stage h: --help: asks a question, which is no work for a stage; drop it"


def test_stages_may_stand_in_any_order_but_not_in_a_circle(tmp_path: Path) -> None:
    evaluate = "  - {name: e, command: evaluate, after: [], arguments: {checkpoint: '{teacher.run}'}}\n"
    stages = read(tmp_path, evaluate + TEACHER.replace("}}", "}, after: []}"))
    assert list(stages) == ["teacher", "e"]
    assert stages["e"].output == Path("out/teacher/evaluation")
    assert stages["e"].folder == Path("out/e")
    circle = refusal(tmp_path, evaluate + TEACHER)
    assert circle == ["p.yaml: stages wait for each other: e after teacher after e; mend their `after`"]


def test_only_a_training_is_a_run(tmp_path: Path) -> None:
    stages = "  - {name: x, command: extract, arguments: {checkpoint: '{teacher.run}'}}\n"
    other = "  - {name: s, command: train, arguments: {data_dir: corpus, soft_targets: '{x.run}'}}\n"
    assert refusal(tmp_path, TEACHER + stages + other) == [
        "p.yaml:5: stage s: {x.run}: only a train stage is a run; {NAME.output} is what another one leaves behind"
    ]


def test_paths_of_a_batch_job_s_command_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stages = read(
        tmp_path,
        "  - {name: made, command: synth, arguments: {out: corpus, clips: 8}}\n"
        "  - {name: packed, command: pack, arguments: [corpus, packed, --dtype, float32]}\n",
    )
    assert absolute_words(stages["made"]) == (f"--out={tmp_path}/corpus", "--clips=8")
    assert absolute_words(stages["packed"]) == (f"{tmp_path}/corpus", f"{tmp_path}/packed", "--dtype", "float32")


def test_two_stages_may_not_share_a_run(tmp_path: Path) -> None:
    other = TEACHER.replace("name: teacher", "name: b").replace("corpus}", "corpus, output_dir: out/teacher}")
    found = refusal(tmp_path, TEACHER + other)
    assert found[0] == (
        "p.yaml:4: stage b: writes to out/teacher, as stage teacher does; give one of them another folder"
    )


def test_a_key_that_stands_twice_is_an_error(tmp_path: Path) -> None:
    assert refusal(tmp_path, TEACHER, "output_dir: a\noutput_dir: b\n") == [
        "p.yaml:2: output_dir: stands there twice; keep one"
    ]


def test_launch_options_are_checked_for_all_stages(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        TEACHER.replace("}}", "}, slurm: {nods: 2}}")
        + "  - {name: b, command: train, arguments: {data_dir: corpus}, slurm: {name: mine}}\n",
        "output_dir: out\nslurm: {mem: lots}\n",
    )
    definition = read_definition(path)
    with pytest.raises(InputError) as refused:
        plan_stages(definition, resolve(definition), "slurm", [])
    first, second = refused.value.problems
    assert first == f"{path}:4: stage teacher: signscale launch slurm: unknown option --nods; did you mean --nodes?"
    assert second == f"{path}:5: stage b: slurm: name: is set by the pipeline; drop it"
