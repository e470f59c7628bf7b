"""From the YAML file of a sweep to its cells, each checked before anything runs."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import itertools
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from medforget_dataset.errors import UserError
from medforget_dataset.hierarchy import LEVELS

from .argument_types import FLOAT, as_text, typed, types_of
from .config import UnlearnConfig, make_config, resolve
from .methods import METHODS, get_method, method_arguments
from .presets import TINY_PRESETS, get_model_preset


KEYS = ("data", "model", "model_preset", "max_pixels", "levels", "seeds", "methods")
# What a sweep sets itself, and where it is told.
RESERVED = {
    "seed": "give seeds beside methods",
    "level": "give levels beside methods",
    "method": "it is the name of the grid",
    "method_args": "give each of them by its name",
    "output_dir": "each cell has a folder of its own",
    "disable_tqdm": "progress is always shown",
    "push_to_hub": "push a checkpoint that --keep-checkpoints has kept",
}
_FLAG = re.compile(r"--([a-z][a-z-]*)")


@dataclass(frozen=True)
class Cell:
    """One run of a method.

    Args:
        method (`str`): Name of the method.
        level (`str`): Level that is forgotten.
        seed (`int`, *optional*): Seed of training; none for a method that does not train.
        preset (`str`, *optional*): Preset of the method.
        arguments (`dict`): Hyper-parameters and training arguments that the file gives.
        settings (`dict`): All hyper-parameters, and the training arguments of preset and file.
        shown (`dict`): What the grids of the method vary or could vary, with the values that hold for this cell.
    """

    method: str
    level: str
    seed: int | None
    preset: str | None
    arguments: dict[str, Any]
    settings: dict[str, Any]
    shown: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Readable, and the same as long as the file gives this cell the same values."""
        content = {"preset": self.preset, "arguments": self.arguments, "seed": self.seed}
        return f"{self.method}-{self.level}-{hashlib.sha256(_canonical(content).encode()).hexdigest()[:8]}"

    @property
    def recipe(self) -> dict[str, Any] | None:
        """How the preset draws wordings and views, if the method trains and the preset has a say in it."""
        trains = get_method(self.method).uses_gradients
        return dataclasses.asdict(TINY_PRESETS[self.preset]) if trains and self.preset in TINY_PRESETS else None

    def __str__(self) -> str:
        given = ({"preset": self.preset} if self.preset else {}) | self.arguments
        values = "".join(f", {name} {as_text(value)}" for name, value in given.items())
        return f"{self.method}, {self.level}{values}" + (f", seed {self.seed}" if self.seed is not None else "")


@dataclass(frozen=True)
class Grid:
    """What a sweep does.

    Args:
        file (`Path`): The YAML file.
        model (`str`): Checkpoint folder or Hub id that every cell unlearns.
        data (`str`, *optional*): Dataset folder or Hub id.
        model_preset (`str`, *optional*): A model of `unlearn.presets`.
        max_pixels (`int`, *optional*): Most pixels of an image.
        levels (`tuple[str, ...]`): Levels that are forgotten.
        cells (`tuple[Cell, ...]`): The runs, in the order of the file.
        varied (`tuple[str, ...]`): Arguments that take more than one value at the same method and level.
    """

    file: Path
    model: str
    data: str | None
    model_preset: str | None
    max_pixels: int | None
    levels: tuple[str, ...]
    cells: tuple[Cell, ...]
    varied: tuple[str, ...]


def read_grid(file: Path) -> Grid:
    """Read a sweep and check every cell of it; see `docs/sweeps.md` for the form.

    Args:
        file (`Path`): The YAML file.

    Raises:
        UserError: The file is missing, is not YAML, or something in it is not what it must be. The message names it.
    """
    content = _read_yaml(file)
    try:
        return _grid(file, content)
    except UserError as error:
        # What is a flag of `medforget unlearn` is a key here.
        text = _FLAG.sub(lambda match: match[1].replace("-", "_"), str(error))
        raise UserError(f"{file}: {text}") from None


def _grid(file: Path, content: Any) -> Grid:
    if not isinstance(content, dict):
        raise UserError(f"must be a mapping with the keys model, levels and methods, not {_kind(content)}")
    for key in content:
        if key not in KEYS:
            raise UserError(f"unknown key {key!r}; choose from {', '.join(KEYS)}")
    for key in ("model", "levels", "methods"):
        if content.get(key) is None:
            raise UserError(f"{key} is missing; a sweep needs model, levels and methods")
    for key, hint in {"data": str, "model": str, "model_preset": str, "max_pixels": int}.items():
        if content.get(key) is not None:
            content[key] = typed(key, content[key], hint)
    model_preset = content.get("model_preset")
    base = get_model_preset(model_preset).unlearn_arguments if model_preset else {}
    if (pixels := content.get("max_pixels")) is not None and pixels < 1:
        raise UserError(f"max_pixels is {pixels}; it must be more than 0")
    levels = _dimension("levels", content["levels"], str)
    for level in levels:
        if level not in LEVELS:
            raise UserError(f"levels: unknown level {level!r}; choose from {', '.join(LEVELS)}")
    seeds = [0] if content.get("seeds") is None else _dimension("seeds", content["seeds"], int)
    cells: list[Cell] = []
    for method, grids in _methods(content["methods"]).items():
        cells += _method_cells(method, grids, levels, seeds, base)
    return Grid(
        file=file,
        model=content["model"],
        data=content.get("data"),
        model_preset=model_preset,
        max_pixels=content.get("max_pixels"),
        levels=tuple(levels),
        cells=tuple(cells),
        varied=_varied(cells),
    )


def _dimension(key: str, value: Any, kind: type) -> list[Any]:
    """The values of `levels` or `seeds`: a list, or one of them."""
    values = [typed(key, item, kind) for item in (value if isinstance(value, list) else [value])]
    if not values:
        raise UserError(f"{key} is an empty list; name at least one")
    for twice in (item for i, item in enumerate(values) if item in values[:i]):
        raise UserError(f"{key} names {twice!r} twice")
    return values


def _methods(content: Any) -> dict[str, list[dict[str, Any]]]:
    """The grids of each method."""
    if not isinstance(content, dict) or not content:
        raise UserError("methods must give the arguments of each method, such as `npo: {preset: tiny}` or `manu: {}`")
    methods: dict[str, list[dict[str, Any]]] = {}
    for method, grids in content.items():
        if method not in METHODS:
            raise UserError(f"methods: unknown method {method!r}; choose from {', '.join(METHODS)}")
        grids = grids if isinstance(grids, list) else [{} if grids is None else grids]
        if not grids:
            raise UserError(f"{method} has an empty list of grids; `{method}: {{}}` runs it with its defaults")
        for grid in grids:
            if not isinstance(grid, dict):
                raise UserError(f"{method}: {as_text(grid)} is not a grid; give arguments, such as {{preset: tiny}}")
            for name, value in grid.items():
                _check_name(method, name)
                if value == []:
                    raise UserError(f"{method}: {name} is an empty list; name at least one value or leave it out")
        methods[method] = grids
    return methods


def _check_name(method: str, name: Any) -> None:
    if name in RESERVED:
        raise UserError(f"{method}: {name} cannot be given here; {RESERVED[name]}")
    known = _hints(method)
    if name in known:
        return
    if name in {field.name for field in dataclasses.fields(UnlearnConfig)}:
        raise UserError(f"{method} does not train; it has no use for {name}")
    near = difflib.get_close_matches(str(name), known, n=1)
    has = f"did you mean {near[0]}?" if near else f"it has preset, {', '.join(method_arguments(method))}"
    training = "" if near or not get_method(method).uses_gradients else ", and the fields of TRL's SFTConfig"
    raise UserError(f"{method} has no argument {name!r}; {has}{training}")


def _method_cells(
    method: str, grids: list[dict[str, Any]], levels: Sequence[str], seeds: Sequence[int], base: dict[str, Any]
) -> list[Cell]:
    # The seed changes nothing where nothing is drawn.
    chosen: Sequence[int | None] = seeds if get_method(method).uses_gradients else [None]
    names = list(dict.fromkeys(name for grid in grids for name in grid))
    cells: dict[str, Cell] = {}
    for level, seed, values in itertools.product(levels, chosen, list(_points(grids))):
        cell = _cell(method, level, seed, values, base, names)
        # Apart from how it was said.
        key = _canonical([level, seed, cell.recipe, cell.settings | cell.shown | {"preset": None}])
        if key in cells:
            raise UserError(f"two cells are the same run: {cells[key]} and {cell}")
        cells[key] = cell
    return list(cells.values())


def _points(grids: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for grid in grids:
        dimensions = [value if isinstance(value, list) else [value] for value in grid.values()]
        for values in itertools.product(*dimensions):
            yield dict(zip(grid, values, strict=True))


def _cell(
    method: str, level: str, seed: int | None, values: dict[str, Any], base: dict[str, Any], names: list[str]
) -> Cell:
    where, hints = f"{method}: ", _hints(method)
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        argument = typed(f"{where}{name}", value, hints[name])
        # A model that learned what one level retains is another one at the next level.
        arguments[name] = argument.replace("{level}", level) if isinstance(argument, str) else argument
    preset = arguments.pop("preset", None)
    seeded: dict[str, Any] = {} if seed is None else {"seed": seed}
    instance, training = resolve(method, preset, base, **arguments, **seeded)
    shown: dict[str, Any] = {"preset": preset} if "preset" in names else {}
    defaults: Any = None
    if instance.uses_gradients:
        try:
            defaults = make_config(
                UnlearnConfig,
                output_dir=tempfile.gettempdir(),
                method=method,
                method_args=json.dumps(instance.arguments()),
                level=level,
                **training,
            )
        except UserError as error:
            raise UserError(f"{where}{error}") from None
    settings = instance.arguments() | training
    for name in names:
        if name != "preset":
            shown[name] = settings[name] if name in settings else getattr(defaults, name)
    return Cell(method, level, seed, preset, arguments, settings, shown)


@functools.cache
def _hints(method: str) -> dict[str, Any]:
    """The type of everything that a grid of a method may name."""
    sources: list[type] = [UnlearnConfig] if get_method(method).uses_gradients else []
    hints: dict[str, Any] = {"preset": str | None}
    for source in (*sources, get_method(method)):
        hints |= types_of(source)
    return hints


def _varied(cells: Sequence[Cell]) -> tuple[str, ...]:
    values: dict[tuple[str, str], dict[str, set[str]]] = {}
    for cell in cells:
        for name, value in cell.shown.items():
            values.setdefault((cell.method, cell.level), {}).setdefault(name, set()).add(_canonical(value))
    return tuple(dict.fromkeys(name for of in values.values() for name, found in of.items() if len(found) > 1))


def _canonical(content: Any) -> str:
    return json.dumps(content, sort_keys=True, default=str)


def _kind(value: Any) -> str:
    return "nothing" if value is None else "a list" if isinstance(value, list) else f"{as_text(value)!r}"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, to which 1e-4 is a number."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789"))


def _read_yaml(file: Path) -> Any:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise UserError(f"{file}: cannot read the sweep ({error.strerror}); give a YAML file") from error
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        _check_node(node, ())
        return loader.construct_document(node) if node else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        problem = ", ".join(text for text in (error.context, error.problem) if text)
        raise UserError(f"{file}{line}: not valid YAML: {problem}") from error
    except RecursionError as error:
        raise UserError(f"{file}: not valid YAML: nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{file}: not valid YAML: {str(error).strip().partition(chr(10))[0]}") from error


def _check_node(node: Any, parents: tuple[Any, ...]) -> None:
    """PyYAML keeps the last of two equal keys in silence. Asked before `<<` is merged: its keys may be overridden."""
    if any(node is parent for parent in parents):
        raise yaml.MarkedYAMLError(problem="an alias refers to what it is in", problem_mark=node.start_mark)
    if isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in keys:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
            keys.add(str(key.value))
            _check_node(value, (*parents, node))
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_node(item, (*parents, node))
