"""`medforget-vlm` against lm-eval's `hf-multimodal`: the same questions about the same images, the same answers.

Generation, log-likelihood, and the forget and retain rows of all four levels, which ask every question four times.
The questions are the rows of `medforget build`, and the tokenizer is trained on them; the images are noise.
`hf-multimodal` refuses log-likelihoods of images; the other side is there one padded row for each, with the logits of
all positions, as its own code for text has them. Random weights in float32, greedy answers of up to 16 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medforget_dataset.atomic import write_text
from medforget_dataset.errors import UserError

from .alone import describe_machine, run_alone
from .tables import describe_run, figure, put_between_markers, table


HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
MARKER = "benchmarks.evaluation"
LEVELS = 4
QUESTIONS = 15
BATCH = 64
"""Rows in a batch, as the documentation recommends and `medforget run` has it."""
TARGETS = {"generation": 6.0, "log-likelihood": 5.0, "all levels": 12.0}
"""How many times as fast ours has to be."""


@dataclass(frozen=True)
class Case:
    """
    What one process measures.

    Args:
        side (`str`): `"stock"` or `"ours"`.
        kind (`str`): One of [`TARGETS`].
        images (`int`): Images, with 15 questions each.
        image_size (`int`): Their height and width in pixels.
        shape (`str`): Name of one of `benchmarks.shapes.SHAPES`.
        threads (`int`): Threads of PyTorch.
    """

    side: str
    kind: str
    images: int = 4
    image_size: int = 448
    shape: str = "30m"
    threads: int = 2


def measure(case: Case) -> dict[str, Any]:
    """Seconds for all requests of a case, and a digest of the answers."""
    import torch
    from lm_eval.models.hf_vlms import HFMultimodalLM

    from harness_tasks.vlm import MedForgetVLM

    torch.set_num_threads(case.threads)
    rows = _rows()
    model, processor = _make_model(case, rows)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3)  # answers that differ
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        kind = HFMultimodalLM if case.side == "stock" else MedForgetVLM
        lm = kind(folder, device="cpu", dtype="float32", batch_size=BATCH)
    scores = case.kind == "log-likelihood"
    requests = _requests(lm, case, rows, with_options=scores)
    ask: Callable = lm.generate_until
    if scores:
        ask = lm.loglikelihood if case.side == "ours" else lambda asked, **_: _one_row_each(lm, asked)
    ask(requests[:1], disable_tqdm=True)  # warm-up
    start = time.perf_counter()
    answers = ask(requests, disable_tqdm=True)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "requests": len(requests), "answers": [_plain(answer) for answer in answers]}


def _rows() -> list[dict[str, Any]]:
    """All rows of a small dataset, those of a study together."""
    from medforget_dataset.benchmark import Benchmark
    from medforget_dataset.options import BuildOptions

    return Benchmark(BuildOptions(institutions=4, patients=4)).rows


def _make_model(case: Case, rows: list[dict[str, Any]]) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForImageTextToText

    from unlearn.models import TinyConfig, tiny_model

    from .shapes import make_config

    texts = [row[name] for row in rows for name in ("question", "answer")]
    # Its model is thrown away; the tokenizer and the image processor are what is wanted.
    small = TinyConfig(hidden_size=32, intermediate_size=32, layers=1, heads=1, vision_layers=1, vision_hidden_size=32)
    _, processor = tiny_model(texts, image_size=case.image_size, vocab_size=1024, config=small)
    torch.manual_seed(0)
    config = make_config(case.shape, processor)
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation="sdpa"), processor


def _plain(answer: Any) -> Any:
    return answer if isinstance(answer, str) else answer[0]


def _agree(one: list[Any], other: list[Any]) -> bool:
    """Whether texts are the same, and log-likelihoods to 1e-4 nats."""
    return all(a == b if isinstance(a, str) else abs(a - b) < 1e-4 for a, b in zip(one, other, strict=True))


def _requests(lm: Any, case: Case, rows: list[dict[str, Any]], *, with_options: bool) -> list[Any]:
    import numpy as np
    from lm_eval.api.instance import Instance
    from PIL import Image

    rng = np.random.default_rng(0)
    arguments = []
    for first in range(0, case.images * QUESTIONS, QUESTIONS):
        image = Image.fromarray(rng.integers(0, 255, (case.image_size, case.image_size, 3), dtype=np.uint8))
        for row in rows[first : first + QUESTIONS]:
            context = lm.apply_chat_template([{"role": "user", "content": f"<image>{row['question']}"}])
            if with_options:
                # An option of several tokens beside the letters.
                arguments += [
                    (context, option, {"visual": [image]}) for option in ("A", "B", "C", f"{row['answer']}.")
                ]
            else:
                decoding = {"until": [], "max_gen_toks": 16, "do_sample": False}
                arguments.append((context, decoding, {"visual": [image]}))
    if case.kind == "all levels":
        arguments *= LEVELS
    kind = "loglikelihood" if with_options else "generate_until"
    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]


def _one_row_each(lm: Any, requests: list[Any]) -> list[tuple[float, bool]]:
    """One padded row a request, and the logits of all positions."""
    import torch

    answers = []
    size = int(lm.batch_size)
    for start in range(0, len(requests), size):
        batch = [request.args for request in requests[start : start + size]]
        images = [args[2]["visual"] for args in batch]
        whole = lm.processor(
            text=[context + option for context, option, _ in batch],
            images=images,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        with torch.inference_mode():
            log_probs = lm.model(**whole).logits.log_softmax(-1)
        for i, (context, option, _) in enumerate(batch):
            own = len(lm.tokenizer(context + option)["input_ids"]) - len(lm.tokenizer(context)["input_ids"])
            target = whole["input_ids"][i, -own:]
            last = log_probs[i, -own - 1 : -1]
            total = last.gather(1, target[:, None]).sum().item()
            answers.append((total, bool((last.argmax(-1) == target).all())))
    return answers


def render(content: dict[str, Any]) -> str:
    """The page's part between the markers."""
    rows = []
    for kind in TARGETS:
        stock, ours = content["measurements"][kind]["stock"], content["measurements"][kind]["ours"]
        rates = [side["requests"] / side["seconds"] for side in (stock, ours)]
        same = "yes" if _agree(stock["answers"], ours["answers"]) else "no"
        rows.append(
            (kind, f"{ours['requests']:,}", *(figure(rate, 2) for rate in (*rates, rates[1] / rates[0])), same)
        )
    header = ("", "requests", "hf-multimodal, requests/s", "medforget-vlm", "times as fast", "same answers")
    return f"{table(header, rows, 1)}\n\n{describe_run(content['run'])}"


def missed_targets(content: dict[str, Any]) -> list[str]:
    """A line for every target that is missed."""
    lines = []
    for kind, target in TARGETS.items():
        stock, ours = (content["measurements"][kind][side] for side in ("stock", "ours"))
        times = stock["seconds"] / ours["seconds"]
        if not times >= target:
            lines.append(f"{kind}: {times:.2f} times as fast, not {target}")
        if not _agree(stock["answers"], ours["answers"]):
            lines.append(f"{kind}: the answers differ")
    return lines


def main() -> int:
    """Measure, write the results and the table, and tell which targets are missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "evaluation.json", help="results to write")
    parser.add_argument("--markdown", type=Path, default=PAGE, help="page with the table")
    parser.add_argument("--images", type=int, default=4, help="images with 15 questions each (4)")
    parser.add_argument("--image-size", type=int, default=448, help="their height and width in pixels (448)")
    parser.add_argument("--shape", default="30m", choices=("tiny", "30m"), help="model (30m)")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch (2)")
    parser.add_argument("--limit", type=float, default=600, help="seconds that one measurement may take (600)")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    content: dict[str, Any] = {"run": describe_machine("cpu", args.threads), "measurements": {}}
    settings = {"images": args.images, "image_size": args.image_size, "shape": args.shape, "threads": args.threads}
    try:
        for kind in TARGETS:
            for side in ("stock", "ours"):
                result = run_alone("benchmarks.evaluation:measure", Case(side, kind, **settings), limit=args.limit)
                if "error" in result:
                    raise UserError(f"{kind}, {side}: {result['error']}")
                content["measurements"].setdefault(kind, {})[side] = result
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.out, json.dumps(content, indent=1) + "\n")
        put_between_markers(args.markdown, MARKER, render(content))
    except (UserError, FileNotFoundError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(render(content) + "\n")
    missed = missed_targets(content)
    sys.stdout.write("".join(f"missed: {line}\n" for line in missed) or "all targets are met\n")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
