"""Command-line flags from a dataclass: one per field, its help the line under the field."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import typing
from collections.abc import Container
from typing import Any


def field_help(kind: type[Any]) -> dict[str, str]:
    """Return the documentation line under each field of a dataclass."""
    [definition] = ast.parse(inspect.getsource(kind)).body
    assert isinstance(definition, ast.ClassDef)
    found: dict[str, str] = {}
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            found[field.target.id] = str(text.value.value)
    return found


def add_flags(parser: argparse.ArgumentParser, kind: type[Any], title: str, *, without: Container[str] = ()) -> None:
    """Add a flag for each field but those named; flags that are not given are absent from the namespace."""
    group = parser.add_argument_group(title)
    types = typing.get_type_hints(kind)
    texts = field_help(kind)
    for field in dataclasses.fields(kind):
        if field.name in without:
            continue
        settings: dict[str, Any] = {"default": argparse.SUPPRESS, "help": texts[field.name]}
        if isinstance(field.default, bool):
            action = "store_false" if field.default else "store_true"
            name = f"no_{field.name}" if field.default else field.name
            if field.default:
                settings["help"] = f"Not: {settings['help'][0].lower()}{settings['help'][1:]}"
            group.add_argument(f"--{name}", dest=field.name, action=action, **settings)
        elif isinstance(field.default, tuple):
            group.add_argument(f"--{field.name}", action="append", metavar="TEXT", **settings)
        elif typing.get_origin(types[field.name]) is typing.Literal:
            choices = [choice for choice in typing.get_args(types[field.name]) if choice]
            group.add_argument(f"--{field.name}", choices=choices, **settings)
        else:
            convert = type(field.default)
            group.add_argument(
                f"--{field.name}", type=convert, metavar="N" if convert is not str else "TEXT", **settings
            )
