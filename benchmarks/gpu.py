"""Our training loops against the peers' on one GPU, in the shape of Qwen2.5-VL-7B with random weights.

LoRA of rank 16 on the language model, bfloat16, images of 448 × 448 pixels with 15 questions each. Nothing is
downloaded. Results are written as they come, and a further call goes on where the last one stopped, so that it can be
run in pieces (--budget).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from medforget_dataset.errors import UserError

from .alone import describe_machine
from .tables import (
    TITLES,
    Results,
    describe_run,
    figure,
    measure_all,
    memory_share,
    pairs,
    put_between_markers,
    read,
    speedup,
    table,
)
from .variant import Variant


HERE = Path(__file__).parent
MARKER = "benchmarks.gpu"
METHODS = ("finetune", "grad_diff", "kl_min", "npo", "manu")
H200_BF16_FLOPS = 989e12
"""NVIDIA's datasheets of H100 SXM and H200 SXM: dense bfloat16, without sparsity."""

# The paper's experiment: rows of the dataset, and rows to forget at the four levels together (768, 832, 896 and 960).
ROWS, FORGET_ROWS, LEVELS = 3840, 3456, 4
FINE_TUNING_EPOCHS = 10
"""README of the authors' repository."""


def experiment_hours(rates: dict[str, float | None], unlearning_epochs: int) -> dict[str, float | None]:
    """
    Hours of the paper's whole experiment: fine-tuning, and four methods at four levels each.

    GradDiff and KL-Min see all 3,840 rows once an epoch, NPO those to forget, as its paper's form has no retain term,
    and MANU all rows once.

    Args:
        rates (`dict[str, float | None]`):
            Rows a second of each method.
        unlearning_epochs (`int`):
            Epochs of the three methods that train.

    Returns:
        `dict[str, float | None]`: Hours of each method for all levels, and `"all"`; `None` where a rate is missing.
    """
    visits = {
        "finetune": FINE_TUNING_EPOCHS * ROWS,
        "grad_diff": LEVELS * unlearning_epochs * ROWS,
        "kl_min": LEVELS * unlearning_epochs * ROWS,
        "npo": unlearning_epochs * FORGET_ROWS,
        "manu": LEVELS * ROWS,
    }
    hours: dict[str, float | None] = {}
    for method, count in visits.items():
        rate = rates.get(method)
        hours[method] = count / rate / 3600 if rate else None
    known = [value for value in hours.values() if value is not None]
    hours["all"] = sum(known) if len(known) == len(visits) else None
    return hours


def render(content: dict[str, Any], *, peak_flops: float, unlearning_epochs: int) -> str:
    """The page's part between the markers."""
    header = ("", "loop", "rows/s", "tokens/s", "MFU", "peak above the model, GB", "times as fast", "memory", "hours")
    measured = pairs(content)
    rates = {
        side: {setting["method"]: sides[i].get("rows_per_second") for setting, *sides in measured}
        for i, side in enumerate(("peers", "ours"))
    }
    hours = {side: experiment_hours(rates[side], unlearning_epochs) for side in rates}
    rows = []
    for setting, theirs, ours in measured:
        method = setting["method"]
        for side, figures in (("peers", theirs), ("ours", ours)):
            is_ours = side == "ours"
            used = figures.get("flops_per_second")
            peak = figures.get("peak_bytes")
            rows.append(
                (
                    TITLES[method],
                    side,
                    figure(figures.get("rows_per_second"), 1),
                    figure(figures.get("tokens_per_second"), 0),
                    figure(used and 100 * used / peak_flops, 1, " %"),
                    figure(None if peak is None else peak / 1e9, 1),
                    figure(speedup(theirs, ours), 2) if is_ours else "",
                    figure(100 * memory_share(theirs, ours), 0, " %") if is_ours else "",
                    figure(hours[side][method], 2),
                )
            )
    for side in ("peers", "ours"):
        rows.append(("the whole experiment", side, "", "", "", "", "", "", figure(hours[side]["all"], 1)))
    runs = "\n".join(f"- {describe_run(run)}" for run in content["runs"])
    errors = [m for m in content["measurements"] if "error" in m]
    notes = "".join(f"- {m['variant']['side']} {m['variant']['method']}: {m['error']}\n" for m in errors)
    return (
        f"{table(header, rows, 2)}\n\nHours are for {FINE_TUNING_EPOCHS} epochs of fine-tuning over {ROWS:,} rows and "
        f"for four levels of each method, with {unlearning_epochs} epoch(s) of unlearning. MFU is of "
        f"{peak_flops / 1e12:,.0f} TFLOP/s.\n\n{runs}\n{notes}"
    )


def variants(args: argparse.Namespace) -> list[Variant]:
    """What is measured, the peers' loop and ours in turns."""
    settings: dict[str, Any] = {
        "questions": args.questions,
        "image_size": args.image_size,
        "shape": args.shape,
        "device": args.device,
        "checkpointing": args.checkpointing,
        "warm_up": 1 if args.device == "cpu" else 3,
        "steps": args.steps,
        "threads": args.threads,
    }
    return [
        # MANU does not train.
        Variant(side, method, lora=method != "manu", **settings)
        for method in args.methods
        for side in ("peers", "ours")
    ]


def main() -> int:
    """Measure what is not measured yet, write the results and the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=HERE / "results" / "gpu.json", help="results to write and go on with"
    )
    parser.add_argument("--markdown", type=Path, help="page with the markers to write the table to; else only printed")
    parser.add_argument("--fresh", action="store_true", help="forget what --out holds")
    parser.add_argument("--render", action="store_true", help="measure nothing, write the table of --out again")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="what to measure (all)")
    parser.add_argument("--budget", type=float, default=560, help="seconds in which to begin no more than ends (560)")
    parser.add_argument("--limit", type=float, default=240, help="seconds that one measurement may take (240)")
    parser.add_argument("--peak-flops", type=float, default=H200_BF16_FLOPS, help="of the device, bf16 (989e12)")
    parser.add_argument("--unlearning-epochs", type=int, default=1, help="for the hours (1, as MLLMU-Bench)")
    parser.add_argument("--shape", default="7b", choices=("tiny", "30m", "7b"), help="model (7b)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="device (cuda)")
    parser.add_argument("--image-size", type=int, default=448, help="pixels (448)")
    parser.add_argument("--questions", type=int, default=15, help="rows of an image (15)")
    parser.add_argument("--steps", type=int, default=8, help="steps of each kind that are counted (8)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of PyTorch (all cores)")
    parser.add_argument(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="recompute activations in the backward pass, in both loops (yes, as the authors do)",
    )
    args = parser.parse_args()
    try:
        complete = args.render or _run(args)
        content = read(args.out)
        page = render(content, peak_flops=args.peak_flops, unlearning_epochs=args.unlearning_epochs)
        if args.markdown:
            put_between_markers(args.markdown, MARKER, page)
    except (UserError, FileNotFoundError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(page + "\n")
    if not complete:
        sys.stderr.write("not everything is measured yet; give the same command again to go on\n")
    return 0 if complete else 1


def _run(args: argparse.Namespace) -> bool:
    start = time.monotonic()
    results = Results(args.out, describe_machine(args.device, args.threads), resume=not args.fresh)
    return measure_all(
        variants(args), results, limit=args.limit, time_left=lambda: args.budget - (time.monotonic() - start)
    )


if __name__ == "__main__":
    sys.exit(main())
