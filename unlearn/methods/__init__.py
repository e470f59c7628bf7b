"""
Unlearning methods, one file each.

A file of this package whose name does not begin with an underscore holds one subclass of [`GradientMethod`] or
[`EditingMethod`]. That is all it takes: the command line, the trainer and the tests find it by scanning the package.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from medforget_dataset.errors import UserError

from ._base import INITIAL, AnswerBatch, EditingMethod, GradientMethod, Method, argument


__all__ = [
    "INITIAL",
    "METHODS",
    "AnswerBatch",
    "EditingMethod",
    "GradientMethod",
    "Method",
    "argument",
    "get_method",
    "get_preset",
    "make_method",
    "method_arguments",
]


def _find_methods() -> dict[str, type[Method]]:
    found: dict[str, type[Method]] = {}
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            contents = vars(importlib.import_module(f"{__name__}.{module.name}"))
            own = (value for value in contents.values() if isinstance(value, type) and issubclass(value, Method))
            found |= {value.name: value for value in own if value.__module__ == f"{__name__}.{module.name}"}
    return dict(sorted(found.items()))


METHODS: dict[str, type[Method]] = _find_methods()


def get_method(name: str) -> type[Method]:
    """
    Look up a method by name.

    >>> get_method("npo").title
    'NPO'

    Raises:
        UserError: If there is no such method. The message lists them.
    """
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}; choose from {', '.join(METHODS)}")
    return METHODS[name]


def method_arguments(name: str) -> dict[str, dataclasses.Field]:
    """The hyper-parameters of a method; their `metadata` holds `"help"` and the `"source"` of the default."""
    return {field.name: field for field in dataclasses.fields(get_method(name))}  # type: ignore[arg-type]


def make_method(name: str, arguments: Mapping[str, Any] | None = None) -> Method:
    """
    A method with its hyper-parameters chosen.

    >>> make_method("npo", {"beta": 0.5}).beta
    0.5

    Raises:
        UserError: If there is no such method or hyper-parameter, or a value is out of range.
    """
    method, arguments, known = get_method(name), dict(arguments or {}), method_arguments(name)
    for unknown in arguments.keys() - known.keys():
        raise UserError(f"{name} has no argument {unknown!r}; it has {', '.join(known)}")
    return method(**arguments)


def get_preset(name: str, preset: str) -> dict[str, Any]:
    """
    Hyper-parameters and training arguments of a named preset of a method.

    Raises:
        UserError: If there is no such method, or it has no such preset. The message lists the presets.
    """
    presets = get_method(name).presets
    if preset not in presets:
        raise UserError(f"{name} has no preset {preset!r}; choose from {', '.join(presets)}")
    return dict(presets[preset])
