"""Results as JSON that grows as they come, and as Markdown between two marker comments of a page."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from medforget_dataset.atomic import replacing
from medforget_dataset.errors import UserError

from .alone import run_alone
from .variant import Variant, as_record


TITLES = {"finetune": "fine-tuning", "grad_diff": "GradDiff", "kl_min": "KL-Min", "npo": "NPO", "manu": "MANU"}


class Results:
    """
    Measurements in a JSON file.

    Args:
        path (`Path`):
            The file. What it holds is kept if `header` agrees with it on the versions of the libraries.
        header (`dict`):
            From [`~benchmarks.alone.describe_machine`].
        resume (`bool`, *optional*, defaults to `False`):
            Keep what the file holds already; else it is begun anew.
    """

    def __init__(self, path: Path, header: dict[str, Any], *, resume: bool = False):
        self.path = path
        self.content: dict[str, Any] = {"runs": [], "measurements": []}
        if resume and path.is_file():
            self.content = read(path)
            if (made_with := self.content["runs"][-1]["versions"]) != header["versions"]:
                again = "measure all of it again (--fresh, or no --resume)"
                raise UserError(f"{path}: was measured with {made_with}; {again}")
        self.content["runs"].append(header)

    def add(self, variant: Variant, result: dict[str, Any]) -> None:
        """Add a measurement and write the file, whole or not at all."""
        record = as_record(variant, result)
        kept = [m for m in self.content["measurements"] if m["variant"] != record["variant"]]
        self.content["measurements"] = [*kept, record]
        with replacing(self.path) as partial:
            partial.write_text(json.dumps(self.content, indent=1) + "\n")

    def has(self, variant: Variant) -> bool:
        """Whether there is a measurement of a variant that did not fail."""
        wanted = as_record(variant, {})["variant"]
        return any(m["variant"] == wanted and "error" not in m for m in self.content["measurements"])


def measure_all(
    variants: Sequence[Variant], results: Results, *, limit: float, time_left: Callable[[], float]
) -> bool:
    """
    Measure one variant after another, each in a process of its own, and write each down at once.

    Args:
        variants (`Sequence[Variant]`):
            What to measure; what `results` already has is left out.
        results ([`Results`]):
            Where to write.
        limit (`float`):
            Seconds that one may take.
        time_left (`Callable`):
            Seconds that are left for all of them. None is begun once it is negative.

    Returns:
        `bool`: Whether all of them were measured.
    """
    wanted = [variant for variant in variants if not results.has(variant)]
    with tqdm(wanted, unit="run") as bar:
        for variant in bar:
            if time_left() <= 0:
                return False
            bar.set_description(variant.describe())
            allowed = min(limit, time_left())
            result = run_alone("benchmarks.loops:measure", variant, limit=allowed, device=variant.device)
            if "error" in result:
                bar.write(f"{variant.describe()}: {result['error']}")
                if allowed < limit:  # its share of the time was short: left for the next run
                    return False
            results.add(variant, result)
    return all(results.has(variant) for variant in variants)


def read(path: Path) -> dict[str, Any]:
    """The content of a results file."""
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: is not a results file ({error}); delete it, or give another --out") from error


def pairs(content: dict[str, Any]) -> list[tuple[dict, dict, dict]]:
    """For every setting that both loops were measured in: the setting, the peers' figures, and ours."""
    found: dict[str, dict[str, dict]] = {}
    for measurement in content["measurements"]:
        setting = {name: value for name, value in measurement["variant"].items() if name != "side"}
        if measurement["variant"]["side"] == "peers" or setting["schedule"] == "sequential":
            found.setdefault(json.dumps(setting), {})[measurement["variant"]["side"]] = measurement
        else:
            # Beside the sequential loop of the peers, which have no other.
            found.setdefault(json.dumps(setting), {})["ours"] = measurement
    result = []
    for name, sides in found.items():
        setting = json.loads(name)
        theirs = sides.get("peers") or found.get(json.dumps({**setting, "schedule": "sequential"}), {}).get("peers")
        if theirs and "ours" in sides:
            result.append((setting, theirs, sides["ours"]))
    return result


def speedup(theirs: dict, ours: dict) -> float:
    """Our rows a second as a multiple of the peers'."""
    return _quotient(ours.get("rows_per_second"), theirs.get("rows_per_second"))


def memory_share(theirs: dict, ours: dict) -> float:
    """Our peak memory above the model as a share of the peers'."""
    return _quotient(ours.get("peak_bytes"), theirs.get("peak_bytes"))


def _quotient(a: float | None, b: float | None) -> float:
    return a / b if a is not None and b else math.nan


def table(header: Sequence[str], rows: Iterable[Sequence[str]], words: int) -> str:
    """A Markdown table whose first `words` columns are words and the others figures."""
    rule = ["---"] * words + ["---:"] * (len(header) - words)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def figure(value: float | None, digits: int = 1, unit: str = "") -> str:
    """A number for a table; a dash where it is missing."""
    return "–" if value is None or math.isnan(value) else f"{value:,.{digits}f}{unit}"


def describe_run(header: dict[str, Any]) -> str:
    """A sentence on when, where and with what a run was made."""
    versions = ", ".join(f"{name} {number}" for name, number in header["versions"].items())
    where = header["gpu"] or f"{header['cpu']}, {header['threads']} threads"
    return (
        f"`{header['command']}` on {header['date']}: {where}; Python {header['python']}, {versions}; "
        f"load of the machine at the start {header['load']}."
    )


def put_between_markers(page: Path, name: str, markdown: str) -> None:
    """
    Replace what a page has between `<!-- name -->` and `<!-- /name -->`.

    Raises:
        UserError: If there is no such page, or it lacks the markers.
    """
    before, after = f"<!-- {name} -->", f"<!-- /{name} -->"
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    head, found, rest = text.partition(before)
    _, end, tail = rest.partition(after)
    if not (found and end):
        raise UserError(f"{page}: has no {before} followed by {after}; add the two lines where the table goes")
    with replacing(page) as partial:
        partial.write_text(f"{head}{before}\n\n{markdown.strip()}\n\n{after}{tail}", encoding="utf-8")
