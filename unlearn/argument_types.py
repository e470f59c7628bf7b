"""What type an argument takes, for values that come as text."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import re
import types
import typing
from typing import Any

from medforget_dataset.errors import UserError


# YAML 1.1, which PyYAML reads, takes 1e-4 for a string; everyone else takes it for a number.
FLOAT = re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+")


def types_of(config: type) -> dict[str, Any]:
    """The type of every field of a dataclass that can be chosen, by name."""
    hints = typing.get_type_hints(config)
    return {field.name: hints[field.name] for field in dataclasses.fields(config) if field.init}


def typed(name: str, value: Any, hint: Any) -> Any:
    """A value as a field of this type takes it, or a `UserError`."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    plain = {typing.get_origin(kind) or kind for kind in kinds}
    if typing.Literal in plain or any(isinstance(kind, type) and issubclass(kind, enum.Enum) for kind in kinds):
        plain.add(str)
    if type(value) is int and int not in plain and float in plain:
        return float(value)
    if type(value) is float and math.isfinite(value) and float not in plain and int in plain and value.is_integer():
        return int(value)
    if (type(value) in plain and not (isinstance(value, float) and not math.isfinite(value))) or typing.Any in plain:
        return value
    if value is None:
        raise UserError(f"{name} has no value; give one or leave it out")
    expected = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    wanted = [text for kind, text in expected.items() if kind in plain and not (kind is int and float in plain)]
    quotes = "; put it in quotes" if str in plain and not isinstance(value, dict | list) else ""
    if isinstance(value, str) and plain & {int, float} and FLOAT.fullmatch(value):
        quotes = "; leave out the quotes"
    found = repr(value) if isinstance(value, str) else as_text(value)
    raise UserError(f"{name} is {found}; it must be {' or '.join(wanted) or 'something else'}{quotes}")


def as_text(value: Any) -> str:
    """A value of a cell, in one line for a table or a message."""
    if value is None:
        return ""
    if isinstance(value, enum.Enum):
        value = value.value
    return value if isinstance(value, str) else json.dumps(value, default=str)


def read_typed(name: str, text: str, hint: Any) -> Any:
    """The value that a text stands for, as JSON or as it is.

    Raises:
        UserError: A field of this type takes neither.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    try:
        return typed(name, value, hint)
    except UserError:
        if isinstance(value, str) or str not in (hint, *typing.get_args(hint)):
            raise
        return text
