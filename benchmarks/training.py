"""Rows per second and peak memory of our training loops against the peers' loops, side by side on the CPU.

A model of 33 million parameters with the classes of Qwen2.5-VL and random weights, images of noise, questions of the
benchmark's length. Every measurement has a process of its own; ours and the peers' take turns.
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
PAGE = HERE.parent / "docs" / "benchmarks.md"
MARKER = "benchmarks.training"
QUESTIONS = (1, 3, 6, 15)
# 64, 256 and 324 tokens.
IMAGE_SIZES = (224, 448, 504)
METHODS = ("grad_diff", "kl_min", "npo")
TARGET_MEMORY = 0.6


def target_speedup(method: str) -> float:
    """How many times as fast as the peers' loop ours has to be with 15 questions an image and 256 tokens or more."""
    return 4.5 if method == "finetune" else 4.0


def grid(*, quick: bool, **settings: Any) -> list[Variant]:
    """
    What is measured, the peers' loop and ours in turns; what has a target comes first.

    Args:
        quick (`bool`):
            Fine-tuning and the three methods at 15 questions and 256 tokens only.
        **settings (`Any`):
            Fields of [`~benchmarks.variant.Variant`] for all of them.
    """
    cells: list[dict[str, Any]] = [{"method": method, "steps": 3} for method in ("finetune", *METHODS)]
    if not quick:
        finetune = {"method": "finetune", "steps": 5}
        with_target, *others = reversed(QUESTIONS)
        cells = [{**finetune, "questions": with_target, "image_size": size} for size in IMAGE_SIZES[1:]]
        cells += [{"method": method, "image_size": size} for size in IMAGE_SIZES[1:] for method in METHODS]
        cells += [{"method": method, "lora": True} for method in ("finetune", *METHODS)]
        cells += [{**finetune, "questions": number, "image_size": size} for size in IMAGE_SIZES for number in others]
        cells += [{**finetune, "image_size": IMAGE_SIZES[0]}]
        cells += [{"method": method, "image_size": IMAGE_SIZES[0]} for method in METHODS]
        cells += [{"method": method, "questions": number} for number in others for method in METHODS]
    both = [Variant(side, **{**cell, **settings}) for cell in cells for side in ("peers", "ours")]
    if quick:
        return both
    # The peers have no such loop: these stand beside their sequential one, with as many rows in a step.
    interleaved = [{"method": method, "schedule": "interleaved"} for method in ("grad_diff", "kl_min")]
    return both + [Variant("ours", **{**cell, **settings}) for cell in interleaved]


def missed_targets(content: dict[str, Any]) -> list[str]:
    """A line for every target that a measurement misses, or that could not be measured."""
    lines = []
    for setting, theirs, ours in pairs(content):
        lora, name = setting["lora"], TITLES[setting["method"]]
        where = f"{name}{' with LoRA' if lora else ''}, {_image_tokens(setting)} image tokens"
        if not lora and setting["questions"] == 15 and _image_tokens(setting) >= 256:
            times, share = speedup(theirs, ours), memory_share(theirs, ours)
            where += ", interleaved" if setting["schedule"] == "interleaved" else ""
            # Not written the other way round: what is not a number misses too.
            if not times >= target_speedup(setting["method"]):
                lines.append(f"{where}: {times:.2f} times as fast, not {target_speedup(setting['method'])}")
            if not share <= TARGET_MEMORY:
                lines.append(f"{where}: {share:.1%} of the memory, not {TARGET_MEMORY:.0%}")
        elif lora and not ours.get("weights_held", 9.0) < 1.5:
            lines.append(f"{where}: holds a second copy of the weights")
    return lines


def _image_tokens(setting: dict[str, Any]) -> int:
    return (setting["image_size"] // 28) ** 2


def render(content: dict[str, Any]) -> str:
    """The page's part between the markers."""
    header = (
        "",
        "image tokens",
        "questions",
        "peers, rows/s",
        "ours, rows/s",
        "times as fast",
        "peers, MB",
        "ours, MB",
        "share",
        "weights held: peers",
        "ours",
    )
    rows = []
    for setting, theirs, ours in pairs(content):
        name = TITLES[setting["method"]] + (", LoRA" if setting["lora"] else "")
        if setting["schedule"] == "interleaved":
            name += ", both kinds in an image"
        megabytes = [_scaled(side.get("peak_bytes"), 1e-6) for side in (theirs, ours)]
        rows.append(
            (
                name,
                str(_image_tokens(setting)),
                str(setting["questions"]),
                figure(theirs.get("rows_per_second"), 2),
                figure(ours.get("rows_per_second"), 2),
                figure(speedup(theirs, ours), 2),
                *(figure(value, 0) for value in megabytes),
                figure(100 * memory_share(theirs, ours), 0, " %"),
                *(figure(side.get("weights_held"), 2, " ×") for side in (theirs, ours)),
            )
        )
    runs = "\n".join(f"- {describe_run(run)}" for run in content["runs"])
    failed = [m for m in content["measurements"] if "error" in m]
    notes = "".join(f"- {m['variant']['side']} {m['variant']['method']}: {m['error']}\n" for m in failed)
    return f"{table(header, rows, 1)}\n\n{runs}\n{notes}"


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def main() -> int:
    """Measure, write the results and the table, and tell which targets are missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="15 questions, 256 image tokens, no LoRA: four minutes")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "training.json", help="results to write")
    parser.add_argument("--resume", action="store_true", help="measure only what --out does not hold yet")
    parser.add_argument("--markdown", type=Path, help="page with the table (docs/benchmarks.md unless --quick)")
    parser.add_argument("--render", action="store_true", help="measure nothing, write the table of --out again")
    parser.add_argument("--shape", default="30m", choices=("tiny", "30m"), help="model (30m)")
    parser.add_argument("--image-size", type=int, help="pixels of all images instead of 224, 448 and 504")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch (2)")
    parser.add_argument("--limit", type=float, default=300, help="seconds that one measurement may take (300)")
    args = parser.parse_args()
    page = args.markdown or (None if args.quick else PAGE)
    try:
        is_complete = args.render or _run(args)
        content = read(args.out)
        if page:
            put_between_markers(page, MARKER, render(content))
    except (UserError, FileNotFoundError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(render(content) + "\n")
    missed = missed_targets(content)
    if not is_complete:
        missed.append("not everything was measured; --resume measures the rest")
    sys.stdout.write("".join(f"missed: {line}\n" for line in missed) or "all targets are met\n")
    return int(bool(missed))


def _run(args: argparse.Namespace) -> bool:
    """Measure what is not in the results yet, and tell whether everything is."""
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    settings: dict[str, Any] = {"shape": args.shape, "threads": args.threads}
    if args.image_size:
        settings["image_size"] = args.image_size
    results = Results(args.out, describe_machine("cpu", args.threads), resume=args.resume)
    start = time.monotonic()
    variants = list(dict.fromkeys(grid(quick=args.quick, **settings)))
    return measure_all(variants, results, limit=args.limit, time_left=lambda: 7200 - (time.monotonic() - start))


if __name__ == "__main__":
    sys.exit(main())
