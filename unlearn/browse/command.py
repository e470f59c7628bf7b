"""The command `medforget browse`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from medforget_dataset.cli import say

from .exposure import LOOPBACK


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the arguments of the command."""
    parser.set_defaults(run=run_command)
    parser.description = (
        "Open a page, on this machine only, to walk through a dataset, read a run's report, and ask its checkpoints\n"
        "the same question about the same image. It needs the extra: pip install 'medforget[app]'.\n"
        "What is restricted is never shown to other machines, whatever the options."
    )
    parser.epilog = (
        "examples:\n"
        "  medforget browse medforget\n"
        "  medforget browse runs/demo/medforget runs/demo\n"
        "  medforget browse ORG/medforget runs/demo --space my-space     a folder to upload as a Hub Space"
    )
    parser.add_argument(
        "data", nargs="?", help="dataset folder, or a Hub id ORG/NAME (default: $MEDFORGET_DIR, or else ./medforget)"
    )
    parser.add_argument("results", nargs="?", type=Path, metavar="RUN", help="folder of a run, such as runs/demo")
    parser.add_argument(
        "--host", default=LOOPBACK, help="address to serve at; one that other machines reach is open to all"
    )
    parser.add_argument("--port", type=int, help="port to serve at (default: the first free one from 7860 on)")
    parser.add_argument("--share", action="store_true", help="ask Gradio's servers for a public address of the page")
    parser.add_argument(
        "--space", type=Path, metavar="FOLDER", help="write a Hub Space that shows the same, and open nothing"
    )


def run_command(args: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    from .app import browse, require_gradio

    require_gradio()
    if args.space is not None:
        from .space import write_space

        folder = write_space(args.space, args.data, args.results)
        say(f"{folder}: a Space; upload it with `hf upload ORG/NAME {shlex.quote(str(folder))} . --repo-type space`")
        return 0
    browse(args.data, args.results, host=args.host, port=args.port, share=args.share)
    return 0
