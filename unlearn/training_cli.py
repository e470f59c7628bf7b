"""The commands that train: `medforget pretrain | finetune | unlearn`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from medforget_dataset.cli import say
from medforget_dataset.errors import UserError
from medforget_dataset.hierarchy import LEVELS
from medforget_dataset.processes import is_first_process


ACCELERATE_CONFIGS = Path(__file__).with_name("accelerate_configs")


@dataclass(frozen=True)
class _Flag:
    """A training argument with a flag of its own; its default, which a preset may change, is the field's."""

    flag: str
    field: str
    kind: Any
    help: str
    metavar: str = "N"
    group: str = "training"


_STEPS, _SPEED, _LORA, _STOP = "training", "speed and memory", "LoRA, only with --lora", "when to stop, what to keep"
_FLAGS = (
    _Flag("learning-rate", "learning_rate", float, "highest learning rate", "X"),
    _Flag("epochs", "num_train_epochs", float, "passes over the images", "X"),
    _Flag("max-steps", "max_steps", int, "optimisation steps, in place of epochs"),
    _Flag("accumulation", "gradient_accumulation_steps", int, "batches whose gradients are added before a step"),
    _Flag("report-to", "report_to", str, "service to send metrics to: tensorboard, wandb, trackio, …", "NAME"),
    _Flag(
        "max-length", "max_length", int, "longest sequence in tokens; longer ones are refused, never cut", "N", _SPEED
    ),
    _Flag("dtype", "dtype", str, "type of the weights: auto, float32 or bfloat16", "NAME", _SPEED),
    _Flag("lora-r", "lora_r", int, "rank of the adapter", "N", _LORA),
    _Flag("lora-alpha", "lora_alpha", int, "scale of the adapter", "N", _LORA),
    _Flag("lora-dropout", "lora_dropout", float, "share of the adapter's inputs dropped", "X", _LORA),
    _Flag("lora-targets", "lora_target_modules", str, "expression for whole names of adapted layers", "REGEX", _LORA),
    _Flag(
        "save-steps",
        "save_steps",
        float,
        "steps between checkpoints to resume from, or below 1 their share",
        "X",
        _STOP,
    ),
)
_FINETUNE_FLAGS = (
    _Flag("images-per-step", "per_device_train_batch_size", int, "images in a batch, each with all its rows"),
)
_UNLEARN_FLAGS = (
    _Flag("forget-per-step", "forget_per_step", int, "images with rows to forget in a batch"),
    _Flag("retain-per-step", "retain_per_step", int, "images with nothing to forget in a batch"),
    _Flag(
        "schedule",
        "schedule",
        str,
        "interleaved, or sequential as MLLMU-Bench: an epoch's forget rows, then its retain rows",
        "NAME",
    ),
    _Flag(
        "retain-floor",
        "retain_floor",
        float,
        "stop when, retain_patience (2) times in a row, a smaller share of retain rows, 0 to 1, is answered exactly",
        "X",
        _STOP,
    ),
)
# Flag, field, value, help, group.
_SWITCHES = (
    ("lora", "use_peft", True, "train a LoRA adapter of the language model instead of the model", _STEPS),
    ("freeze-vision", "freeze_vision", True, "do not train the vision tower", _STEPS),
    ("cache-vision", "cache_vision", True, "encode each image once; the vision tower must not be trained", _SPEED),
    ("no-packing", "pack_images", False, "one padded sequence a row, not one an image: the same, slower", _SPEED),
)
_UNLEARN_SWITCHES = (
    ("keep-best", "keep_best", True, "keep the weights with the best retain minus forget score, not the last", _STOP),
)


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add `--data`."""
    parser.add_argument("--data", help="dataset folder or Hub id (default: $MEDFORGET_DIR, else ./medforget)")


def add_pretrain(parser: argparse.ArgumentParser) -> None:
    """Fill the parser of `medforget pretrain`."""
    parser.set_defaults(run=_pretrain)
    parser.description = (
        "Make the embedded tiny Qwen2.5-VL, with a tokenizer trained on the dataset, and teach it general_med."
    )
    add_data(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="checkpoint folder to write")
    parser.add_argument("--preset", default="tiny", help="tiny or tiny-robust")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the order")


def _pretrain(args: argparse.Namespace) -> int:
    from .pretrain import pretrain

    scores = pretrain(args.data, args.out, preset=args.preset, seed=args.seed)
    _print_scores(args.out, scores)
    return 0


def _add_training(parser: argparse.ArgumentParser, config: type, flags: Sequence[_Flag], switches: Sequence) -> None:
    """What fine-tuning and unlearning share, with defaults from the fields of the configuration."""
    run = parser.add_argument_group("the run")
    run.add_argument("--resume", action="store_true", help="go on with the same run where it was stopped")
    run.add_argument("--overwrite", action="store_true", help="replace another run's checkpoint in --out")
    run.add_argument(
        "--save-adapter", action="store_true", help="write the LoRA adapter alone, not merged (with --lora)"
    )
    run.add_argument(
        "--push-to-hub",
        metavar="ORG/NAME",
        help="upload the finished checkpoint, as `medforget push model` does, to a private repository",
    )
    run.add_argument("--seed", type=int, default=0, metavar="N", help="seed of order, wordings and views")
    run.add_argument(
        "--accelerate-config",
        metavar="NAME|FILE",
        help="run on several GPUs or machines: "
        + ", ".join(sorted(file.stem for file in ACCELERATE_CONFIGS.glob("*.yaml")))
        + ", or a file of `accelerate config`",
    )
    data = parser.add_argument_group("images")
    data.add_argument("--max-pixels", type=int, metavar="N", help="most pixels of an image (default: the processor's)")
    data.add_argument(
        "--views", type=Path, metavar="FILE", help="file to keep turned views in (default: one in ~/.cache/medforget)"
    )
    data.add_argument(
        "--workers", type=int, metavar="N", help="processes that render turned views (default: one a CPU core)"
    )
    defaults = {field.name: field.default for field in fields(config)} | {"save_steps": 0.1}
    groups: dict[str, Any] = {}
    for name in (_STEPS, _SPEED, _LORA, _STOP):
        groups[name] = parser.add_argument_group(
            name, "Defaults are those without a preset." if name == _STEPS else None
        )
    for flag in (*flags, *_FLAGS):
        default = defaults[flag.field]
        known = "" if default in (None, -1) or flag.field == "lora_target_modules" else f" (default: {default})"
        groups[flag.group].add_argument(
            f"--{flag.flag}",
            dest=flag.field,
            type=flag.kind,
            default=argparse.SUPPRESS,
            metavar=flag.metavar,
            help=(flag.help + known).replace("%", "%%"),
        )
    for name, field, value, help, group in (*switches, *_SWITCHES):
        groups[group].add_argument(
            f"--{name}", dest=field, action="store_const", const=value, default=argparse.SUPPRESS, help=help
        )
    parser.add_argument_group("anything else").add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other training argument of TRL's SFTConfig, such as --set logging_steps=10; may be repeated",
    )


def _run_arguments(args: argparse.Namespace) -> dict[str, Any]:
    names = ("model_preset", "max_pixels", "views", "workers", "resume", "overwrite", "save_adapter")
    return {name: getattr(args, name) for name in names}


def _training_arguments(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Training arguments given on the command line; what was not given stays with the preset."""
    from .argument_types import read_typed, types_of
    from .config import FineTuneConfig, UnlearnConfig

    chosen = {name: getattr(args, name) for name in names if hasattr(args, name)}
    if args.push_to_hub:
        chosen |= {"push_to_hub": True, "hub_model_id": args.push_to_hub}
    config = UnlearnConfig if args.command == "unlearn" else FineTuneConfig
    # These have flags of their own, or are not the user's to choose.
    own = {"output_dir", "disable_tqdm", "method", "method_args", "level", *vars(args)} - set(chosen)
    known = {name: hint for name, hint in types_of(config).items() if name not in own}
    for pair in args.set:
        name, separator, value = pair.partition("=")
        if not separator or name not in known:
            raise UserError(f"--set {pair}: give NAME=VALUE with a field of TRL's SFTConfig, such as logging_steps=10")
        chosen[name] = read_typed(f"--set {name}", value, known[name])
    return chosen


def _names(flags: Sequence[_Flag], switches: Sequence) -> list[str]:
    return ["seed", *(flag.field for flag in (*flags, *_FLAGS)), *(field for _, field, *_ in (*switches, *_SWITCHES))]


@contextmanager
def _flags_named(flags: Sequence[_Flag], switches: Sequence) -> Iterator[None]:
    """Inside the context, an error that begins with a training argument names its flag."""
    named = {flag.field: flag.flag for flag in (*flags, *_FLAGS)}
    named |= {field: flag for flag, field, value, *_ in (*switches, *_SWITCHES) if value}
    try:
        yield
    except UserError as error:
        name, separator, rest = str(error).partition(" ")
        if (field := name.rstrip(":")) in named:
            error.args = (f"--{named[field]}{name.removeprefix(field)}{separator}{rest}",)
        raise


def add_finetune(parser: argparse.ArgumentParser) -> None:
    """Fill the parser of `medforget finetune`."""
    from .config import FineTuneConfig

    parser.set_defaults(run=_finetune)
    parser.description = (
        "Teach a model every row (--config finetune), or only what a level retains (--config patient_retain: the "
        "model\n"
        "that unlearning is compared with). Prints the share of rows answered exactly, for each task, and the "
        "same when\n"
        "every row is asked about another patient's image."
    )
    add_data(parser)
    parser.add_argument(
        "--model", help="checkpoint or Hub id to start from (default: the model preset's, or a tiny model)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="checkpoint folder to write")
    parser.add_argument("--config", default="finetune", help="finetune, or {institution,patient,study,section}_retain")
    parser.add_argument(
        "--preset",
        help="tiny, tiny-robust: recipes for the tiny model, with one wording a row, or wordings and views redrawn; "
        "paper, mllmu-bench, open-unlearning: training arguments of theirs",
    )
    parser.add_argument(
        "--model-preset", metavar="NAME", help="what a model takes on one GPU of 80 GB: lingshu-7b, qwen2.5-vl-7b"
    )
    _add_training(parser, FineTuneConfig, _FINETUNE_FLAGS, ())


def _finetune(args: argparse.Namespace) -> int:
    if args.accelerate_config:
        return _launch(args.accelerate_config)
    from .finetune import finetune

    with _flags_named(_FINETUNE_FLAGS, ()):
        scores = finetune(
            args.data,
            args.out,
            model=args.model,
            config=args.config,
            preset=args.preset,
            **_run_arguments(args),
            **_training_arguments(args, _names(_FINETUNE_FLAGS, ())),
        )
    _print_scores(args.out, scores)
    return 0


def add_unlearn(parser: argparse.ArgumentParser) -> None:
    """Fill the parser of `medforget unlearn`."""
    from .config import UnlearnConfig
    from .methods import METHODS, method_arguments

    parser.set_defaults(run=_unlearn)
    parser.description = (
        "Make a checkpoint forget what {level}_forget holds and keep what {level}_retain holds.\n"
        "A preset is a named choice of arguments; arguments on the command line override it."
    )
    add_data(parser)
    parser.add_argument("--model", required=True, help="checkpoint that knows everything")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="checkpoint folder to write")
    parser.add_argument("--method", required=True, metavar="NAME", help=f"one of {', '.join(METHODS)}")
    parser.add_argument("--level", required=True, metavar="NAME", help=f"one of {', '.join(LEVELS)}")
    presets = "; ".join(f"{name}: {', '.join(method.presets)}" for name, method in METHODS.items() if method.presets)
    parser.add_argument("--preset", help=f"named arguments of a method ({presets})")
    parser.add_argument(
        "--model-preset", metavar="NAME", help="what a model takes on one GPU of 80 GB: lingshu-7b, qwen2.5-vl-7b"
    )
    _add_training(parser, UnlearnConfig, _UNLEARN_FLAGS, _UNLEARN_SWITCHES)
    group = parser.add_argument_group("the method")
    for name, (help, kind) in _method_flags(METHODS, method_arguments).items():
        metavar = "NAME" if kind is str else "X"
        group.add_argument(
            f"--{name.replace('_', '-')}", type=kind, default=argparse.SUPPRESS, metavar=metavar, help=help
        )


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
    if args.accelerate_config:
        return _launch(args.accelerate_config)
    from .methods import METHODS, method_arguments
    from .unlearning import unlearn

    names = (*_names(_UNLEARN_FLAGS, _UNLEARN_SWITCHES), *_method_flags(METHODS, method_arguments))
    with _flags_named(_UNLEARN_FLAGS, _UNLEARN_SWITCHES):
        scores = unlearn(
            args.data,
            args.out,
            model=args.model,
            method=args.method,
            level=args.level,
            preset=args.preset,
            **_run_arguments(args),
            **_training_arguments(args, names),
        )
    _print_scores(args.out, scores)
    return 0


def _launch(config: str) -> int:
    """Start this same command again, on all processes of a configuration of accelerate."""
    named = ACCELERATE_CONFIGS / f"{config}.yaml"
    file = named if named.is_file() else Path(config)
    if not file.is_file():
        known = ", ".join(sorted(entry.stem for entry in ACCELERATE_CONFIGS.glob("*.yaml")))
        raise UserError(f"--accelerate-config {config}: no such file, and not one of {known}")
    arguments = [*sys.argv[1:]]
    at = next(i for i, argument in enumerate(arguments) if argument.startswith("--accelerate-config"))
    del arguments[at : at + (1 if "=" in arguments[at] else 2)]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    sys.stdout.flush()
    os.execv(sys.executable, [*command, "-m", "unlearn.cli", *arguments])


def _print_scores(out: Path, scores: dict[str, dict[str, float]]) -> None:
    if not is_first_process():
        return
    say(f"{out}: rows answered exactly")
    for side, tasks in scores.items():
        say(f"  {side:12s}" + "  ".join(f"{task} {100 * value:.1f} %" for task, value in tasks.items()))
