"""The page, and serving it. Nothing that it loads comes from another machine."""

from __future__ import annotations

import logging
import os
import threading
import warnings
from pathlib import Path

import gradio as gr

from medforget_dataset.cli import say

from . import cards
from .catalogue import Catalogue
from .data_tab import DataTab
from .exposure import is_this_machine
from .results_tab import add_results, report_style
from .run import ReportedRun
from .side_tab import SideTab


# The system's own: Gradio's default theme would name fonts of a font service.
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONOSPACE = ("ui-monospace", "Consolas", "monospace")


def make_page(catalogue: Catalogue, run: ReportedRun | None, restricted: list[str]) -> gr.Blocks:
    """
    The page.

    Args:
        catalogue ([`~unlearn.browse.catalogue.Catalogue`]):
            The dataset.
        run ([`~unlearn.browse.run.ReportedRun`], *optional*):
            The run.
        restricted (`list[str]`):
            What of it is restricted.
    """
    with gr.Blocks(title="MedForget", analytics_enabled=False) as page:
        gr.HTML(cards.banner(catalogue, restricted), padding=False, apply_default_css=False)
        with gr.Tabs() as tabs:
            with gr.Tab("Data", id="data"):
                data = DataTab(catalogue)
            with gr.Tab("Results", id="results"):
                add_results(run)
            with gr.Tab("Side by side", id="side"):
                SideTab(catalogue, run, data.shown)
        data.ask.click(lambda: gr.Tabs(selected="side"), None, tabs, api_visibility="private")
    return page


def serve(page: gr.Blocks, run: ReportedRun | None, *, host: str, port: int, share: bool) -> None:
    """
    Serve a page until Ctrl-C.

    Args:
        page (`gradio.Blocks`):
            From [`make_page`].
        run ([`~unlearn.browse.run.ReportedRun`], *optional*):
            The run that it shows, whose report brings its style sheet.
        host (`str`), port (`int`):
            Where.
        share (`bool`):
            Whether to ask Gradio for a public address.
    """
    for name in ("httpx", "httpcore", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=UserWarning, module="gradio")
    style = (Path(__file__).parent / "page.css").read_text(encoding="utf-8") + report_style(run)
    # No environment variable turns on what would share something: each option that one could is given, and Gradio
    # takes the paths that it serves from this one even where none are given.
    os.environ.pop("GRADIO_ALLOWED_PATHS", None)
    _, local, public = page.queue(default_concurrency_limit=4).launch(
        server_name=host,
        server_port=port,
        share=share,
        ssr_mode=False,
        mcp_server=False,
        run_history=False,
        enable_monitoring=False,
        pwa=False,
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        theme=gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=FONTS, font_mono=MONOSPACE),
        head=f"<style>\n{style}\n</style>",
    )
    say(f"open {public or local}; Ctrl-C ends it")
    if not is_this_machine(host):
        say(f"note: everyone who reaches this machine at {host} sees the page")
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        page.close(verbose=False)
        say("closed")
