"""The command that publishes: `medforget push dataset | model`."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from medforget_dataset.cli import say
from medforget_dataset.errors import UserError
from medforget_dataset.hub import dataset_upload, push_dataset
from medforget_dataset.publishing import Published, check_allowed


def add_push(parser: argparse.ArgumentParser) -> None:
    """Fill the parser of `medforget push`."""
    parser.set_defaults(run=_push)
    parser.description = (
        "Upload a dataset folder, exactly as it was built, or a checkpoint with a card of what was measured.\n"
        "The repository is made private. What is there already is not sent again: a push that was cut off goes on\n"
        "when it is run again. Restricted data, and what derives from it, never becomes public, and goes only to a\n"
        "Hub on this machine, or one that somebody agreed to (--endpoint-complies). The token is that of\n"
        "`hf auth login`, or HF_TOKEN."
    )
    parser.epilog = (
        "examples:\n"
        "  medforget push dataset medforget ORG/medforget --dry-run\n"
        "  medforget push dataset medforget ORG/medforget\n"
        "  medforget push model runs/demo/npo-patient ORG/tiny-npo-patient --base ORG/tiny-vanilla"
    )
    parser.add_argument("kind", choices=("dataset", "model"), help="what to upload")
    parser.add_argument("folder", type=Path, help="dataset folder or checkpoint")
    parser.add_argument("repository", metavar="ORG/NAME", help="repository on the Hub; made if it is not there")
    parser.add_argument("--public", action="store_true", help="let everybody see it, once it is complete")
    parser.add_argument(
        "--replace", action="store_true", help="replace what the repository holds, if that is something else"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the files and their sizes, and send nothing")
    parser.add_argument(
        "--endpoint-complies",
        default="",
        metavar="WHO",
        help="who agreed, under what terms, that restricted data may go to this Hub, into a private repository",
    )
    model = parser.add_argument_group("only for a model")
    model.add_argument(
        "--run",
        type=Path,
        dest="of_run",
        metavar="FOLDER",
        help="run whose report has the scores for the card (default: the one that the checkpoint is in)",
    )
    model.add_argument("--base", metavar="ORG/NAME", help="model that it was made from, on the Hub")
    model.add_argument("--dataset", metavar="ORG/NAME", help="dataset that it was made with, on the Hub")


def _push(args: argparse.Namespace) -> int:
    of_model = {"run": args.of_run, "base": args.base, "dataset": args.dataset}
    if args.kind == "dataset" and (given := next((name for name, value in of_model.items() if value), None)):
        raise UserError(f"--{given}: only for `medforget push model`")
    # Each request of the client would be a line.
    logging.getLogger("huggingface_hub").setLevel(logging.WARNING)
    if args.dry_run:
        return _list(args, of_model)
    options = {"public": args.public, "replace": args.replace, "complies": args.endpoint_complies}
    if args.kind == "dataset":
        published = push_dataset(args.folder, args.repository, **options)
    else:
        from .hub import left_out, push_model

        published = push_model(args.folder, args.repository, **of_model, **options)
        _note(args.folder, args.base, left_out(args.folder))
    _tell(args.folder, published)
    return 0


def _list(args: argparse.Namespace, of_model: dict) -> int:
    """What would be sent to an empty repository."""
    if args.kind == "dataset":
        upload = dataset_upload(args.folder)
    else:
        from .hub import left_out, model_upload

        upload = model_upload(args.folder, args.repository, **of_model)
    check_allowed(
        str(args.folder),
        args.repository,
        restricted=upload.restricted,
        public=args.public,
        complies=args.endpoint_complies,
    )
    sizes = upload.sizes()
    for name, size in sizes.items():
        sys.stdout.write(f"{size:>14,}  {name}\n")
    seen = "public" if args.public else "private"
    say(f"{args.repository}: {len(sizes)} files, {sum(sizes.values()):,} bytes, {seen}; nothing was sent")
    if args.kind == "model":
        _note(args.folder, args.base, left_out(args.folder))
    return 0


def _note(checkpoint: Path, base: str | None, left: list[str]) -> None:
    from .checkpoints import adapter_base

    if left:
        say(f"note: not uploaded, since not part of a checkpoint: {', '.join(left)}")
    if not base and (folder := adapter_base(checkpoint)) and Path(folder).is_dir():
        say(
            f"note: the adapter belongs to {folder}, which is on this machine alone: push that too, and name it with "
            "--base ORG/NAME, so that others can load it"
        )


def _tell(folder: Path, published: Published) -> None:
    state = "private" if published.private else "public"
    if not published.sent and not published.removed:
        say(f"{folder}: is at {published.url} already, {state}; nothing was sent")
        return
    removed = f", {len(published.removed)} removed" if published.removed else ""
    say(f"{folder}: {len(published.sent)} files sent{removed}: {published.url}, {state}")
