"""The files of PMC-VQA: which generation is there, its questions row by row, its figures one by one.

Nothing is unpacked and no file is held in memory: of a table only the places of its rows are kept, and of an archive
only its table of contents.
"""

from __future__ import annotations

import csv
import re
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import BinaryIO, NamedTuple

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from ..build_log import BuildLog, SourceError
from ..errors import UserError
from ..hub_files import has_hub_form
from ..questions.classification import LETTERS


class Generation(NamedTuple):
    """Names of the files that belong together.

    Args:
        train (`str`): Table of the training questions.
        test (`str`): Table of the test questions.
        archive (`str`): Zip of the figures.
        folders (`tuple[str, ...]`): Where its figures lie once unpacked, the first one that has a figure wins.
    """

    train: str
    test: str
    archive: str
    folders: tuple[str, ...]


# Version 2 first: its figures are single panels, those of version 1 whole plates. Of version 1 the part of the test
# set that its authors checked by hand comes first.
_V1_FOLDERS = ("images", "images/images", "figures")
GENERATIONS = (
    Generation("train_2.csv", "test_2.csv", "images_2.zip", ("figures", "images_2/figures", "images_2", "images")),
    Generation("train.csv", "test_clean.csv", "images.zip", _V1_FOLDERS),
    Generation("train.csv", "test.csv", "images.zip", _V1_FOLDERS),
)

# The first name is the usual one, the others are misspellings that its cards, files and loaders use.
_COLUMNS = {
    "figure": ("Figure_path",),
    "question": ("Question",),
    **{letter: (f"Choice {letter}",) for letter in LETTERS},
    "answer": ("Answer", "Anwser"),
    "label": ("Answer_label", "Anwser_label"),
}
_FIGURE = re.compile(r"[A-Za-z0-9][\w.-]*\.\w+", re.ASCII)
_PREFIX = re.compile(r"([A-D]) ?: ?")
_LETTER = re.compile(r"\(?([A-Da-d])[).:]?")
# The longest captions have a few thousand characters.
MAX_CELL = 100_000
_BROKEN = (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, NotImplementedError)


class Question(NamedTuple):
    """A row of a table.

    Args:
        row (`str`): Where it stands, for example `"line 12"`.
        figure (`str`): File name of its figure.
        text (`str`): The question.
        options (`tuple[str, ...]`): What the letters A to D stand for, without the letters.
        letter (`str`): The right one.
    """

    row: str
    figure: str
    text: str
    options: tuple[str, ...]
    letter: str


def find_generation(source: str, log: BuildLog) -> tuple[Path, Generation]:
    """The folder of PMC-VQA and the newest generation that is complete there.

    Args:
        source (`str`): A folder, or a Hub id `ORG/NAME`, of which only the files needed are downloaded, at its newest
            commit.
        log ([`~medforget_dataset.build_log.BuildLog`]): Told what is used.

    Returns:
        `tuple[Path, Generation]`: The folder and the names of the files in it.

    Raises:
        UserError: There is no such folder or dataset, the Hub cannot be reached, or a table is missing.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        generation = _newest(source, {path.name for path in folder.iterdir()})
        log.notice("PMC-VQA files", folder, f"{generation.train} and {generation.test} are used")
        return folder, generation
    if not has_hub_form(source):
        raise UserError(f"--general-med {source}: no such folder; give one, or a Hub id such as RadGenome/PMC-VQA")
    try:
        info = HfApi().dataset_info(source)
        generation = _newest(source, {file.rfilename for file in info.siblings or ()})
        files = [
            hf_hub_download(source, name, repo_type="dataset", revision=info.sha)
            for name in (generation.train, generation.test, generation.archive)
        ]
    except UserError:
        raise
    except EntryNotFoundError as error:
        raise UserError(f"--general-med {source}: the dataset on the Hub has no {generation.archive}") from error
    except HfHubHTTPError as error:
        raise UserError(
            f"--general-med {source}: neither a folder here nor a dataset on the Hub that you can read"
        ) from error
    except Exception as error:  # whatever kept us from asking, of an HTTP library that differs by version
        problem = str(error).strip().partition("\n")[0]
        raise UserError(f"--general-med {source}: no folder here, and the Hub cannot be reached: {problem}") from error
    log.notice("PMC-VQA files", source, f"{generation.train} and {generation.test} of commit {info.sha} are used")
    return Path(files[0]).parent, generation


def _newest(source: str, there: set[str]) -> Generation:
    for generation in GENERATIONS:
        if {generation.train, generation.test} <= there:
            return generation
    pairs = " nor ".join(f"{generation.train} with {generation.test}" for generation in GENERATIONS)
    raise UserError(f"--general-med {source}: has neither {pairs}; get both files of a pair")


class QuestionTable:
    """One table of questions, read row by row.

    Args:
        path (`Path`): The CSV file.

    Raises:
        UserError: It cannot be read as CSV, or lacks a column.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                rows = _rows(file)
                _, _, header = next(rows, (0, 0, []))
                self._width, self._column = len(header), self._find_columns(header)
                self._places: dict[str, list[tuple[int, int]]] = defaultdict(list)
                for offset, line, cells in rows:
                    self._places[PurePosixPath(self._cell(cells, "figure")).stem].append((offset, line))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
        except csv.Error as error:
            raise UserError(f"{path}: not a readable CSV file ({error}); get it again") from error

    @property
    def figures(self) -> list[str]:
        """Names of the figures, without their endings, in the table's order."""
        return list(self._places)

    def questions(self, figure: str) -> list[tuple[list[str], int]]:
        """Rows that ask about a figure: their cells and the lines on which they begin."""
        found = []
        with self.path.open("rb") as file:
            for offset, line in self._places[figure]:
                file.seek(offset)
                found.append((next(_rows(file))[2], line))
        return found

    def content(self, cells: list[str]) -> list[str]:
        """What identifies a row wherever it stands in the table."""
        return [self._cell(cells, name) for name in self._column]

    def parse(self, cells: list[str], line: int) -> Question:
        """A row as a question.

        Raises:
            SourceError: The row has cells missing or too many, bytes that are not UTF-8, a figure that is no file
                name, an empty or repeated option, or an answer that is none of its options.
        """
        row = f"line {line}"

        def fault(kind: str, message: str) -> SourceError:
            return SourceError(kind, self.path, message, row)

        if len(cells) != self._width:
            raise fault("row of another width", f"{len(cells)} cells, the header has {self._width}")
        values = {name: _clean(self._cell(cells, name)) for name in self._column}
        for name, value in values.items():
            if "\ufffd" in value:
                raise fault("not UTF-8", f"column {_COLUMNS[name][0]} has bytes that are not UTF-8")
            if not value and name not in ("answer", "label"):
                raise fault("empty cell", f"column {_COLUMNS[name][0]} is empty")
        if not _FIGURE.fullmatch(values["figure"]):
            raise fault("figure is no file name", f"Figure_path {values['figure']!r} must be a plain file name")
        options = {}
        for letter in LETTERS:
            prefix = _PREFIX.match(values[letter])
            if prefix and prefix[1] != letter:
                raise fault("options out of order", f"Choice {letter} begins with {prefix[0].strip()!r}")
            options[letter] = _without_prefix(values[letter])
        if not all(options.values()) or len({text.casefold() for text in options.values()}) < len(LETTERS):
            raise fault("options not distinct", f"the options are {', '.join(map(repr, options.values()))}")
        letter = _right_letter(values, options)
        if not letter and values.get("label") and values.get("answer"):
            told = f"label {values['label']!r} and answer {values['answer']!r}"
            raise fault("no right option", f"{told} do not name the same option")
        if not letter:
            told = values.get("label", "") or values.get("answer", "")
            raise fault("no right option", f"answer {told!r} is none of {', '.join(LETTERS)} and none of their texts")
        return Question(row, values["figure"], values["question"], tuple(options.values()), letter)

    def _find_columns(self, header: list[str]) -> dict[str, int]:
        found = [cell.strip().removeprefix("\ufeff") for cell in header]
        columns = {
            name: found.index(spelling)
            for name, spellings in _COLUMNS.items()
            for spelling in spellings
            if spelling in found
        }
        needed = [name for name in _COLUMNS if name not in ("answer", "label")]
        missing = [_COLUMNS[name][0] for name in needed if name not in columns]
        if not {"answer", "label"} & columns.keys():
            missing.append("Answer or Answer_label")
        if missing:
            there = ", ".join(map(repr, found[:20])) or "none"
            raise UserError(f"{self.path}: no column {', '.join(missing)}; its columns are {there}")
        return columns

    def _cell(self, cells: list[str], name: str) -> str:
        number = self._column[name]
        return cells[number] if number < len(cells) else ""


def _rows(file: BinaryIO) -> Iterator[tuple[int, int, list[str]]]:
    """Byte offset, first line and cells of each row from the current position; lines count from there."""
    offset, number = file.tell(), 0

    def lines() -> Iterator[str]:
        nonlocal offset, number
        for line in file:
            offset, number = offset + len(line), number + 1
            yield line.decode("utf-8", "replace")

    reader = csv.reader(lines())
    while True:
        start, first = offset, number + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise csv.Error(f"line {first}: {error}") from error
        if cells and max(map(len, cells)) > MAX_CELL:
            raise csv.Error(f"line {first}: a cell of more than {MAX_CELL:,} characters; its quote is never closed")
        if cells is None:
            return
        if cells:
            yield start, first, cells


def _clean(text: str) -> str:
    """The text on one line, without the quotes that some options stand in as a whole."""
    text = " ".join(text.split())
    return text[1:-1].strip() if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def _without_prefix(text: str) -> str:
    prefix = _PREFIX.match(text)
    return _clean(text[prefix.end() :]) if prefix else text


def _right_letter(values: dict[str, str], options: dict[str, str]) -> str:
    """The right letter, or nothing where the row names none or two."""
    text = _without_prefix(values.get("answer", "")).casefold()
    by_text = next((letter for letter, option in options.items() if option.casefold() == text), "")
    letters = {name: _LETTER.fullmatch(values.get(name, "")) for name in ("label", "answer")}
    named = {name: match[1].upper() for name, match in letters.items() if match}
    if "label" not in values:
        return named.get("answer") or by_text
    label = named.get("label", "")
    agrees = not values.get("answer") or label in (by_text, named.get("answer"))
    return label if agrees else ""


class Figures:
    """The figures of a generation, unpacked or in their archive, which is opened once and read in place.

    Args:
        folder (`Path`): Folder of PMC-VQA.
        generation ([`Generation`]): Where its figures may be.
        log ([`~medforget_dataset.build_log.BuildLog`]): Told of members that lie outside the archive.

    Raises:
        UserError: There are no figures, or the archive is damaged.
    """

    def __init__(self, folder: Path, generation: Generation, log: BuildLog):
        self._folders = [path for name in generation.folders if (path := folder / name).is_dir()]
        self._path = folder / generation.archive
        self._archive: zipfile.ZipFile | None = None
        self._members: dict[str, str] = {}
        if not self._path.is_file():
            if not self._folders:
                wanted = f"{generation.archive} nor a folder {' or '.join(generation.folders)}"
                raise UserError(f"--general-med {folder}: has neither {wanted} with the figures")
            return
        try:
            self._archive = zipfile.ZipFile(self._path)
        except _BROKEN as error:
            raise UserError(f"{self._path}: not a zip archive, or cut short ({error}); get it again") from error
        for name in self._archive.namelist():
            parts = PurePosixPath(name.replace("\\", "/")).parts
            if ".." in parts or name.startswith(("/", "\\")):
                message = "member lies outside the archive; who made it may not be whom you trust"
                log.fault(SourceError("zip member outside its root", self._path, message, name))
            elif not name.endswith("/"):
                self._members[PurePosixPath(name).name] = name

    def __enter__(self) -> Figures:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._archive:
            self._archive.close()

    def name(self, figure: str) -> str:
        """Where a figure is read from, for messages."""
        folder = self._folder_of(figure)
        return str(folder / figure) if folder else f"{self._path}, {self._members.get(figure, figure)}"

    def read(self, figure: str) -> bytes:
        """A figure's file.

        Raises:
            SourceError: There is no such figure, or the archive is damaged where it lies.
        """
        if folder := self._folder_of(figure):
            return (folder / figure).read_bytes()
        if not self._archive:
            raise SourceError("missing image", self._folders[0], "no such figure, in no folder of figures", figure)
        if figure not in self._members:
            raise SourceError("missing image", self._path, "no such figure in the archive", figure)
        try:
            return self._archive.read(self._members[figure])
        except _BROKEN as error:
            raise SourceError("damaged zip member", self._path, f"{error}; get the archive again", figure) from error

    def _folder_of(self, figure: str) -> Path | None:
        return next((folder for folder in self._folders if (folder / figure).is_file()), None)
