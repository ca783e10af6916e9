"""Options of a launch, from the command line and from a cluster's profile."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from launch.jobs.fields import field_help
from launch.jobs.options import CommonOptions, DebugOptions, LocalOptions, make_parser, parse_options
from launch.jobs.plan import WAYS, Way
from launch.slurm.options import SlurmOptions, seconds_of
from launch.slurm.profile import find_profile, read_profile
from trainer.errors import InputError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Profiles of whoever runs the tests stay out of them."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def problems_of(way: Way, *words: str) -> tuple[str, ...]:
    with pytest.raises(InputError) as raised:
        parse_options(way, words)
    return raised.value.problems


def test_every_option_has_a_line_of_help() -> None:
    for kind in (SlurmOptions, CommonOptions, LocalOptions, DebugOptions):
        assert set(field_help(kind)) == {field.name for field in dataclasses.fields(kind)}
    for way in WAYS:
        assert "usage: signscale launch" in make_parser(way).format_help()


def test_dashes_may_be_typed_for_underscores() -> None:
    options = parse_options("slurm", ["--gpus-per-node=a100:4", "--cpus-per-task", "6", "--no-requeue", "--dry-run"])
    assert (options.slurm.gpus_per_node, options.slurm.cpus_per_task) == ("a100:4", 6)
    assert not options.slurm.requeue
    assert options.dry_run
    assert parse_options("debug", ["--break"]).debug.stop_at_failure


def test_ranks_follow_from_gpus() -> None:
    for words, ranks, gpus in (
        ([], 1, 0),
        (["--ranks_per_node", "3"], 3, 0),
        (["--gpus_per_node", "8"], 8, 8),
        (["--gpus_per_node", "h100:2"], 2, 2),
    ):
        slurm = parse_options("slurm", words).slurm
        assert (slurm.ranks, slurm.gpu_count) == (ranks, gpus)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("1-2", 93600), ("1-0:30", 88200), ("1-00:00:01", 86401)],
)
def test_times_are_read_as_sbatch_reads_them(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "1h", "1:2:3:4", "-5", "1-", "1.5"])
def test_what_is_no_time_is_none(text: str) -> None:
    assert seconds_of(text) is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nodes", "0"], "--nodes 0: expected 1 or more"),
        (["--gpus_per_node", "a100"], "expected a count, or TYPE:COUNT"),
        (["--mem", "64 GB"], "expected a size such as 64G"),
        (["--mem", "64G", "--mem_per_cpu", "4G"], "sbatch takes one of them"),
        (["--mem_per_gpu", "64G"], "there are no GPUs"),
        (["--time", "tomorrow"], "expected minutes, H:MM:SS or D-HH:MM:SS"),
        (["--time", "4"], "is 240 s, and the job is told to save 180 s before its end"),
        (["--time", "0:30", "--signal_seconds", "20"], "ask for more time, or lower --signal_seconds"),
        (["--venv", "a", "--conda", "b"], "one environment can be active"),
        (["--container_mounts", "/data"], "there is no --container"),
        (["--container", "a.sif", "--container_mounts", "/a,/b"], "without commas"),
        (["--export", "PATH,KEY=s3cr3t"], "names of variables, without values"),
        (["--sbatch", "output=x"], "is the job's own: logs lie in RUN/job/logs"),
        (["--sbatch", "ntasks-per-node=4"], "follows from --nodes"),
        (["--sbatch", "partition=a"], "is an option of its own, --partition"),
        (["--sbatch", "begin=now+1hour", "--no_requeue"], "would be held up by this line again"),
        (["--sbatch", "hold", "--no_requeue"], "would be held up by this line again"),
        (["--sbatch", "4=5"], "expected KEY=VALUE"),
        (["--sbatch", "gres=gpu:4"], "use --gpus_per_node"),
        (["--sbatch=--gres=craynetwork:1,gpu"], "use --gpus_per_node"),
        (["--sbatch", "tres-per-task=cpu=4,gres/gpu=1"], "use --gpus_per_node"),
        (["--sbatch", "gpus=4"], "use --gpus_per_node"),
        (["--sbatch", "gpus-per-task=a100:1"], "use --gpus_per_node"),
        (["--sbatch", "gpus-per-node=4"], "is an option of its own, --gpus_per_node"),
        (["--partitoin", "a"], "unknown option --partitoin; did you mean --partition?"),
        (["--max_attempts_without_progress", "0"], "expected 1 or more"),
    ],
)
def test_what_no_cluster_could_accept_is_refused(words: list[str], said: str) -> None:
    assert said in "\n".join(problems_of("slurm", *words))


def test_all_mistakes_are_named_at_once() -> None:
    assert len(problems_of("slurm", "--nodes", "0", "--mem", "much", "--time", "never", "--sbatch", "wrap=x")) == 4


def test_resources_that_are_no_gpus_may_be_asked_for() -> None:
    for extra in ("gres=craynetwork:1", "gres=gpumem:4", "gres-flags=enforce-binding"):
        assert parse_options("slurm", ["--sbatch", extra]).slurm.sbatch == (extra,)


def test_values_of_the_environment_are_refused_and_not_repeated(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("sbatch: ['--export=ALL,KEY=s3cr3t']\n")
    for words in (["--sbatch", "export=ALL,KEY=s3cr3t"], ["--profile", str(tmp_path / "p.yaml")]):
        [said] = problems_of("slurm", *words)
        assert "name the variables with --export" in said
        assert "s3cr3t" not in said


def test_the_example_profile_is_one() -> None:
    options = parse_options("slurm", ["--profile", "example", "--time", "60", "--modules", "git"])
    assert options.profile == str(ROOT / "configs" / "clusters" / "example.yaml")
    slurm = options.slurm
    assert (slurm.gpus_per_node, slurm.ranks, slurm.cpus_per_rank, slurm.preflight) == ("a100:4", 4, 8, True)
    # The command line goes first; what may be given again is added.
    assert (slurm.time, slurm.modules) == ("60", ("gcc/12.2", "cuda/12.4", "git"))


def test_profiles_are_found_by_name_and_by_path(tmp_path: Path) -> None:
    own = tmp_path / "config" / "signscale" / "clusters"
    own.mkdir(parents=True)
    assert find_profile(None) is None
    (own / "default.yaml").write_text("partition: mine\nrequeue: false\nnodes: 2\n")
    (own / "big.yaml").write_text("partition: big\n")
    default = parse_options("slurm", []).slurm
    assert (default.partition, default.requeue, default.nodes) == ("mine", False, 2)
    assert parse_options("slurm", ["--profile", "big"]).slurm.partition == "big"
    assert parse_options("slurm", ["--profile", str(own / "big.yaml")]).slurm.partition == "big"
    assert "known are big, default, example" in problems_of("slurm", "--profile", "small")[0]


def test_mistakes_in_a_profile_are_named_with_their_key(tmp_path: Path) -> None:
    profile = tmp_path / "p.yaml"
    profile.write_text("partitoin: a\nnodes: two\nrequeue: 'no'\nmodules: {a: 1}\ntime: 60\nmem: 1.5\n")
    with pytest.raises(InputError) as raised:
        read_profile(profile)
    said = "\n".join(raised.value.problems)
    assert len(raised.value.problems) == 5
    for part in (
        f"{profile}: unknown key 'partitoin'; did you mean partition?",
        "nodes: expected a whole number, found 'two'",
        "requeue: expected true or false",
        "modules: expected a text, or a list of them",
        "mem: expected a text",
    ):
        assert part in said
    profile.write_text("- a\n")
    with pytest.raises(InputError, match="expected lines of `key: value`"):
        read_profile(profile)
    profile.write_text("a: [\n")
    with pytest.raises(InputError, match="not a YAML file"):
        read_profile(profile)
    with pytest.raises(InputError, match="cannot read the profile"):
        read_profile(tmp_path / "none.yaml")
