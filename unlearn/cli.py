"""The command line: `medforget build | validate | push | pretrain | finetune | unlearn | run | report`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from datasets.exceptions import DatasetGenerationError

from medforget_dataset.cli import COMMANDS as DATASET_COMMANDS
from medforget_dataset.cli import say
from medforget_dataset.errors import UserError
from medforget_dataset.hierarchy import LEVELS


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
    args, unknown = _parser(argv[0] if argv else "").parse_known_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for name in ("httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        if unknown:
            raise UserError(f"unknown argument {unknown[0]}; it takes {', '.join(args.options)}")
        return args.run(args)
    except UserError as error:
        say(f"medforget {args.command}: {error}")
        return 2
    except (OSError, BrokenExecutor, DatasetGenerationError) as error:
        # `datasets` wraps what kept it from writing its cache.
        say(f"medforget {args.command}: {error.__cause__ or error}")
        return 1
    except KeyboardInterrupt:
        say(f"medforget {args.command}: stopped; what was there before is as it was")
        return 130


def _parser(command: str) -> argparse.ArgumentParser:
    """The parser, in which only the command that was asked for has its arguments: the others' would cost seconds."""
    parser = _Parser(
        prog="medforget",
        formatter_class=_Formatter,
        description="Build the MedForget benchmark, train a model on it, make it forget a level, measure what is "
        "left.",
        epilog="first steps:\n"
        "  medforget run --preset demo            everything on a small dataset: runs/demo/report.md\n"
        "  medforget build --out medforget        the full dataset: load_dataset('medforget', 'patient_forget')\n"
        "  medforget COMMAND --help               what a command takes and does",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (help, fill) in _COMMANDS.items():
        subparser = commands.add_parser(name, help=help, formatter_class=_Formatter)
        if name == command:
            fill(subparser)
            subparser.set_defaults(options=sorted(subparser._option_string_actions))
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", help="dataset folder or Hub id (default: $MEDFORGET_DIR, else ./medforget)")


def _add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, order, wordings and views")
    parser.add_argument("--views", type=Path, help="file to keep turned views in (default: one in ~/.cache/medforget)")
    parser.add_argument("--workers", type=int, help="processes that render turned views (default: one a CPU core)")
    parser.add_argument("--learning-rate", type=float, default=argparse.SUPPRESS, help="highest learning rate")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other training argument of TRL's SFTConfig, such as --set logging_steps=10; may be repeated",
    )


def _training_arguments(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Training arguments given on the command line; what was not given stays with the preset."""
    from .config import FineTuneConfig

    chosen = {name: getattr(args, name) for name in names if hasattr(args, name)}
    known = {field.name for field in fields(FineTuneConfig) if field.init} - {"output_dir", "disable_tqdm"}
    for pair in args.set:
        name, separator, value = pair.partition("=")
        if not separator or name not in known:
            raise UserError(f"--set {pair}: give NAME=VALUE with a field of TRL's SFTConfig, such as logging_steps=10")
        try:
            chosen[name] = json.loads(value)
        except json.JSONDecodeError:
            chosen[name] = value
    return chosen


def _add_pretrain(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_pretrain)
    parser.description = (
        "Make the embedded tiny Qwen2.5-VL, with a tokenizer trained on the dataset, and teach it general_med."
    )
    _add_data(parser)
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--preset", default="tiny", help="tiny or tiny-robust")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the order")


def _pretrain(args: argparse.Namespace) -> int:
    from .finetune import pretrain

    scores = pretrain(args.data, args.out, preset=args.preset, seed=args.seed)
    _print_scores(args.out, scores)
    return 0


def _add_finetune(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_finetune)
    parser.description = (
        "Teach a model every row (--config finetune), or only what a level retains (--config patient_retain: the "
        "model\n"
        "that unlearning is compared with). Prints the share of rows answered exactly, for each task, and the "
        "same when\n"
        "every row is asked about another patient's image."
    )
    _add_data(parser)
    parser.add_argument(
        "--model", help="checkpoint or Hub id to start from (default: a tiny model made by the preset)"
    )
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--config", default="finetune", help="finetune, or {institution,patient,study,section}_retain")
    parser.add_argument(
        "--preset",
        help="recipe for the tiny model. tiny: one wording a row; tiny-robust: wordings and views redrawn every epoch",
    )
    parser.add_argument(
        "--epochs", dest="num_train_epochs", type=float, default=argparse.SUPPRESS, help="passes over the rows"
    )
    parser.add_argument(
        "--images-per-step",
        dest="per_device_train_batch_size",
        type=int,
        default=argparse.SUPPRESS,
        help="images in a batch, each with all its rows",
    )
    _add_training(parser)


def _finetune(args: argparse.Namespace) -> int:
    from .finetune import finetune

    names = ("num_train_epochs", "per_device_train_batch_size", "learning_rate", "seed")
    scores = finetune(
        args.data,
        args.out,
        model=args.model,
        config=args.config,
        preset=args.preset,
        views=args.views,
        workers=args.workers,
        **_training_arguments(args, names),
    )
    _print_scores(args.out, scores)
    return 0


def _add_unlearn(parser: argparse.ArgumentParser) -> None:
    from .methods import METHODS, method_arguments

    parser.set_defaults(run=_unlearn)
    parser.description = (
        "Make a checkpoint forget what {level}_forget holds and keep what {level}_retain holds.\n"
        "A preset is a named choice of arguments; arguments on the command line override it."
    )
    _add_data(parser)
    parser.add_argument("--model", required=True, help="checkpoint that knows everything")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--method", required=True, help=", ".join(METHODS))
    parser.add_argument("--level", required=True, help=", ".join(LEVELS))
    presets = "; ".join(f"{name}: {', '.join(method.presets)}" for name, method in METHODS.items() if method.presets)
    parser.add_argument("--preset", help=f"named arguments of a method ({presets})")
    for name in ("max_steps", "forget_per_step", "retain_per_step"):
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=argparse.SUPPRESS, help=_TRAINING_HELP[name]
        )
    _add_training(parser)
    for name, (help, kind) in _method_flags(METHODS, method_arguments).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=argparse.SUPPRESS, help=help)


_TRAINING_HELP = {
    "max_steps": "optimisation steps",
    "forget_per_step": "images with rows to forget in a batch",
    "retain_per_step": "images with nothing to forget in a batch",
}


def _method_flags(methods: dict, arguments: Callable) -> dict[str, tuple[str, type]]:
    """One flag for every hyper-parameter of any method, with what it means in each method that has it."""
    flags: dict[str, tuple[str, type]] = {}
    for method in methods:
        for name, field in arguments(method).items():
            text = f"{method}: {field.metadata['help']} (default: {field.default}, {field.metadata['source']})"
            kind = float if isinstance(field.default, float) else int if isinstance(field.default, int) else str
            before = f"{flags[name][0]}. " if name in flags else ""
            flags[name] = ((before + text).replace("%", "%%"), kind)
    return flags


def _unlearn(args: argparse.Namespace) -> int:
    from .methods import METHODS, method_arguments
    from .unlearning import unlearn

    names = ("max_steps", "forget_per_step", "retain_per_step", "learning_rate", "seed")
    scores = unlearn(
        args.data,
        args.out,
        model=args.model,
        method=args.method,
        level=args.level,
        preset=args.preset,
        views=args.views,
        workers=args.workers,
        **_training_arguments(args, (*names, *_method_flags(METHODS, method_arguments))),
    )
    _print_scores(args.out, scores)
    return 0


def _add_run(parser: argparse.ArgumentParser) -> None:
    from .pipeline import PLANS

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

    report = run(
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
    return 0


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_report)
    parser.description = (
        "Write report.md, report.json and the plots of a run from its evaluations, without training anything.\n"
        "`medforget run` does this at its end."
    )
    parser.add_argument("folder", type=Path, help="folder of a run, such as runs/demo")


def _report(args: argparse.Namespace) -> int:
    from .pipeline import write_run_report

    say(f"report: {write_run_report(args.folder)}")
    return 0


def _print_scores(out: Path, scores: dict[str, dict[str, float]]) -> None:
    say(f"{out}: rows answered exactly")
    for side, tasks in scores.items():
        say(f"  {side:12s}" + "  ".join(f"{task} {100 * value:.1f} %" for task, value in tasks.items()))


_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    **DATASET_COMMANDS,
    "pretrain": ("make the tiny model", _add_pretrain),
    "finetune": ("teach a model the benchmark", _add_finetune),
    "unlearn": ("make a checkpoint forget a level", _add_unlearn),
    "run": ("build, train, unlearn, evaluate, report", _add_run),
    "report": ("write the report of a run again", _add_report),
}


if __name__ == "__main__":
    sys.exit(main())
