"""Take the pictures of `docs/browser.md`: `python docs/screenshots.py DATASET RUN`; needs the extra `dev`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright


DOCS = Path(__file__).parent
CHROMIUM = "/usr/bin/chromium"
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync"
WIDTH, HEIGHT = 1280, 920


def take(page: Page, name: str, height: int = HEIGHT) -> None:
    """A picture of what is in the window."""
    page.set_viewport_size({"width": WIDTH, "height": height})
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)
    page.screenshot(path=DOCS / f"browser-{name}.png")


def choose(page: Page, label: str, number: int | str) -> None:
    """Choose an option of a dropdown by its place or its words."""
    page.get_by_label(label, exact=True).click()
    options = page.get_by_role("option")
    (options.nth(number) if isinstance(number, int) else options.filter(has_text=number).first).click()
    page.wait_for_timeout(700)


def screenshots(page: Page) -> None:
    """All three tabs: a forgotten patient, the scores, and what is left of a finding of that patient."""
    page.locator(".mf-card").first.wait_for()
    choose(page, "Configuration", "patient_forget (")
    for level in ("Institution", "Patient", "Study"):
        choose(page, level, 1)
    choose(page, "Section", "findings")
    take(page, "data")
    page.get_by_role("button", name="Ask the models").click()
    choose(page, "Question of the dataset", "cloze")
    for name in page.locator("#mf-checkpoints input").all():
        name.check()
    page.locator("#mf-ask").click()
    page.wait_for_function("document.querySelectorAll('tr[data-checkpoint]').length > 0", timeout=120_000)
    page.wait_for_function("!document.querySelector('.mf-status')", timeout=120_000)
    take(page, "side-by-side", height=1040)
    page.get_by_role("tab", name="Results").click()
    choose(page, "Section of the report", "Scores of every method")
    take(page, "results")


if __name__ == "__main__":
    call = [sys.executable, "-m", "unlearn.cli", "browse", *sys.argv[1:3]]
    with subprocess.Popen(call, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        said: list[str] = []
        while not (found := re.match(r"open (\S+);", said[-1] if said else "")):
            if not (line := server.stderr.readline()):
                sys.exit("".join(said))
            said.append(line)
        try:
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
                screen = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
                screen.goto(found[1])
                screenshots(screen)
                browser.close()
        finally:
            server.terminate()
