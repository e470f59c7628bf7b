"""Write a report as Markdown, HTML, JSON, CSV, LaTeX, PNG and SVG."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from medforget_dataset.atomic import replacing, write_text
from medforget_dataset.processes import available_cores

from .figures import Picture
from .run_folder import RunFolder
from .sections import Report
from .tables import Table, as_csv, as_latex, as_markdown


FORMAT = 2
LIBRARIES = ("torch", "transformers", "trl", "datasets", "lm_eval")
EMBEDDED = (
    "The corpus is rendered: radiographs are computed from one public chest CT; patients, names and reports are "
    "generated. No row describes a real person."
)
RESTRICTED = (
    "This run was made with restricted data. The report quotes it and shows images of it: the same people may see "
    "this folder as the data, and it must not be shared with others."
)
UNKNOWN_RIGHTS = (
    "The run's data cannot be read, so that it is not known whether it is restricted: treat this report as if it were."
)
TEMPLATES = Path(__file__).parent


def write_report(
    folder: Path, settings: dict[str, Any], seconds: dict[str, float], failures: dict[str, str] | None = None
) -> Path:
    """
    Write the report of a run from what its stages have left: `report.md`, `report.html`, `report.json`, `tables/` and
    `figures/`. What is missing is a hole with its reason.

    Args:
        folder (`Path`):
            Folder of the run.
        settings (`dict`):
            What was run.
        seconds (`dict[str, float]`):
            Duration of each stage.
        failures (`dict[str, str]`, *optional*):
            Stages that could not be done, and why.

    Returns:
        `Path`: `report.md`.
    """
    run = RunFolder(folder, settings, seconds, failures)
    report = Report(run)
    context = _context(report)
    blocks = [block for section in report.sections for block in section.blocks]
    tables = [block for block in blocks if isinstance(block, Table)]
    pictures = [block for block in blocks if isinstance(block, Picture)]
    texts = {f"{t.name}.csv": as_csv(t) for t in tables} | {f"{t.name}.tex": as_latex(t) for t in tables}
    _write_folder(folder / "tables", {name: text.encode() for name, text in texts.items()})
    images = {f"{p.name}.png": p.png for p in pictures} | {f"{p.name}.svg": p.svg for p in pictures}
    _write_folder(folder / "figures", images)
    write_text(folder / "report.json", _json(report, context))
    write_text(folder / "report.html", _render("report.html.jinja", context, autoescape=True))
    write_text(folder / "report.md", _render("report.md.jinja", context, autoescape=False))
    return folder / "report.md"


def _context(report: Report) -> dict[str, Any]:
    run = report.run
    sections = report.sections
    return {
        "report": report,
        "run": run,
        "name": run.path.resolve().name,
        "plan": run.plan,
        "preset": run.settings.get("preset", ""),
        "data": run.data,
        "corpus": _corpus_sentence(run),
        "warning": _warning(run),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "cores": available_cores(),
        "minutes": sum(run.seconds.values()) / 60,
        "sections": sections,
        "notes": run.notes,
        "style": Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        "as_markdown": as_markdown,
    }


def _corpus_sentence(run: RunFolder) -> str:
    if run.data is None:
        return ""
    corpus = run.data.options["corpus"]
    return EMBEDDED if corpus == "embedded" else f"Corpus: {corpus}{', restricted' if run.is_restricted else ''}."


def _warning(run: RunFolder) -> str:
    if run.is_restricted:
        return RESTRICTED
    return UNKNOWN_RIGHTS if run.data is None else ""


def _json(report: Report, context: dict[str, Any]) -> str:
    """One record a line, so that a number can be found, and compared, with the usual tools."""
    run = report.run
    head = {
        "format": FORMAT,
        "run": run.settings,
        "data": run.data
        and {
            "options": run.data.record["options"],
            "restricted": run.is_restricted,
            "forgotten_rows": run.data.record["forgotten_rows"],
        },
        "corpus": context["corpus"],
        "versions": context["versions"],
        "cpu_count": context["cores"],
        "seconds": run.seconds,
        "reading": report.reading,
        "notes": run.notes,
    }
    lists = {
        "records": [record.as_json() for record in report.records],
        "missing": report.records.holes(),
        "examples": [{k: v for k, v in asdict(example).items() if k != "image"} for example in report.examples],
        "curves": [asdict(curve) for curve in report.curves],
    }
    parts = [f'"{name}": {json.dumps(value, ensure_ascii=False)}' for name, value in head.items()]
    for name, lines in lists.items():
        body = ",\n".join(json.dumps(line, ensure_ascii=False, allow_nan=False) for line in lines)
        parts.append(f'"{name}": [\n{body}\n]' if lines else f'"{name}": []')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _render(template: str, context: dict[str, Any], *, autoescape: bool) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = _with_code
    return environment.get_template(template).render(context)


def _with_code(text: str) -> Markup:
    """Text as HTML, what stands between backticks as code."""
    parts = [escape(part) for part in text.split("`")]
    return Markup("").join(Markup("<code>{}</code>").format(part) if i % 2 else part for i, part in enumerate(parts))


def _write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """The folder with these files and no others, such as those of a report with other sections."""
    with replacing(folder) as partial:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name, content in files.items():
            (partial / name).write_bytes(content)
