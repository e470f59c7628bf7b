"""The command line: `medforget build | validate | push | pretrain | finetune | unlearn | sweep | eval | run |
report | browse | tasks-path`."""

from __future__ import annotations

import argparse
import difflib
import logging
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import NoReturn

from datasets.exceptions import DatasetGenerationError

from medforget_dataset.cli import COMMANDS as DATASET_COMMANDS
from medforget_dataset.cli import say
from medforget_dataset.errors import UserError
from medforget_dataset.processes import is_first_process

from . import sweep
from .browse import command as browse
from .push_cli import add_push
from .training_cli import add_finetune, add_pretrain, add_unlearn


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of descriptions and adds defaults to options that have one worth naming."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, "", []):
            return action.help
        return super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a call."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see `{self.prog} --help`\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 1 for failed checks or a full disk, 2 for a mistake in the call."""
    argv = sys.argv[1:] if argv is None else list(argv)
    # The arguments of `eval` are lm_eval's, `--help` among them.
    passed_on = argv[1:] if argv[:1] == ["eval"] else None
    args, unknown = _parser(argv[0] if argv else "").parse_known_args(argv if passed_on is None else ["eval"])
    if passed_on is not None:
        args.arguments = passed_on
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for name in ("httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        if unknown:
            near = difflib.get_close_matches(unknown[0].partition("=")[0], args.options, n=1, cutoff=0.75)
            hint = f"did you mean {near[0]}?" if near else f"see `medforget {args.command} --help`"
            raise UserError(f"unknown argument {unknown[0]}; {hint}")
        return args.run(args)
    except UserError as error:
        if is_first_process():  # several processes find the same mistake
            say(f"medforget {args.command}: {error}")
        return 2
    except DatasetGenerationError as error:
        # `datasets` wraps what kept it from writing its cache.
        say(f"medforget {args.command}: {error.__cause__ or error}")
        return 1
    except (OSError, BrokenExecutor) as error:
        say(f"medforget {args.command}: {error}")
        return 1
    except KeyboardInterrupt:
        say(f"medforget {args.command}: stopped; what was there before is as it was")
        return 130


def _parser(command: str) -> argparse.ArgumentParser:
    """The parser, in which only the command that was asked for has its arguments: the others' would cost seconds."""
    parser = _Parser(
        prog="medforget",
        formatter_class=_Formatter,
        allow_abbrev=False,
        description="Build the MedForget benchmark, train a model on it, make it forget a level, measure what is "
        "left.",
        epilog="first steps:\n"
        "  medforget run --preset demo            everything on a small dataset: runs/demo/report.md\n"
        "  medforget build --out medforget        the full dataset: load_dataset('medforget', 'patient_forget')\n"
        "  medforget COMMAND --help               what a command takes and does",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (help, fill) in _COMMANDS.items():
        subparser = commands.add_parser(name, help=help, formatter_class=_Formatter, allow_abbrev=False)
        if name == command:
            fill(subparser)
            subparser.set_defaults(options=sorted(subparser._option_string_actions))
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    from .plans import PLANS

    parser.set_defaults(run=_run)
    parser.description = (
        "Run a whole experiment under RUNS/NAME. Each stage is skipped when its inputs have not changed; a run that\n"
        "was killed goes on where it stopped."
    )
    parser.add_argument("--preset", required=True, help=f"what to run: {', '.join(PLANS)}")
    parser.add_argument("--name", help="name of the run (default: the preset's)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs")
    parser.add_argument("--seed", type=int, help="seed of data and training (default: the preset's)")
    parser.add_argument("--levels", nargs="+", help="levels to forget (default: the preset's)")
    parser.add_argument("--methods", nargs="+", help="methods to run (default: the preset's)")
    parser.add_argument(
        "--jobs", type=int, help="stages at a time (default: one a CPU core, and one where there is a GPU)"
    )
    parser.add_argument("--workers", type=int, help="processes that render images (default: one a CPU core)")


def _run(args: argparse.Namespace) -> int:
    from .pipeline import run

    report, failures = run(
        args.preset,
        name=args.name,
        runs=args.runs,
        seed=args.seed,
        levels=args.levels,
        methods=args.methods,
        workers=args.workers,
        jobs=args.jobs,
    )
    say(f"report: {report}")
    for name, reason in failures.items():
        say(f"missing in it: {name}: {reason}")
    return int(bool(failures))


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_report)
    parser.description = (
        "Write report.md, report.html, report.json, tables/ and figures/ of a run from what it has left, without\n"
        "training anything. What is missing is a hole with its reason.\n"
        "`medforget run` does this at its end."
    )
    parser.add_argument("folder", type=Path, help="folder of a run, such as runs/demo")


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_eval)


def _eval(args: argparse.Namespace) -> int:
    from harness_tasks.cli import evaluate

    return evaluate(args.arguments)


def _report(args: argparse.Namespace) -> int:
    from .pipeline import write_run_report

    say(f"report: {write_run_report(args.folder)}")
    return 0


def _add_tasks_path(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_tasks_path)
    parser.description = (
        "Print the folder of the lm-eval tasks, wherever the package is installed. For the stock command:\n"
        '  lm_eval ls tasks --include_path "$(medforget tasks-path)"\n'
        "`medforget eval` needs no path."
    )


def _tasks_path(args: argparse.Namespace) -> int:
    from harness_tasks.generate import FOLDER

    sys.stdout.write(f"{FOLDER}\n")
    return 0


_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    **DATASET_COMMANDS,
    "push": ("publish a dataset folder or a checkpoint on the Hub", add_push),
    "pretrain": ("make the tiny model", add_pretrain),
    "finetune": ("teach a model the benchmark", add_finetune),
    "unlearn": ("make a checkpoint forget a level", add_unlearn),
    "sweep": ("unlearn over a grid from a YAML file, one row each in a table", sweep.add_arguments),
    "eval": ("score a checkpoint: lm_eval, with a faster model class and our tasks", _add_eval),
    "run": ("build, train, unlearn, evaluate, report", _add_run),
    "report": ("write the report of a run again", _add_report),
    "browse": ("show a dataset and a run in a web page on this machine", browse.add_arguments),
    "tasks-path": ("print the folder of the lm-eval tasks", _add_tasks_path),
}


if __name__ == "__main__":
    sys.exit(main())
