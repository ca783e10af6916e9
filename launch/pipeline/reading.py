"""A YAML file as it was typed: every value a string, every key with its line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import InputError


class Mapping(dict[str, Any]):
    """Lines of `key: value`, and where they stand."""

    def __init__(self, line: int) -> None:
        super().__init__()
        self.line = line
        """Of the first key, counted from 1."""
        self.lines: dict[str, int] = {}
        """Of each key."""


class _Loader(yaml.SafeLoader):
    """Reads values as they are typed.

    YAML would take `12:00:00` for 43200 and `1e-3` for a word; as strings they mean what they mean on a command line.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.repeated: list[tuple[int, str]] = []

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if isinstance(node, yaml.MappingNode):
            found = Mapping(node.start_mark.line + 1)
            for key_node, value_node in node.value:
                key = str(self.construct_object(key_node))
                line = key_node.start_mark.line + 1
                if key in found:
                    self.repeated.append((line, key))
                found[key] = self.construct_object(value_node)
                found.lines[key] = line
            return found
        if isinstance(node, yaml.SequenceNode):
            return [self.construct_object(item) for item in node.value]
        if isinstance(node, yaml.ScalarNode) and node.style is None and node.value in ("", "~", "null"):
            return None
        return str(node.value)


def read_yaml(path: Path) -> Mapping:
    """Read a file of `key: value`. Raises `InputError` where it is none, and for a key that stands there twice."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is no text ({error.reason}); name a YAML file") from error
    loader = _Loader(text)
    try:
        content = loader.get_single_data()
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from error
    finally:
        loader.dispose()
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: expected lines of `key: value`, found something else")
    if loader.repeated:
        raise InputError(f"{path}:{line}: {key}: stands there twice; keep one" for line, key in loader.repeated)
    return content


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which of the known names was meant, or list them."""
    known = list(known)
    match = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {match[0]}?" if match else f"expected one of {', '.join(known)}"


def as_text(value: Any) -> str:
    """Write a value on one line, as YAML reads it back: lists and mappings in brackets."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{as_text(key)}: {as_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_quoted(item) for item in value) + "]"
    return "null" if value is None else str(value)


def _quoted(item: Any) -> str:
    """Quote an entry that would otherwise be taken apart at its comma or colon."""
    if isinstance(item, str) and (
        not item or any(sign in item for sign in ",:[]{}#'\"&*!|>%@`") or item.strip() != item
    ):
        return "'" + item.replace("'", "''") + "'"
    return as_text(item)
