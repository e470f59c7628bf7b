"""The judge against a real OpenAI-compatible server, `transformers serve`, with a model that knows no JSON."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from judging import answers
from transformers.utils.import_utils import is_serve_available

from harness_tasks.judges import JudgeSettings
from harness_tasks.judges.llm import LLMJudge, budget


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_serve_available(), reason="needs transformers[serving]: fastapi and uvicorn"),
]


@pytest.fixture(scope="module")
def server(tiny_checkpoint, tmp_path_factory):
    """Address of `transformers serve` with the tiny checkpoint."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(tiny_checkpoint), "--device", "cpu"]
    log = tmp_path_factory.mktemp("serve") / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=output,
        )
    try:
        end = time.monotonic() + 300
        while not _is_up(port):
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)


def _is_up(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def test_a_model_that_answers_prose_marks_nothing(server, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    budget.cache_clear()
    settings = JudgeSettings("llm", server, str(tiny_checkpoint), cache=str(tmp_path / "judge"), max_requests=12)
    marks = LLMJudge(settings).marks(answers("No effusion.", "Large effusion.", "No effusion."))
    assert [mark.value for mark in marks] == [None] * 3 and marks[0] == marks[2]
    for mark in marks:
        assert mark.reason.startswith(("no usable reply in 3, last: not JSON", "no usable reply in 3, last: cut off"))
    assert budget(settings).sent == 6
    # From the cache, whoever else serves there.
    budget.cache_clear()
    assert LLMJudge(settings).marks(answers("Large effusion.", "No effusion.")) == [marks[1], marks[0]]
    assert budget(settings).sent == 0
