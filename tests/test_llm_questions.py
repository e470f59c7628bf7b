"""Which replies of a language model are used, and that a build ends with all its rows however often it was stopped."""

import argparse
import asyncio
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter

import pyarrow.parquet as pq
import pytest
from llm_asking import TEXT, ask_all, change, first, lines, nodes_of
from openai_server import OpenAIServer, of_handler, task_of
from PIL import Image

from medforget_dataset import BuildOptions, UserError, build
from medforget_dataset.benchmark import Benchmark
from medforget_dataset.build_log import BuildLog
from medforget_dataset.cli import COMMANDS
from medforget_dataset.corpora import embedded
from medforget_dataset.hierarchy import Section
from medforget_dataset.llm.cache import ReplyCache
from medforget_dataset.questions import BLANK, template_questions
from medforget_dataset.questions.cloze import choose_clozes
from medforget_dataset.questions.llm.prompts import Ask, request
from medforget_dataset.questions.llm.replies import Draft
from medforget_dataset.questions.llm.wordings import set_apart
from medforget_dataset.questions.phrasings import Phrasings
from medforget_dataset.validate import validate


SMALL = {"institutions": 4, "patients": 4, "image_size": 56}


@of_handler
def refusal(handler, fields):
    handler.complete(None, refusal="I cannot help with patients.")


@of_handler
def filtered(handler, fields):
    handler.complete("", finish_reason="content_filter")


@of_handler
def prose(handler, fields):
    handler.complete("I am sorry, but I cannot do that.")


@of_handler
def cut_off(handler, fields):
    handler.complete(json.dumps(fields)[:40], finish_reason="length")


BAD = [
    ("generation", refusal, "refused: I cannot help"),
    ("generation", filtered, "refused: content_filter"),
    ("generation", prose, "not JSON"),
    ("generation", cut_off, "cut off"),
    ("generation", lambda fields: {"training": fields["training"]}, "exactly the fields training, held_out"),
    ("generation", lambda fields: fields | {"note": "x"}, "exactly the fields"),
    ("generation", lambda fields: [fields], "not an object"),
    ("generation", change(training="What?"), "training is not a list of strings"),
    ("generation", change(held_out=[1, 2]), "held_out is not a list"),
    ("generation", change(held_out=[]), "0 wordings under held_out"),
    ("generation", change(training=lambda fields: fields["training"][:3]), "3 wordings under training"),
    ("generation", first(" "), "training holds an empty string"),
    ("generation", change(held_out=lambda fields: [fields["training"][2].upper()]), "two wordings are the same"),
    ("generation", first("What does the report say?"), "section's name 'findings' is missing"),
    ("generation", first(f"What do the findings say, if not: {TEXT}"), "the whole section stands in"),
    ("generation", first("Do the findings tell of a small right pleural effusion?"), "which the section says"),
    ("generation", first("Do the findings say the heart is mildly enlarged?"), "the section is quoted"),
    ("generation", first("Write the findings " + "now " * 50), "longer than 40 words"),
    ("cloze", change(answer="left pleural effusion"), "does not stand in the section"),
    ("cloze", change(sentence=f"There is a {BLANK} {BLANK}."), "occurs 2 times"),
    ("cloze", change(sentence="There is a small right pleural effusion."), "occurs 0 times"),
    ("cloze", change(sentence=f"One sees a {BLANK}."), "letter for letter"),
    ("cloze", change(sentence=f"{BLANK} is a small right pleural effusion.", answer="There"), "not a clinical detail"),
    ("cloze", change(sentence=BLANK, answer="edema"), "fewer than 3 words"),
    (
        "cloze",
        change(
            sentence=f"There is a small right pleural {BLANK}. The heart", answer="effusion", training=["effusion"]
        ),
        "stands in 'effusion'",
    ),
    ("cloze", first(f"Complete the findings {BLANK}"), "stands in a wording"),
    ("cloze", first("Complete this sentence"), "name 'findings' is missing"),
    ("classification", change(options=["a", "b", "c"]), "3 options, 4 needed"),
    ("classification", change(options=["a", "b", "c", "d", "e"]), "5 options, 4 needed"),
    ("classification", change(options=["edema", "b", "Edema", "d"]), "two options are the same"),
    ("classification", change(options=["A) edema", "b", "c", "d"]), "depends on the order"),
    ("classification", change(options=["edema", "b", "c", "all of the above"]), "depends on the order"),
    ("classification", change(answer="A or B"), "is not one letter"),
    ("classification", change(answer=""), "answer holds an empty string"),
    ("classification", change(options=["x", "effusion", "z", "w"], training=["An effusion?"]), "the right option"),
]


@pytest.mark.parametrize(("task", "fault", "reason"), BAD, ids=[f"{task}-{reason}" for task, _, reason in BAD])
def test_a_reply_that_breaks_a_rule_is_asked_for_again_with_the_reason(task, fault, reason, tmp_path):
    log = BuildLog(path=tmp_path / "log")
    seen = Counter()

    def script(number, body):
        seen[task_of(body)] += 1
        return fault if task_of(body) == task and seen[task] == 1 else None

    with OpenAIServer(script) as server:
        ask_all(server, tmp_path, log=log)
    again = [body for body in server.bodies if task_of(body) == task]
    assert len(again) == 2 and len(server.bodies) == 4
    assert reason in again[1]["messages"][-1]["content"]
    entry = lines(tmp_path / "log")[0]
    assert (entry["action"], entry["kind"]) == ("noticed", "asked again")
    assert entry["row"] == f"inst00/pat000/study000/findings/{task}" and reason in entry["message"]


def test_rows_without_a_usable_reply_are_named_and_only_they_are_asked_again(tmp_path):
    healed = []

    def script(number, body):
        return None if task_of(body) != "cloze" or healed else change(answer="left effusion")

    texts = (TEXT, "A small nodule is seen in the lung.")
    with OpenAIServer(script) as server:
        with pytest.raises(UserError) as caught:
            ask_all(server, tmp_path, *texts)
        message = str(caught.value)
        assert "2 of 6 rows are missing" in message and "\n" not in message
        for number in (0, 1):
            assert f"inst00/pat{number:03d}/study{number:03d}/findings/cloze (the answer 'left effusion'" in message
        assert str(tmp_path / "llm") in message and "--on-error skip" in message
        assert Counter(map(task_of, server.bodies)) == {"generation": 2, "cloze": 6, "classification": 2}
        healed.append(True)
        assert len(ask_all(server, tmp_path, *texts)) == 2
    assert len(server.bodies) == 12
    assert max(Counter(map(json.dumps, server.bodies)).values()) == 1


def test_skipped_rows_take_fixed_wordings_and_are_logged(tmp_path):
    log = BuildLog("skip", tmp_path / "log")
    bad = change(options=["a", "b", "c"])
    with OpenAIServer(lambda number, body: bad if task_of(body) == "classification" else None) as server:
        asked = ask_all(server, tmp_path, log=log, on_error="skip")
        once = len(server.bodies)
        assert ask_all(server, tmp_path, on_error="skip") == asked and len(server.bodies) == once == 5
    path = "inst00/pat000/study000"
    fixed = template_questions(nodes_of(TEXT), 0, rendered=False, image="film")[path, "findings"]
    mine = asked[path, "findings"]
    assert (mine.classification, mine.options, mine.letter) == (fixed.classification, fixed.options, fixed.letter)
    assert mine.generation != fixed.generation and mine.cloze != fixed.cloze
    assert log.skipped == {"no usable reply": 1}
    skipped, summary = lines(tmp_path / "log")
    assert skipped["row"] == f"{path}/findings/classification" and "3 options, 4 needed" in skipped["message"]
    assert "2 of 3 rows are worded by stub-1" in summary["message"]


def test_sections_that_say_the_same_are_paid_for_once(tmp_path):
    with OpenAIServer() as server:
        asked = ask_all(server, tmp_path, TEXT, TEXT, TEXT, concurrency=8)
    assert len(server.bodies) == 3 and len(asked) == 3
    assert len({questions.letter for questions in asked.values()}) == 3


def test_the_cache_is_its_owners_and_does_not_trust_a_damaged_file(tmp_path):
    with OpenAIServer() as server:
        asked = ask_all(server, tmp_path)
        folder = tmp_path / "llm"
        files = sorted(folder.iterdir())
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and len(files) == 3
        assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
        files[0].write_bytes(files[0].read_bytes()[:50])
        files[1].write_text(files[1].read_text().replace("stub-1", "stub-2"))
        files[2].write_bytes(b"")
        assert ask_all(server, tmp_path) == asked and len(server.bodies) == 6
        assert ask_all(server, tmp_path) == asked and len(server.bodies) == 6
        ask_all(server, tmp_path, seed=1)
        ask_all(server, tmp_path, llm_model="another")
    assert len(server.bodies) == 12


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "llm").write_text("")
    with pytest.raises(UserError, match=r"llm: .*MEDFORGET_CACHE"):
        ReplyCache(tmp_path / "llm")


def test_a_cached_reply_is_found_by_model_and_whole_body(tmp_path):
    cache, ask = ReplyCache(tmp_path), Ask("a/b/c/findings/cloze", "cloze", Section("findings", TEXT), "film")
    body = request(ask, [], model="m", seed=0, by_schema=True)
    cache.put(body, {"content": "é"})
    assert cache.get(body) == {"content": "é"}
    for other in ({"model": "n"}, {"seed": 1}, {"by_schema": False}):
        assert cache.get(request(ask, [], **{"model": "m", "seed": 0, "by_schema": True} | other)) is None
    assert cache.get(request(ask, ["reason"], model="m", seed=0, by_schema=True)) is None


def apart(drafts):
    return set_apart(drafts, image="film")


def draft(training, held_out, spare=(("s1", "s2", "s3", "s4"), ("h1",)), answer="z"):
    return Draft(Phrasings(tuple(training), tuple(held_out)), Phrasings(*spare), answer)


def test_no_row_is_held_out_from_what_another_trains_on():
    drafts = {
        "1": draft("abcdef", "ghi"),
        "2": draft("abcdef", "ghi"),
        "3": draft("ghijkl", "abc"),  # the other two outvote it
        "4": draft(("s1", "k", "l", "m", "h1"), "n"),  # a fixed held-out wording, given for training
    }
    decided, filled = apart(drafts)
    trained = {wording for phrasings in decided.values() for wording in phrasings.training}
    held_out = {wording for phrasings in decided.values() for wording in phrasings.held_out}
    assert not trained & held_out
    assert all(len(set(p.training)) >= 4 and p.held_out for p in decided.values())
    assert decided["1"] == drafts["1"].phrasings and "h1" in decided["4"].held_out
    assert decided["3"] == Phrasings(("j", "k", "l", "a", "b", "c"), ("g", "h", "i")) and filled == []
    assert apart(dict(reversed(drafts.items())))[0] == decided


def test_wordings_change_sides_for_rows_that_have_too_few():
    drafts = {
        "1": draft("abcd", "ef"),
        "2": draft("abcd", "ef"),
        "3": draft("efgh", "i"),
        "4": draft("klmno", "p"),
        "5": draft("pklmn", "o"),
        "6": draft("opklm", "n"),
        "7": draft("nopkl", "m"),
    }
    decided, filled = apart(drafts)
    assert filled == [] and decided["1"] == Phrasings(("a", "b", "c", "d", "e"), ("f",))
    assert decided["3"] == Phrasings(("e", "g", "h", "i"), ("f",))
    held_out = {wording for id in "4567" for wording in decided[id].held_out}
    assert len(held_out) == 1 and not any(held_out & set(decided[id].training) for id in "4567")


def test_a_row_that_nothing_else_helps_takes_fixed_wordings_that_do_not_tell():
    drafts = {"1": draft("abcd", "e"), "2": draft("abcd", "e"), "4": draft("ijkl", "f"), "5": draft("ijkl", "f")}
    decided, filled = apart(drafts | {"3": draft("efgh", "a", answer="S1")})
    assert decided["3"] == Phrasings(("g", "h", "a", "s2"), ("e", "f")) and filled == ["3"]
    decided, filled = apart({"1": draft("abc", ["s1"])})
    assert decided["1"] == Phrasings(("a", "b", "c", "s1"), ("h1",)) and filled == ["1"]
    with pytest.raises(ValueError, match="9"):
        apart({"9": draft("abc", ["s1"], (("s1",), ("h1",)), "h1")})


def _wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# Some rows are worded badly at first; which ones depends on the section alone.
def clumsy(number, body):
    time.sleep(number % 3 / 1000)  # answers overtake one another
    bad = zlib.crc32(body["messages"][1]["content"].encode()) % 20 == 0 and len(body["messages"]) == 2
    return change(training=["no"]) if bad else None


ASK_16_STUDIES = """
import json, sys
from pathlib import Path
from medforget_dataset import BuildOptions
from medforget_dataset.benchmark import Benchmark
from medforget_dataset.build_log import BuildLog
from medforget_dataset.questions import template_questions
from medforget_dataset.questions.llm import llm_questions

def ask(options, cache, concurrency):
    options = BuildOptions(**options)
    nodes = Benchmark(options, 1).nodes[:16]
    given = {"image": "radiograph", "restricted": True, "log": BuildLog(), "concurrency": concurrency}
    templates = template_questions(nodes, 0, rendered=True, image="radiograph")
    return llm_questions(nodes, options, templates=templates, cache=Path(cache), **given)

if __name__ == "__main__":
    questions = ask(json.loads(sys.argv[1]), sys.argv[2], 4)
    print(json.dumps([[*address, *asked] for address, asked in questions.items()]))
"""


@pytest.mark.slow
def test_a_killed_build_goes_on_without_asking_twice(tmp_path):
    """What comes out is the same as what was never interrupted."""
    killed = threading.Event()
    held = []

    @of_handler
    def never(handler, fields):
        held.append(fields)
        killed.wait(60)
        handler.close_connection = True

    def script(number, body):
        hold = len(server.answered) >= 60 and not killed.is_set()
        return never if hold else clumsy(number, body)

    with OpenAIServer(script) as server:
        options = SMALL | {"questions": "llm", "endpoint": server.url, "llm_model": "stub"}
        call = [sys.executable, "-c", ASK_16_STUDIES, json.dumps(options), str(tmp_path / "killed")]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with open(tmp_path / "output", "wb") as output:
            killed_build = subprocess.Popen(call, env=environment, stdout=output, stderr=output)
        # All that is asked for is held, and all that was answered is on disk.
        _wait_for(lambda: len(held) == 4)
        _wait_for(lambda: len(list((tmp_path / "killed").glob("[!.]*"))) == len(server.answered))
        killed_build.kill()
        killed_build.wait(30)
        killed.set()
        done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "tokens" in done.stderr and "cached" in done.stderr
        assert max(Counter(map(json.dumps, server.answered)).values()) == 1
        assert len(server.bodies) == len(server.answered) + 4 and len(server.answered) > 150
        script = {}
        exec(ASK_16_STUDIES, script)
        whole = script["ask"](options, tmp_path / "whole", 3)
    assert json.loads(done.stdout) == json.loads(json.dumps([[*address, *asked] for address, asked in whole.items()]))


@pytest.fixture
def interruptible():
    """Shells start what runs in their background with Ctrl-C ignored, and Python leaves it at that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_keeps_what_was_answered(tmp_path):
    texts = [f"{n} nodules are seen in the lung." for n in range(6)]
    stop = [True]

    @of_handler
    def interrupt(handler, fields):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        handler.close_connection = True

    with OpenAIServer(lambda number, body: interrupt if stop and number >= 7 else None) as server:
        with pytest.raises(KeyboardInterrupt):
            ask_all(server, tmp_path, *texts)
        assert len(list((tmp_path / "llm").iterdir())) == len(server.answered) == 7
        stop.clear()
        ask_all(server, tmp_path, *texts)
        assert len(server.answered) == 18 and max(Counter(map(json.dumps, server.answered)).values()) == 1


def test_a_notebook_can_build(tmp_path):
    async def cell():
        return ask_all(server, tmp_path)

    with OpenAIServer() as server:
        assert len(asyncio.run(cell())) == 1


def test_a_whole_build_holds_every_invariant(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDFORGET_CACHE", str(tmp_path / "cache"))
    # What is seen does not matter here, and rendering it takes longer than everything else.
    monkeypatch.setattr(embedded.Corpus, "image", lambda *study, view_angle=0, size: Image.new("L", (size, size)))
    nodes = Benchmark(BuildOptions(**SMALL)).nodes
    chosen = choose_clozes(nodes, 0)
    clozes = {section.text: chosen[node.path, section.key] for node in nodes for section in node.study.sections}
    with OpenAIServer(clumsy, clozes) as server:
        options = SMALL | {"questions": "llm", "endpoint": server.url, "llm_model": "stub"}
        out = build(tmp_path / "medforget", workers=1, concurrency=3, **options)
        assert 768 < len(server.bodies) < 900
        rows = Benchmark(BuildOptions(**options), concurrency=8).rows
        assert len(server.bodies) == len(server.answered) and len(list((tmp_path / "cache" / "llm").iterdir())) > 700
    assert validate(out) == []
    written = pq.read_table(out / "finetune" / "train-00000-of-00001.parquet", columns=["id", "question", "answer"])
    assert written.to_pylist() == [{name: row[name] for name in ("id", "question", "answer")} for row in rows]
    assert "language model `stub`" in (out / "README.md").read_text()
    kinds = Counter(entry["kind"] for entry in lines(out / "build-log.jsonl"))
    assert kinds["language model"] == 1 and kinds["asked again"] > 20
    assert kinds["fixed wordings added"] == 0


def test_concurrency_is_checked(tmp_path):
    parser = argparse.ArgumentParser()
    COMMANDS["build"][1](parser)
    call = ["--out", str(tmp_path / "out"), "--questions", "llm", "--llm-model", "m", "--concurrency", "0"]
    args = parser.parse_args([*call, "--endpoint", "http://127.0.0.1:1/v1"])
    with pytest.raises(UserError, match="--concurrency 0: must be at least 1"):
        args.run(args)
