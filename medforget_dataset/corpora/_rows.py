"""Rows of a CSV or Parquet file, whose texts are read again only where they are needed.

A file with a report in every row may be larger than memory. Whoever walks it keeps each row's place, an integer, and
reads the few rows that were chosen a second time.
"""

from __future__ import annotations

import csv
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from ..build_log import SourceError
from ..errors import UserError
from ._tables import find_columns


# Reports have two thousand characters; the longest that hospitals publish have twenty thousand.
MAX_FIELD = 1_000_000
_BOM = b"\xef\xbb\xbf"
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}


class Row(NamedTuple):
    """A row of a file.

    Args:
        name (`str`): Where it stands, for messages: `"line 12"` of a CSV file, `"row 11"` of a Parquet file.
        place (`int`): What [`RowReader.read`] takes.
        values (`list[str]`): The wanted columns, without white space around them.
        problem (`str`): Why it cannot be used; empty if it can.
    """

    name: str
    place: int
    values: list[str]
    problem: str = ""


class RowReader(Protocol):
    """A file with named columns."""

    file: Path

    def rows(self) -> Iterator[Row]:
        """Every row, in order."""
        ...

    def read(self, place: int) -> list[str]:
        """The wanted columns of one row."""
        ...


def open_rows(file: Path, columns: Sequence[str]) -> RowReader:
    """Open a CSV or Parquet file.

    Args:
        file (`Path`): A file whose name ends in `.csv` or `.parquet`.
        columns (`Sequence[str]`): The columns wanted, in the order in which rows give them.

    Raises:
        UserError: It is no such file, is empty, or lacks a column.
    """
    return ParquetRows(file, columns) if file.suffix == ".parquet" else CsvRows(file, columns)


def checked_rows(reader: RowReader) -> Iterator[Row | SourceError]:
    """Every row, those that cannot be used as the fault that they are."""
    for row in reader.rows():
        yield SourceError("damaged row", reader.file, row.problem, row.name) if row.problem else row


class CsvRows:
    """A CSV file: UTF-8, commas, fields with commas or line ends in double quotes; a row's place is its byte offset.

    Raises:
        UserError: The file is empty, has another separator or encoding, or lacks a column.
    """

    def __init__(self, file: Path, columns: Sequence[str]):
        self.file = file
        with file.open("rb") as opened:
            header = next(self._records(opened), None)
        if header is None:
            raise UserError(f"{file}: is empty")
        if header.problem:
            raise UserError(f"{file}, {header.name}: {header.problem}")
        names = header.values
        for mark, what in _SEPARATORS.items():
            if len(names) == 1 and mark in names[0]:
                raise UserError(f"{file}: columns are separated by {what}; save it with commas")
        self._width, self._positions = len(names), _positions(names, columns, file)

    def rows(self) -> Iterator[Row]:
        with self.file.open("rb") as opened:
            records = self._records(opened)
            next(records)
            for row in records:
                problem = row.problem
                if not problem and len(row.values) != self._width:
                    problem = f"{len(row.values)} fields, the header has {self._width}"
                yield Row(row.name, row.place, [] if problem else self._wanted(row.values), problem)

    def read(self, place: int) -> list[str]:
        with self.file.open("rb") as opened:
            opened.seek(place)
            return self._wanted(next(self._records(opened)).values)

    def _wanted(self, values: list[str]) -> list[str]:
        return [values[position].strip() for position in self._positions]

    def _records(self, opened: BinaryIO) -> Iterator[Row]:
        lines = _Lines(opened)
        reader = csv.reader(lines, strict=True)
        while True:
            name, place, lines.problem = f"line {lines.count + 1}", lines.position, ""
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise UserError(f"{self.file}, {name}: cannot be read as CSV ({error}); mend its quotes") from error
            if values:
                yield Row(name, place, values, lines.problem or _length_problem(values))


class _Lines:
    """Lines of a file as text, and how far they have been read."""

    def __init__(self, opened: BinaryIO):
        self._opened = opened
        self.position, self.count, self.problem = opened.tell(), 0, ""

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._opened.readline()
        if not line:
            raise StopIteration
        start, self.position, self.count = self.position, self.position + len(line), self.count + 1
        if not start and line.startswith(_BOM):
            line, start = line[len(_BOM) :], len(_BOM)
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            self.problem = f"byte {start + error.start} of the file is not UTF-8; save the file as UTF-8"
            return line.decode("utf-8", "replace")


class ParquetRows:
    """A Parquet file; a row's place is its number from zero. One row group is held in memory.

    Raises:
        UserError: It is no Parquet file, lacks a column, or a column holds neither text nor numbers.
    """

    def __init__(self, file: Path, columns: Sequence[str]):
        self.file, self._columns = file, list(columns)
        try:
            self._parquet = pq.ParquetFile(file)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file}: cannot be read as Parquet: {error}") from error
        schema = self._parquet.schema_arrow
        for name, position in zip(columns, _positions(schema.names, columns, file), strict=True):
            if pa.types.is_nested(kind := schema.field(position).type):
                raise UserError(f"{file}: column {name!r} holds {kind}; it must hold text or numbers")
        self._group = -1
        self._cached: pa.Table | None = None

    def rows(self) -> Iterator[Row]:
        place = 0
        for batch in self._parquet.iter_batches(1024, columns=self._columns):
            values = zip(*(_texts(batch.column(name)) for name in self._columns), strict=True)
            for row in values:
                problem = next((x.problem for x in row if isinstance(x, _Undecodable)), "") or _length_problem(row)
                yield Row(f"row {place + 1}", place, [] if problem else [str(x) for x in row], problem)
                place += 1

    def read(self, place: int) -> list[str]:
        group = bisect_right(self._starts, place) - 1
        if group != self._group or self._cached is None:
            self._group, self._cached = group, self._parquet.read_row_group(group, columns=self._columns)
        row = self._cached.slice(place - self._starts[group], 1)
        return [str(_texts(row.column(name).combine_chunks())[0]) for name in self._columns]

    @cached_property
    def _starts(self) -> list[int]:
        metadata = self._parquet.metadata
        sizes = (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        return list(accumulate(sizes, initial=0))[:-1]


class _Undecodable(NamedTuple):
    problem: str


def _texts(column: pa.Array) -> list[str | _Undecodable]:
    """A column's values as text; whole numbers that are stored as fractions are written as whole ones."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        # Writers may have stored other bytes than UTF-8; as text a single one would make the column unreadable.
        column = column.cast(pa.large_binary())
    return [_text(value) for value in column.to_pylist()]


def _text(value: object) -> str | _Undecodable:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            return _Undecodable(f"byte {error.start} of {value[:20]!r} is not UTF-8; write the file with UTF-8 text")
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def _positions(names: Sequence[str], columns: Sequence[str], file: Path) -> list[int]:
    positions = find_columns(names, columns, file)
    for name in columns:
        if Counter(names)[name] > 1:
            raise UserError(f"{file}: column {name!r} is there twice; rename one")
    return positions


def _length_problem(values: Sequence[object]) -> str:
    longest = max(len(value) for value in values if isinstance(value, str)) if values else 0
    return f"a field of {longest:,} characters; a report has at most {MAX_FIELD:,}" if longest > MAX_FIELD else ""
