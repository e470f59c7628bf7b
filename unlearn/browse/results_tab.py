"""The tab that shows a run's report, a section at a time, as it was written."""

from __future__ import annotations

from html import escape

import gradio as gr

from .run import ReportedRun


NO_RUN = (
    '<div class="mf-empty"><p>No run was given.</p><p><code>medforget run --preset demo</code> makes one; '
    "<code>medforget browse runs/demo/medforget runs/demo</code> shows it here.</p></div>"
)


# What the report leaves to the browser, and Gradio takes away; and a box that is as wide as the page.
_BOX = (
    "& { max-width: none; padding: 0.2rem 1rem 1rem; margin: 0; } p { margin: 0.7rem 0; } "
    "ul { margin: 0.7rem 0; padding-left: 1.3rem; list-style: disc; } .answers { padding: 0; list-style: none; } "
    "h3 { font-weight: 700; }"
)


def add_results(run: ReportedRun | None) -> None:
    """Fill the tab, which is the open one of the page that is being made."""
    if run is None or not run.sections:
        gr.HTML(NO_RUN if run is None else _without_report(run), padding=False, apply_default_css=False)
        return
    bodies = {section.anchor: section.body for section in run.sections}
    first = run.sections[0].anchor
    titles = [(section.title, section.anchor) for section in run.sections]
    chosen = gr.Dropdown(titles, value=first, label="Section of the report", elem_id="mf-section-of-report")
    shown = gr.HTML(_framed(bodies[first]), padding=False, apply_default_css=False, elem_id="mf-report")
    chosen.input(
        lambda anchor: _framed(bodies[anchor]), chosen, shown, show_progress="hidden", api_visibility="private"
    )


def _without_report(run: ReportedRun) -> str:
    return (
        f'<div class="mf-empty"><p>{escape(str(run.folder))} has no report.</p>'
        f"<p><code>{escape(run.how_to_report)}</code> writes it.</p></div>"
    )


def _framed(body: str) -> str:
    return f'<div class="mf-report">{body}</div>'


def report_style(run: ReportedRun | None) -> str:
    """The report's own style sheet, for the part of the page that shows it."""
    if run is None or not run.style:
        return ""
    # Its root and body are here the box that the section stands in.
    style = run.style.replace(":root {", "& {").replace("\nbody {", "\n& {").replace("  body {", "  & {")
    return f".mf-report {{\n{style}\n{_BOX}\n}}"
