"""A language model as the judge, against a real HTTP server on loopback that misbehaves as told."""

import json
import logging
import socket
import stat
import sys
import threading

import pytest
from judging import answers, judge_server, marks_of, settings_of
from llm_asking import change, shorten_waits
from openai_server import of_handler, reset_connection

from harness_tasks.judges import Awaited, JudgeSettings, llm, settle
from harness_tasks.judges.llm import LLMJudge, budget
from medforget_dataset.errors import UserError
from medforget_dataset.llm import client


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    shorten_waits(monkeypatch)
    budget.cache_clear()


def values(marks):
    return [mark.value for mark in marks]


def test_each_answer_is_asked_about_once_in_text_and_in_structured_output(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with judge_server() as server:
        marks = marks_of(server, tmp_path, "is 3", "is 10", "is 3", "is 1")
    assert values(marks) == [3, 10, 3, 1] and marks[0].reason == "read 'is 3'"
    assert len(server.bodies) == 3 and set(server.tokens) == {"sk-secret"}
    for body in server.bodies:
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("stub", 0, 512)
        assert body["response_format"]["json_schema"]["strict"] is True
        system, user = body["messages"]
        assert "1 to 10" in system["content"] and isinstance(user["content"], str)
        asked = json.loads(user["content"])
        assert asked["question"] == "What do the findings say?" and asked["reference"] == "No effusion."
    assert {json.loads(body["messages"][1]["content"])["answer"] for body in server.bodies} == {
        "is 3",
        "is 10",
        "is 1",
    }
    files = list((tmp_path / "judge").iterdir())
    assert len(files) == 3 and not any(b"sk-secret" in file.read_bytes() for file in files)
    assert stat.S_IMODE((tmp_path / "judge").stat().st_mode) == 0o700


def test_a_second_run_asks_nothing_and_another_model_everything(tmp_path):
    with judge_server() as server:
        first = marks_of(server, tmp_path, "is 3", "is 4")
        assert marks_of(server, tmp_path, "is 4", "is 3") == first[::-1] and len(server.bodies) == 2
        other = JudgeSettings("llm", server.url, "other", cache=str(tmp_path / "judge"))
        assert values(LLMJudge(other).marks(answers("is 3", "is 4"))) == [3, 4]
        assert len(server.bodies) == 4
        marks_of(server, tmp_path, "is 3", "is 5")
    assert len(server.bodies) == 5


@of_handler
def prose(handler, fields):
    handler.complete("I would say about seven out of ten.")


@of_handler
def refusal(handler, fields):
    handler.complete(None, refusal="I cannot judge patients.")


@of_handler
def cut_off(handler, fields):
    handler.complete(json.dumps(fields)[:10], finish_reason="length")


BAD = [
    (prose, "not JSON"),
    (refusal, "refused: I cannot judge"),
    (cut_off, "cut off"),
    (change(score=11), "score is 11, not a whole number from 1 to 10"),
    (change(score=0), "score is 0"),
    (change(score="7/10"), 'score is "7/10"'),
    (change(score="7"), 'score is "7"'),
    (change(score=7.5), "score is 7.5"),
    (change(score=True), "score is true"),
    (change(score=None), "score is null"),
    (change(reasoning=["x"]), "reasoning is not a string"),
    (lambda fields: {"score": 7}, "exactly the fields score, reasoning"),
    (lambda fields: [fields], "not an object"),
]


@pytest.mark.parametrize(("fault", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_a_reply_without_a_mark_is_asked_for_again_with_the_reason(fault, reason, tmp_path):
    with judge_server(lambda number, body: fault if number == 0 else None) as server:
        assert values(marks_of(server, tmp_path, "is 4")) == [4]
    assert len(server.bodies) == 2 and reason in server.bodies[1]["messages"][-1]["content"]


def test_an_answer_without_a_usable_reply_has_no_mark_and_never_a_low_one(tmp_path, caplog):
    def script(number, body):
        return prose if "hopeless" in body["messages"][1]["content"] else None

    with judge_server(script) as server:
        marks = marks_of(server, tmp_path, "is 4", "hopeless")
        assert values(marks) == [4, None] and "no usable reply in 3, last: not JSON" in marks[1].reason
        assert len(server.bodies) == 4
        # Nor in a second run, which asks nothing.
        assert marks_of(server, tmp_path, "is 4", "hopeless") == marks and len(server.bodies) == 4
        rows = [Awaited(settings_of(server, tmp_path), answered, 0.2) for answered in answers("is 4", "hopeless")]
        with caplog.at_level(logging.WARNING, "harness_tasks.judges"):
            settle(rows)
    assert rows[0] == {"factuality": 0.4, "gen_score": pytest.approx(0.35), "reason": "read 'is 4'"}
    assert rows[1]["factuality"] is rows[1]["gen_score"] is None
    assert "judge llm:stub: 1 of 2 answers have no mark: no usable reply in 3" in caplog.text


@of_handler
def html(handler, fields):
    handler.send(b"<html>busy</html>", content_type="text/html")


@of_handler
def wait_a_moment(handler, fields):
    handler.send({"error": {"message": "slow down"}}, 429, {"Retry-After": "0.4"})


@pytest.mark.parametrize("fault", [429, 500, 503, html, reset_connection])
def test_what_is_no_reply_is_asked_for_again_as_it_was(fault, tmp_path):
    with judge_server(lambda number, body: fault if number < 2 else None) as server:
        assert values(marks_of(server, tmp_path, "is 4")) == [4]
    assert server.bodies[0] == server.bodies[1] == server.bodies[2] and len(server.bodies) == 3


def test_a_slow_endpoint_is_waited_for_and_retry_after_kept_to(tmp_path):
    with judge_server(lambda number, body: wait_a_moment if number == 0 else None) as server:
        assert values(marks_of(server, tmp_path, "is 4")) == [4]
    assert server.times[1] - server.times[0] >= 0.4


@of_handler
def hang(handler, fields):
    import time

    time.sleep(1)


def test_an_endpoint_that_never_answers_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "TIMEOUT_SECONDS", 0.05)
    monkeypatch.setattr(client, "RETRIES", 1)
    with judge_server(lambda number, body: hang) as server:
        with pytest.raises(
            UserError, match=r"judge_endpoint .*no reply in 0.05 seconds; \d of 9 answers have no mark"
        ):
            marks_of(server, tmp_path, *(f"is {n}" for n in range(1, 10)))


def test_a_server_without_structured_output_is_asked_in_plain_text(tmp_path):
    def script(number, body):
        return 400 if "response_format" in body else fenced

    @of_handler
    def fenced(handler, fields):
        handler.complete(f"```json\n{json.dumps(fields, indent=1)}\n```")

    with judge_server(script) as server:
        assert values(marks_of(server, tmp_path, "is 4", "is 5", "is 6")) == [4, 5, 6]
        forms = [body.get("response_format", {}).get("type") for body in server.bodies]
        assert forms == ["json_schema", "json_object", None, None, None]
        assert values(marks_of(server, tmp_path, "is 4", "is 5")) == [4, 5] and len(server.bodies) == 5


@of_handler
def redirect(handler, fields):
    handler.send(b"", 307, {"Location": "http://198.51.100.7/v1/chat/completions"})


@of_handler
def wrong_key(handler, fields):
    handler.send({"error": {"message": "Incorrect API key: sk-secret"}}, 401)


@of_handler
def over_quota(handler, fields):
    handler.send({"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}, 429)


@of_handler
def no_money(handler, fields):
    handler.send({"error": {"message": "Insufficient Balance"}}, 402)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (redirect, "redirect"),
        (wrong_key, "Incorrect API key: …"),
        (over_quota, "exceeded your quota"),
        (no_money, "Insufficient Balance"),
        (404, "told to answer 404"),
    ],
)
def test_an_endpoint_that_does_not_let_us_in_ends_the_run_at_once(fault, message, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    broken = [True]
    with judge_server(lambda number, body: fault if number and broken else None) as server:
        with pytest.raises(
            UserError, match=rf"judge_endpoint {server.url}: .*{message}.*1 of 2 answers have no"
        ) as it:
            marks_of(server, tmp_path, "is 4", "is 5", concurrency=1)
        assert len(server.bodies) == 2 and "\n" not in str(it.value) and "sk-secret" not in str(it.value)
        broken.clear()
        # What was answered is not asked again.
        assert values(marks_of(server, tmp_path, "is 4", "is 5")) == [4, 5] and len(server.bodies) == 3


def test_an_endpoint_that_is_down_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "RETRIES", 1)
    with judge_server() as server:
        pass
    with pytest.raises(UserError, match=rf"judge_endpoint {server.url}: ConnectError.*1 of 1 answers.*`--use_cache`"):
        marks_of(server, tmp_path, "is 4")


def test_an_endpoint_that_is_down_is_told_before_a_model_answers(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with judge_server() as server:
        judge = LLMJudge(settings_of(server, tmp_path))
        for _ in range(2):  # tasks
            judge.check(restricted=True)
        (headers,) = server.looks
        assert server.bodies == [] and not any("sk-secret" in value for value in headers.values())
        marks = judge.marks(answers("is 4"))
    llm._connect.cache_clear()
    for _ in range(2):
        judge.check(restricted=True)
    assert judge.marks(answers("is 4")) == marks  # from the cache
    (told,) = caplog.messages
    assert told.startswith(f"judge_endpoint {server.url}: no connection: ") and str(tmp_path) in told
    fresh = LLMJudge(settings_of(server, tmp_path / "empty"))
    for _ in range(2):
        with pytest.raises(UserError, match=rf"^judge_endpoint {server.url}: no connection: .*refused; start") as told:
            fresh.check(restricted=True)
        assert "\n" not in str(told.value)
    nowhere = JudgeSettings("llm", "http://judge.invalid/v1", "m", complies="nobody's text")
    with pytest.raises(UserError, match=r"^judge_endpoint http://judge.invalid/v1: no connection: "):
        LLMJudge(nowhere).check(restricted=True)


@pytest.mark.parametrize("reply", [b"", b"SSH-2.0\r\n"])
def test_whatever_takes_the_connection_is_up(reply):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(reply)

        thread = threading.Thread(target=answer)
        thread.start()
        LLMJudge(JudgeSettings("llm", f"http://127.0.0.1:{listener.getsockname()[1]}/v1", "m")).check(restricted=True)
        thread.join()


def test_the_cap_holds_for_all_tasks_of_a_process_and_what_is_left_has_no_mark(tmp_path):
    with judge_server(lambda number, body: 500 if number == 0 else None) as server:
        judge = LLMJudge(settings_of(server, tmp_path, max_requests=4, concurrency=1))
        assert values(judge.marks(answers("is 4", "is 5"))) == [4, 5] and len(server.bodies) == 3
        marks = judge.marks(answers("is 5", "is 6", "is 7", "is 8"))
        assert values(marks) == [5, 6, None, None] and len(server.bodies) == 4
        assert marks[2].reason == "the cap of 4 requests is reached"
        # The next run goes on.
        assert values(marks_of(server, tmp_path, "is 6", "is 7", "is 8", max_requests=4)) == [6, 7, 8]
    assert len(server.bodies) == 6


REMOTE = {"judge": "llm", "endpoint": "https://api.example.org/v1", "model": "m"}


def test_restricted_answers_do_not_leave_this_machine(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(client.Endpoint, "_send", lambda self, body: sent.append(body))
    monkeypatch.setenv("MEDFORGET_CACHE", str(tmp_path / "cache"))
    judge = LLMJudge(JudgeSettings(**REMOTE))
    with pytest.raises(UserError, match="judge_endpoint https.*is not this machine.*judge_complies"):
        judge.marks([*answers("is 4", restricted=False), *answers("is 5")])
    assert sent == [] and not (tmp_path / "cache").exists()
    monkeypatch.setattr(llm, "_connect", lambda endpoint, folder: sent.append(endpoint))
    judge.check(restricted=False)
    LLMJudge(JudgeSettings(**REMOTE, complies="J. Doe, zero retention, contract 7")).check(restricted=True)
    LLMJudge(JudgeSettings("llm", "http://127.0.0.1:1/v1", "m")).check(restricted=True)
    assert sent == [REMOTE["endpoint"], REMOTE["endpoint"], "http://127.0.0.1:1/v1"]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"judge": "gpt"}, "judge gpt: unknown; choose from lexical, llm"),
        ({"judge": "llm"}, "needs judge_endpoint, a URL, and judge_model, a name"),
        ({"judge": "llm", "judge_endpoint": "http://127.0.0.1/v1"}, "needs judge_endpoint"),
        ({"judge_endpoint": "http://127.0.0.1/v1"}, "judge_endpoint: is for judge=llm"),
        ({"judge": "llm", "judge_url": "x"}, "judge_url: unknown; the judge's settings are judge, judge_endpoint, "),
        ({"judge_max_requests": 0}, "judge_max_requests 0: must be a whole number of at least 1"),
        ({"judge_max_requests": "many"}, "judge_max_requests 'many'"),
    ],
)
def test_wrong_settings_are_one_line(metadata, message):
    with pytest.raises(UserError, match=message) as caught:
        JudgeSettings.from_metadata(metadata)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://me:hunter2@127.0.0.1/v1", "judge_endpoint: must not hold a user name"),
        ("http://127.0.0.1/v1?key=hunter2", "judge_endpoint: must not hold a query"),
        ("127.0.0.1:8000/v1", "must be http"),
    ],
)
def test_endpoints_that_must_not_be_used_are_refused(url, message):
    with pytest.raises(UserError, match=message) as caught:
        LLMJudge(JudgeSettings("llm", url, "m")).check(restricted=False)
    assert "hunter2" not in str(caught.value)


def test_settings_are_the_same_after_the_way_through_lm_eval():
    settings = JudgeSettings("llm", "http://127.0.0.1/v1", "7", max_requests=3, complies="a, b")
    assert JudgeSettings.from_metadata(settings.metadata() | {"data": "x", "pretrained": "y"}) == settings
    assert JudgeSettings.from_metadata(settings.metadata() | {"judge_model": 7}) == settings
    assert JudgeSettings().metadata() == {"judge": "lexical"} and JudgeSettings().name == "lexical"


def test_the_client_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.setattr(client.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"judge llm: needs the openai client: pip install 'medforget\[llm\]'"):
        LLMJudge(JudgeSettings("llm", "http://127.0.0.1/v1", "m")).check(restricted=False)
