"""The batch script: one readable file, in which nothing a user typed can be taken for anything but a value."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2

from launch.jobs.plan import Plan
from launch.slurm.options import SlurmOptions, has_control_characters
from trainer.errors import InputError

_TEMPLATE = Path(__file__).parent / "job.sh.j2"
# Options whose name and meaning are sbatch's own.
_PASSED_ON = (
    *("time", "partition", "account", "qos", "constraint", "exclude", "nodelist", "reservation", "licenses"),
    *("gpus_per_node", "mem", "mem_per_cpu", "mem_per_gpu", "mail_type", "mail_user", "comment", "clusters"),
)


def render(plan: Plan) -> str:
    """Render the batch script of a plan."""
    options = options_of(plan)
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # A shell script, not a page: values pass the filter `quote` instead.
        autoescape=False,
    )
    # Quotes where none are needed: to shellcheck a comma in a list of words is a slip.
    environment.filters["always_quote"] = lambda value: "'" + str(value).replace("'", "'\"'\"'") + "'"
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    agent = shlex.quote(options.container_interpreter) if options.runtime else '"$python"'
    container = list(_container(plan, options))
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        plan=plan,
        options=options,
        directives=[_directive(name, value) for name, value in directives(plan, options)],
        interpreter=None if options.conda and not options.interpreter else plan.interpreter,
        container=container,
        inside=f"{shlex.join(container) if options.runtime == 'apptainer' else ''} {agent} ".lstrip(),
        needed="apptainer" if options.runtime == "apptainer" else agent,
    )


def options_of(plan: Plan) -> SlurmOptions:
    """Return the options that a plan holds."""
    assert plan.slurm is not None
    lists = {field.name for field in dataclasses.fields(SlurmOptions) if isinstance(field.default, tuple)}
    values: dict[str, Any] = {key: tuple(value) if key in lists else value for key, value in plan.slurm.items()}
    return SlurmOptions(**values)


def directives(plan: Plan, options: SlurmOptions) -> Iterator[tuple[str, str | None]]:
    """Yield the lines that sbatch reads: name and value, or a name alone."""
    # In file names sbatch replaces %j and the like.
    logs = str(plan.job.logs).replace("%", "%%")
    yield "job-name", plan.name
    yield "nodes", str(plan.nodes)
    yield "ntasks-per-node", "1"
    yield "cpus-per-task", str(plan.ranks_per_node * plan.cpus_per_rank)
    for name in _PASSED_ON:
        if value := getattr(options, name):
            yield name.replace("_", "-"), str(value)
    if options.exclusive:
        yield "exclusive", None
    if options.nice:
        yield "nice", str(options.nice)
    if plan.tasks is not None:
        yield "array", options.array or f"0-{len(plan.tasks) - 1}"
    yield "output", f"{logs}/slurm-{'%A_%a' if plan.tasks is not None else '%j'}.out"
    yield "open-mode", "append"
    yield "signal", f"B:USR2@{options.signal_seconds}"
    yield "requeue" if options.requeue else "no-requeue", None
    yield "export", options.export
    for extra in options.sbatch:
        key, equals, value = extra.lstrip("-").partition("=")
        yield key.strip().replace("_", "-"), value if equals else None


def _directive(name: str, value: str | None) -> str:
    """Write a line that sbatch, not the shell, takes apart: by blanks, quotes, backslashes and #."""
    if value is None:
        return f"#SBATCH --{name}"
    if bad := has_control_characters(value):
        raise InputError(f"{name} {value!r}: holds {bad}, which no line of a batch script can; leave it out")
    plain = value and all(character.isalnum() or character in "_-+./:,@%=[]" for character in value)
    if not plain:
        value = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"#SBATCH --{name}={value}"


def _container(plan: Plan, options: SlurmOptions) -> Iterator[str]:
    """Yield the words that go between srun and the agent (apptainer), or srun's own (pyxis)."""
    if not options.runtime:
        return
    mounts: list[Any] = [plan.run, *options.container_mounts]
    pairs = [mount if ":" in str(mount) else f"{mount}:{mount}" for mount in mounts]
    if options.runtime == "pyxis":
        yield f"--container-image={options.container}"
        yield f"--container-mounts={','.join(map(str, pairs))}"
        yield f"--container-workdir={plan.snapshot}"
        return
    yield from ("apptainer", "exec")
    if not plan.use_cpu:
        yield "--nv"
    for pair in pairs:
        yield from ("--bind", str(pair))
    yield from ("--pwd", str(plan.snapshot), options.container)
