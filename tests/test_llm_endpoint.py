"""What is sent to a language model's endpoint, and what becomes of endpoints that misbehave: a real HTTP server on
loopback, and nothing beyond it.
"""

import json
import socket
import sys
import time

import pytest
from llm_asking import TEXT, ask_all, shorten_waits
from openai_server import OpenAIServer, of_handler, reset_connection, task_of

from medforget_dataset import UserError
from medforget_dataset.llm import client
from medforget_dataset.questions import BLANK


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    shorten_waits(monkeypatch)


@pytest.fixture
def only_loopback(monkeypatch):
    """Lists every address that is connected to or looked up, and refuses all but this machine's."""
    reached = []

    def guarded(original, place):
        def call(*args, **kwargs):
            host = args[place][0] if isinstance(args[place], tuple) else args[place]
            reached.append(host)
            assert host in ("127.0.0.1", None), f"tried to reach {host}"
            return original(*args, **kwargs)

        return call

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, guarded(getattr(socket.socket, name), 1))
    monkeypatch.setattr(socket, "getaddrinfo", guarded(socket.getaddrinfo, 0))
    return reached


def test_a_section_is_asked_in_three_requests_in_structured_output(tmp_path, monkeypatch, only_loopback):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with OpenAIServer() as server:
        asked = ask_all(server, tmp_path, seed=7)["inst00/pat000/study000", "findings"]
    assert [task_of(body) for body in server.bodies] == ["generation", "cloze", "classification"]
    assert set(server.tokens) == {"sk-secret"} and set(only_loopback) == {"127.0.0.1"}
    for body in server.bodies:
        assert (body["model"], body["temperature"], body["seed"]) == ("stub", 0, 7)
        assert body["response_format"]["json_schema"]["strict"] is True
        assert json.loads(body["messages"][1]["content"]) == {"image": "film", "section": "findings", "text": TEXT}
    for phrasings in (asked.generation, asked.cloze, asked.classification):
        assert len(set(phrasings.training)) == 6 and len(set(phrasings.held_out)) == 3
        assert not set(phrasings.training) & set(phrasings.held_out)
    sentence = asked.cloze.training[0].split(": ")[-1]
    assert sentence.replace(BLANK, asked.cloze_answer) in TEXT
    assert all(wording.endswith(sentence) for wording in asked.cloze.training + asked.cloze.held_out)
    options = " ".join(f"{letter}) {option}" for letter, option in zip("ABCD", asked.options, strict=True))
    assert all(wording.endswith(f"? {options}") for wording in sum(asked.classification, ()))
    assert asked.options["ABCD".index(asked.letter)] == asked.cloze_answer
    assert not any(b"sk-secret" in file.read_bytes() for file in (tmp_path / "llm").iterdir())


@of_handler
def html(handler, fields):
    handler.send(b"<html>busy</html>", content_type="text/html")


@of_handler
def half_json(handler, fields):
    handler.send(b'{"choices": [{"message": {"content": "{')


@of_handler
def no_choices(handler, fields):
    handler.send({"model": "stub", "choices": []})


@of_handler
def hang(handler, fields):
    time.sleep(4)


@of_handler
def wait_a_moment(handler, fields):
    handler.send({"error": {"message": "slow down"}}, 429, {"Retry-After": "0.4"})


@pytest.mark.parametrize("fault", [429, 500, 503, 408, html, half_json, no_choices, reset_connection, hang])
def test_what_is_no_reply_is_asked_for_again_as_it_was(fault, tmp_path, monkeypatch):
    monkeypatch.setattr(client, "TIMEOUT_SECONDS", 0.3 if fault is hang else 5.0)
    with OpenAIServer(lambda number, body: fault if number in (1, 2) else None) as server:
        asked = ask_all(server, tmp_path)
    assert server.bodies[1] == server.bodies[2] == server.bodies[3]
    assert len(server.bodies) == 5 and len(server.answered) == 3 and len(asked) == 1


def test_retry_after_is_waited_for(tmp_path):
    with OpenAIServer(lambda number, body: wait_a_moment if number == 0 else None) as server:
        ask_all(server, tmp_path)
    assert server.times[1] - server.times[0] >= 0.4


def test_retries_end(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "RETRIES", 2)
    with OpenAIServer(lambda number, body: 500 if task_of(body) == "cloze" else None) as server:
        with pytest.raises(
            UserError, match=r"1 of 3 rows are missing.*study000/findings/cloze \(.*told to answer 500"
        ):
            ask_all(server, tmp_path)
    assert len(server.bodies) == 5


def test_a_server_without_json_schema_is_told_once(tmp_path):
    with OpenAIServer(lambda number, body: 400 if "json_schema" in body["response_format"] else None) as server:
        asked = ask_all(server, tmp_path, TEXT, "A nodule is seen in the lung.", concurrency=4)
        assert [body["response_format"]["type"] for body in server.bodies] == ["json_schema"] + ["json_object"] * 6
        assert ask_all(server, tmp_path, TEXT, "A nodule is seen in the lung.", concurrency=4) == asked
    assert len(server.bodies) == 7


def test_a_body_that_is_not_taken_is_not_sent_again(tmp_path):
    with OpenAIServer(lambda number, body: 400 if task_of(body) == "cloze" else None) as server:
        with pytest.raises(UserError, match="1 of 3 rows are missing.*told to answer 400"):
            ask_all(server, tmp_path)
    assert len(server.bodies) == 3


@of_handler
def redirect(handler, fields):
    handler.send(b"", 307, {"Location": "http://198.51.100.7/v1/chat/completions"})


@pytest.mark.parametrize(
    ("fault", "message"),
    [(redirect, "redirect"), (401, "told to answer 401"), (403, "told"), (404, "told to answer 404")],
)
def test_an_endpoint_that_does_not_let_us_in_ends_the_build_at_once(fault, message, tmp_path, only_loopback):
    with OpenAIServer(lambda number, body: fault if number > 0 else None) as server:
        with pytest.raises(UserError, match=rf"--endpoint {server.url}: .*{message}.*5 of 6 rows are missing"):
            ask_all(server, tmp_path, TEXT, "A nodule is seen in the lung.", on_error="skip")
    assert len(server.bodies) == 2 and set(only_loopback) == {"127.0.0.1"}


def test_an_endpoint_that_is_gone_ends_the_build(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "RETRIES", 1)
    with OpenAIServer() as server:
        pass
    with pytest.raises(UserError, match=rf"--endpoint {server.url}: .*3 of 3 rows are missing"):
        ask_all(server, tmp_path, on_error="skip")
    with OpenAIServer(lambda number, body: 500) as server:
        with pytest.raises(UserError, match="told to answer 500"):
            ask_all(server, tmp_path, *(f"{n} nodules are seen in the lung." for n in range(20)), on_error="skip")
    assert len(server.bodies) == 2 * client.GIVE_UP


@pytest.mark.parametrize("fault", [hang, 429, html])
def test_an_endpoint_that_has_answered_nothing_is_given_up_early(fault, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(client, "TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(client, "SILENT_SECONDS", 0.0)
    with OpenAIServer(lambda number, body: fault) as server:
        with pytest.raises(UserError, match="nothing was answered in 2 tries over .* 3 of 3 rows are missing"):
            ask_all(server, tmp_path, on_error="skip")
    assert len(server.bodies) == 2
    (record,) = caplog.records
    assert record.levelname == "WARNING" and record.message.startswith(f"{server.url}: ")
    assert record.message.endswith(", trying again (2 of 8)")


def test_an_endpoint_that_has_answered_is_waited_for(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(client, "TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(client, "SILENT_SECONDS", 0.0)
    faults = {1: 429, 2: hang, 3: 500}
    with OpenAIServer(lambda number, body: faults.get(number)) as server:
        ask_all(server, tmp_path)
    assert len(server.answered) == 3
    # Of a server that answers, only what takes minutes is told.
    assert [record.message for record in caplog.records] == [
        f"{server.url}: no reply in 0.2 seconds, trying again (3 of 8)"
    ]


def test_the_key_is_in_no_message(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")

    @of_handler
    def repeat(handler, fields):
        handler.send({"error": {"message": "wrong key sk-secret"}}, 401)

    with OpenAIServer(lambda number, body: repeat) as server, pytest.raises(UserError, match="wrong key …") as caught:
        ask_all(server, tmp_path)
    assert "sk-secret" not in str(caught.value)


def test_proxies_of_the_environment_do_not_see_what_stays_here(tmp_path, monkeypatch):
    with OpenAIServer() as proxy, OpenAIServer() as server:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url.removesuffix("/v1"))
        monkeypatch.delenv("NO_PROXY", raising=False)
        ask_all(server, tmp_path)
    assert len(server.bodies) == 3 and proxy.bodies == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"endpoint": ""}, "needs --endpoint URL and --llm-model NAME"),
        ({"llm_model": ""}, "needs --endpoint URL and --llm-model NAME"),
        ({"endpoint": "http://me:hunter2@127.0.0.1/v1"}, "must not hold a user name"),
        ({"endpoint": "http://127.0.0.1\\@example.org/v1"}, "must not hold a user name"),
        ({"endpoint": "http://127.0.0.1/v1?key=hunter2"}, "must not hold a query"),
        ({"endpoint": "ftp://127.0.0.1/v1"}, "must be http"),
        ({"endpoint": "127.0.0.1:8000/v1"}, "must be http"),
        ({"endpoint": "http:///v1"}, "must be http"),
        ({"endpoint": "http://127.0.0.1\n.example.org/v1"}, "must be http"),
        ({"endpoint": "http://127.0.0.1:99999/v1"}, "not an address"),
        ({"endpoint": "http://[::1/v1"}, "not an address"),
        ({"endpoint": "https://api.example.org/v1"}, "is not this machine"),
        ({"endpoint": "http://localhost.example.org/v1"}, "is not this machine"),
    ],
)
def test_endpoints_that_must_not_be_used_are_refused_unseen(options, message, tmp_path, only_loopback):
    with OpenAIServer() as server, pytest.raises(UserError, match=message) as caught:
        ask_all(server, tmp_path, **options)
    assert "hunter2" not in str(caught.value) and "\n" not in str(caught.value)
    assert server.bodies == [] and only_loopback == [] and not (tmp_path / "llm").exists()


def test_the_client_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.setattr(client.importlib.util, "find_spec", lambda name: None)
    with OpenAIServer() as server, pytest.raises(UserError, match=r"pip install 'medforget\[llm\]'"):
        ask_all(server, tmp_path)
