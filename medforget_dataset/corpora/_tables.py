"""CSV files of any size, row by row, with clear words for what is wrong with them."""

from __future__ import annotations

import csv
import difflib
import gzip
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import UserError


# A field may hold a whole report.
csv.field_size_limit(16_000_000)


def read_csv(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Rows of a CSV file, gzipped or not, with the line each ends at; the header is the first.

    Raises:
        UserError: The file is no CSV, not UTF-8, cut short or empty.
    """
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as raw:
            reader = csv.reader(io.TextIOWrapper(raw, encoding="utf-8-sig", newline=""), strict=True)
            empty = True
            for row in reader:
                empty = False
                yield reader.line_num, row
    except UnicodeDecodeError as error:
        raise UserError(f"{file}, after line {reader.line_num}: not UTF-8 ({error.reason}); convert it") from error
    except (csv.Error, OSError, EOFError) as error:
        raise UserError(f"{file}: cannot be read as CSV: {error}") from error
    if empty:
        raise UserError(f"{file}: is empty")


def find_columns(header: Sequence[str], wanted: Sequence[str], file: Path) -> list[int]:
    """Positions of the columns wanted.

    Raises:
        UserError: One is missing. The message names it, the nearest there is, and all.
    """
    for name in wanted:
        if name not in header:
            near = difflib.get_close_matches(name.lower(), [found.lower().strip() for found in header], 1, 0.6)
            renamed = next((found for found in header if near and found.lower().strip() == near[0]), None)
            hint = f"; {renamed!r} is there: rename it" if renamed is not None else ""
            raise UserError(f"{file}: no column {name!r}{hint}; its columns are {', '.join(header)}")
    return [list(header).index(name) for name in wanted]
