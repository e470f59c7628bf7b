"""The commands of the dataset: `medforget build | validate`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from .corpora import corpus_names
from .errors import UserError
from .options import CHOICES, BuildOptions, flag
from .questions.llm import CONCURRENCY


def say(text: str) -> None:
    """One line to the terminal, beside what a command prints as its result."""
    sys.stderr.write(text + "\n")


def _add_build(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_build)
    parser.description = (
        "Build the dataset: Parquet for each of the 14 configurations, the card, and build.json.\n"
        "The folder appears when it is complete; the same build is not made twice. One seed always gives the "
        "same bytes.\n"
        "Faulty files and rows are named; with --on-error skip they are listed in build-log.jsonl and others taken."
    )
    parser.epilog = (
        "examples:\n"
        "  medforget build --out medforget\n"
        "  medforget build --corpus mimic-cxr --root physionet.org/files --out medforget-mimic\n"
        "  medforget build --corpus open-i --root NLMCXR --sections any --general-med PMC-VQA --out medforget-openi\n"
        "  medforget build --questions llm --endpoint http://127.0.0.1:8000/v1 --llm-model MODEL --out medforget-llm"
    )
    parser.add_argument("--out", type=Path, default=Path("medforget"), help="folder to write")
    for option in fields(BuildOptions):
        help = option.metadata["help"]
        if option.name == "corpus":
            help += f": {', '.join(corpus_names())}"
        if option.name == "sections":
            parser.add_argument(
                "--sections",
                nargs="+",
                default=[BuildOptions.sections],
                metavar="N|standard|any",
                help=f"{help}; standard: the four that every study must have; any: drawn from all of its sections",
            )
        elif option.name != "section_kinds":
            kind = int if isinstance(option.default, int) else str
            metavar = "|".join(CHOICES[option.name]) if option.name in CHOICES else None
            parser.add_argument(flag(option.name), type=kind, default=option.default, metavar=metavar, help=help)
    parser.add_argument("--workers", type=int, help="processes that render images (default: one a CPU core)")
    parser.add_argument(
        "--concurrency", type=int, default=CONCURRENCY, help="requests to the language model in flight"
    )
    parser.add_argument("--force", action="store_true", help="build again even if the folder holds this build")


def _build(args: argparse.Namespace) -> int:
    from .writer import build

    options = {field.name: getattr(args, field.name) for field in fields(BuildOptions) if hasattr(args, field.name)}
    options |= _section_options(args.sections)
    folder = build(args.out, workers=args.workers, concurrency=args.concurrency, force=args.force, **options)
    rows = BuildOptions(**options).counts.rows
    say(f"{folder}: {rows} rows; load_dataset({str(folder)!r}, 'patient_forget')")
    return 0


def _section_options(values: list) -> dict[str, int | str]:
    """What `--sections 4`, `--sections any` or `--sections 8 any` mean."""
    options: dict[str, int | str] = {}
    for value in values:
        if str(value).isdecimal():
            options["sections"] = int(value)
        elif value in CHOICES["section_kinds"]:
            options["section_kinds"] = value
        else:
            raise UserError(f"--sections {value}: must be a number, standard or any")
    return options


def _add_validate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_validate)
    parser.description = (
        "Recount every invariant of a dataset from its files: counts, complements, wordings, balance, images.\n"
        "Prints one line for each violation and exits with 1 if there is any. Notes are no violations: they say what\n"
        "is uneven in a hospital's data, such as an answer that fills many blanks."
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("medforget"), help="dataset folder")


def _validate(args: argparse.Namespace) -> int:
    from .validate import notes, validate

    problems = validate(args.folder)
    for problem in problems:
        say(problem)
    for note in [] if problems else notes(args.folder):
        say(f"note: {note}")
    say(f"{args.folder}: {f'{len(problems)} violations' if problems else 'every invariant holds'}")
    return 1 if problems else 0


COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "build": ("build the dataset folder", _add_build),
    "validate": ("check a dataset folder", _add_validate),
}
