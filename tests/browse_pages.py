"""A small run with checkpoints, the real command on it, and headless Chromium in front: for tests of the browser."""

import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from report_runs import undrawn

from unlearn.pipeline import write_run_report


CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
CHECKPOINTS = ("vanilla", "retrained-patient", "npo-patient")
# Put before the command's own modules: no name is looked up and nothing is called beyond this machine.
WATCHED = """
import socket, sys
def watch(event, arguments):
    host = arguments[0] if event == "socket.getaddrinfo" else arguments[1] if event == "socket.connect" else None
    host = host[0] if isinstance(host, tuple) else host
    host = host.decode() if isinstance(host, bytes) else host
    if host in (None, "", "localhost", "0.0.0.0", "::", "::1") or str(host).startswith(("127.", "/")):
        return
    with open(LOG, "a") as log:
        log.write(f"{event} {host}\\n")
    raise OSError(f"{host}: not this machine")
sys.addaudithook(watch)
"""


def make_run(folder: Path, report_run, checkpoint: Path) -> Path:
    """A run with the report of `report_run`, and one checkpoint under three names."""
    if not (report_run.folder / "report.html").is_file():
        with undrawn():
            write_run_report(report_run.folder)
    folder.mkdir()
    for name in ("run.json", "report.html", "report.json"):
        shutil.copyfile(report_run.folder / name, folder / name)
    for name in (*CHECKPOINTS, "pretrained"):
        shutil.copytree(checkpoint, folder / name)
    return folder


def put_dataset(data: Path) -> None:
    """Give the Hub on this machine a dataset, as `alice/medforget`."""
    api = HfApi()
    api.create_repo("alice/medforget", repo_type="dataset")
    api.upload_folder(repo_id="alice/medforget", repo_type="dataset", folder_path=data)


class Server:
    """The command `medforget browse`, or a Space's `app.py`, in a process that can reach nothing but this machine."""

    def __init__(self, arguments, folder: Path, **environment):
        (folder / "watch").mkdir(parents=True, exist_ok=True)
        self.log = folder / "calls.log"
        (folder / "watch" / "sitecustomize.py").write_text(WATCHED.replace("LOG", repr(str(self.log))))
        path = os.pathsep.join((str(folder / "watch"), *filter(None, sys.path)))
        environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | environment
        call = [sys.executable, *map(str, arguments)]
        self.process = subprocess.Popen(
            call,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            # A shell that starts something beside itself has Ctrl-C ignored in it, and in all that it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.said = []

    def address(self) -> str:
        """Where the page is, once it is there."""
        for line in self.process.stderr:
            self.said.append(line)
            if found := re.match(r"open (http\S+?)/?;", line):
                return found[1]
        raise AssertionError(f"ended with {self.process.wait()}: {''.join(self.said)}")

    def stop(self) -> tuple[int, str]:
        """Exit status after Ctrl-C, and what was said since the address."""
        self.process.send_signal(signal.SIGINT)
        said = self.process.communicate(timeout=30)[1]
        return self.process.returncode, said

    def calls(self) -> str:
        """What it tried to reach beyond this machine."""
        return self.log.read_text() if self.log.exists() else ""

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@contextmanager
def chromium():
    """Headless Chromium that knows no other host."""
    from playwright.sync_api import sync_playwright

    rules = ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS + rules)
        try:
            yield browser
        finally:
            browser.close()


def open_page(browser, address: str, width: int = 1280, height: int = 900):
    """A page, and lists of its requests to others than this machine and of its errors."""
    page = browser.new_page(viewport={"width": width, "height": height})
    away, errors = [], []
    page.on("request", lambda request: None if _is_here(request.url) else away.append(request.url))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    page.locator(".mf-card").first.wait_for()
    return page, away, errors


def _is_here(url: str) -> bool:
    return url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:http://127.0.0.1:"))


def choose(page, label: str, words: str) -> None:
    """Choose in a dropdown the first option with these words."""
    page.get_by_label(label, exact=True).click()
    page.get_by_role("option").filter(has_text=words).first.click()
