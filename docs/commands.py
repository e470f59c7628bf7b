"""Write docs/commands.md, the reference of every command, from the parsers: `python docs/commands.py [--check]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from unlearn.cli import _COMMANDS, _parser


PAGE = Path(__file__).with_name("commands.md")
HEAD = """# Every command

Written by `python docs/commands.py` from the commands themselves; `medforget COMMAND --help` says the same. A command
ends with status 0; with 1 if a check or a stage fails, or a disk is full; with 2 and one line that names it for a
mistake in the call.

| command | |
|---|---|
"""
EVAL = """`medforget eval` is the command `lm_eval` with three arguments added, unless you give them:

| added | |
|---|---|
| `--model medforget-vlm` | our model class: the answers of `hf-multimodal` with less work |
| `--apply_chat_template` | without it prompts are not those of training |
| `--include_path` | the folder of our tasks, as `medforget tasks-path` prints it |

All else is lm-eval's, its subcommands `run`, `ls` and `validate` among it: `medforget eval --help`. What our tasks
take by `--metadata` is listed with [the tasks](../harness_tasks/README.md).
"""


def reference() -> str:
    """The page."""
    lines = [f"| [`medforget {name}`](#medforget-{name}) | {help} |\n" for name, (help, _) in _COMMANDS.items()]
    return HEAD + "".join(lines) + "".join(map(_section, _COMMANDS))


def _section(name: str) -> str:
    parser = _command(name)
    text = f"\n## medforget {name}\n\n"
    if name == "eval":
        return text + EVAL
    text += f"{_lines(parser.description)}\n"
    for group in parser._action_groups:
        if rows := list(_rows(parser, group)):
            title = {"positional arguments": "argument", "options": "flag"}.get(str(group.title), group.title)
            text += f"\n{_lines(group.description)}\n" if group.description else ""
            text += f"\n| {title} | |\n|---|---|\n" + "".join(rows)
    return text + (f"\n```text\n{parser.epilog}\n```\n" if parser.epilog else "")


def _command(name: str) -> argparse.ArgumentParser:
    (commands,) = (action for action in _parser(name)._actions if isinstance(action, argparse._SubParsersAction))
    return commands.choices[name]


def _lines(description: str | None) -> str:
    """A description as the terminal shows it: its indented lines are commands."""
    return "\n".join(
        f"\n`{line.strip()}`\n" if line.startswith("  ") else line for line in (description or "").split("\n")
    )


def _rows(parser: argparse.ArgumentParser, group: argparse._ArgumentGroup) -> Iterator[str]:
    formatter = parser._get_formatter()
    for action in group._group_actions:
        if action.dest == "help" or action.help == argparse.SUPPRESS:
            continue
        value = "" if action.nargs == 0 else f" {formatter._format_args(action, _metavar(action))}"
        name = f"{action.option_strings[-1]}{value}" if action.option_strings else value.strip()
        needed = " (required)" if action.required and action.option_strings else ""
        help = formatter._expand_help(action) if action.help else ""
        # Within a table a bar would end the cell, in code too.
        cells = (cell.replace("|", "\\|") for cell in (f"`{name}`{needed}", help))
        yield f"| {' | '.join(cells)} |\n"


def _metavar(action: argparse.Action) -> str:
    return action.dest.upper() if action.option_strings else action.dest


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(0 if PAGE.read_text(encoding="utf-8") == reference() else f"{PAGE}: run `python docs/commands.py`")
    PAGE.write_text(reference(), encoding="utf-8")
