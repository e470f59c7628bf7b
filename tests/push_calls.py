"""`medforget push` as a test calls it, and what it prints for people."""

import re

from unlearn.cli import main


def said(capsys, call, status=0):
    """The lines that a command prints for people, bars left out."""
    assert main(call) == status
    lines = capsys.readouterr().err.replace("\r", "\n").split("\n")
    return [line for line in lines if line.strip() and not re.search(r"\d%\||it/s", line)]


def refusal(capsys, *call):
    line, *more = said(capsys, ["push", *map(str, call)], status=2)
    assert not more
    return line
