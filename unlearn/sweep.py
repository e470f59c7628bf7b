"""The command `medforget sweep`: a grid of unlearning runs from a small YAML file, and a table of their results."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from medforget_dataset.cli import say
from medforget_dataset.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the arguments of the command."""
    parser.set_defaults(run=run_command)
    parser.description = (
        "Unlearn over methods, levels, seeds and arguments, one row each in a table. Cells that are done are not run\n"
        "again; a sweep that was killed goes on where it stopped, and cells that failed are tried again."
    )
    parser.epilog = (
        "SWEEP.yaml, in which a list is a dimension of the grid:\n"
        "  model: runs/vanilla\n"
        "  levels: [institution, patient]\n"
        "  methods:\n"
        "    npo: {preset: tiny, beta: [0.1, 0.5], learning_rate: [1e-4, 3e-4]}\n"
        "    manu: {alpha: [1, 3, 5]}"
    )
    parser.add_argument("sweep", type=Path, metavar="SWEEP.yaml", help="what to run; docs/sweeps.md has the form")
    parser.add_argument("--out", type=Path, required=True, help="folder of results.csv, results.md and the cells")
    parser.add_argument(
        "--jobs", type=int, help="cells at a time (default: one a CPU core, and one where there is a GPU)"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, list the cells, and run nothing")
    parser.add_argument(
        "--keep-checkpoints",
        action="store_true",
        help="keep every cell's checkpoint; by default it is deleted when it is scored",
    )


def run_command(args: argparse.Namespace) -> int:
    """Run a sweep and return the exit status: 1 if a cell failed, else 0."""
    from .sweep_cells import Sweep
    from .sweep_grid import read_grid

    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: must be at least 1")
    sweep = Sweep(read_grid(args.sweep), args.out, keep_checkpoints=args.keep_checkpoints)
    before = sweep.outcomes()
    done = sum(map(sweep.is_done, before))
    counts = Counter(outcome.status for outcome in before)
    failed = f" ({counts['failed']} failed before)" if counts["failed"] else ""
    say(f"{args.sweep}: {len(before)} cells, {done} done before, {len(before) - done} to do{failed}")
    if args.dry_run:
        for outcome in before:
            say(f"  {outcome.cell.name:32s} {outcome.status:8s} {outcome.cell}")
        return 0
    failures = [outcome for outcome in sweep.run(args.jobs) if outcome.status != "done"]
    for outcome in failures:
        say(f"{outcome.cell.name} failed: {outcome.result.get('reason', '')}")
    say(f"table: {args.out / 'results.md'}")
    return 1 if failures else 0
