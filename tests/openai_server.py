"""An OpenAI-compatible endpoint in the test's own process: real HTTP for the real client, misbehaving as told."""

import json
import socket
import struct
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from medforget_dataset.hierarchy import Section
from medforget_dataset.questions.cloze import candidates


USAGE = {"prompt_tokens": 300, "completion_tokens": 100, "total_tokens": 400}


class OpenAIServer(ThreadingHTTPServer):
    """`with OpenAIServer() as server:` answers at `server.url`.

    `server.script` is called with each request's number and body, and returns a status, a function of the handler, or
    a function from the good fields to others; None answers well. `clozes` gives the cloze of a section's text, where
    it matters which, and `good` the good fields of requests of another kind. `bodies` lists what arrived and `times`
    when, `answered` what was answered well, `tokens` the bearer tokens. `looks` lists the headers of requests for the
    list of models, which are refused.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, script=None, clozes=None, good=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = script or (lambda number, body: None)
        self.clozes = clozes or {}
        self.good = good or (lambda body: good_fields(body, self.clozes))
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.bodies, self.times, self.answered, self.tokens, self.looks = [], [], [], [], []
        self.lock = threading.Lock()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """A client that was killed is no error of ours."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.bodies)
            self.server.bodies.append(body)
            self.server.times.append(time.monotonic())
            self.server.tokens.append(self.headers.get("Authorization", "").removeprefix("Bearer "))
        assert self.path == "/v1/chat/completions", self.path
        behaviour = self.server.script(number, body)
        fields = self.server.good(body)
        if isinstance(behaviour, int):
            return self.send({"error": {"message": f"told to answer {behaviour}"}}, behaviour)
        if getattr(behaviour, "of_handler", False):
            return behaviour(self, fields)
        self.complete(json.dumps(behaviour(fields) if behaviour else fields))
        self.server.answered.append(body)

    def do_GET(self):
        if self.path == "/v1/models":
            self.server.looks.append(dict(self.headers))
            return self.send({"error": {"message": "no key"}}, 401)
        self.server.bodies.append(self.path)
        self.send({}, 200)

    def complete(self, content, *, finish_reason="stop", refusal=None):
        message = {"role": "assistant", "content": content, "refusal": refusal}
        choice = {"index": 0, "message": message, "finish_reason": finish_reason}
        self.send({"id": "1", "object": "chat.completion", "model": "stub-1", "choices": [choice], "usage": USAGE})

    def send(self, payload, status=200, headers=None, content_type="application/json"):
        data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        self.send_response(status)
        for key, value in {"Content-Type": content_type, "Content-Length": len(data), **(headers or {})}.items():
            self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(data)


def of_handler(function):
    function.of_handler = True
    return function


@of_handler
def reset_connection(handler, fields):
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.rfile.close()
    handler.connection.close()
    handler.close_connection = True


def task_of(body):
    system = body["messages"][0]["content"]
    return next(
        task
        for task, mark in (("cloze", "fill-in-the-blank"), ("classification", "multiple-choice"), ("generation", ""))
        if mark in system
    )


def good_fields(body, clozes):
    """What a model that follows every rule answers; it words all sections alike and holds out other wordings each
    time, as real ones do."""
    asked = json.loads(body["messages"][1]["content"])
    name, text, task = asked["section"], asked["text"], task_of(body)
    draw = zlib.crc32(text.encode())
    found = [clozes[text]] if text in clozes else candidates(Section(name.replace(" ", "_"), text))
    cloze = found[draw % len(found)]
    words = {
        "generation": [
            f"What does the {name} part of the report state?",
            f"Please write what the report has under {name}.",
            f"Describe this image as the {name} section would.",
            f"How would the {name} section of this study read?",
            f"State the {name} section that belongs to this image.",
            f"For this image, dictate the {name} section.",
            f"What stands in the report under {name}?",
            f"What would a reader learn from the {name} section here?",
            f"Draft the {name} paragraph for this picture.",
        ],
        "cloze": [
            f"{verb} the gap in this line of the {name}{end}"
            for verb in ("Close", "Fill", "Mend")
            for end in (":", " section", " of the report.")
        ],
        "classification": [
            f"{start} does the {name} section {verb}?"
            for start in ("Which of these", "What", "Which one")
            for verb in ("name", "speak of", "tell of")
        ],
    }[task]
    turn = draw % len(words)
    words = words[turn:] + words[:turn]
    fields = {"training": words[:6], "held_out": words[6:]}
    if task == "cloze":
        fields |= {"sentence": cloze.sentence, "answer": cloze.answer}
    if task == "classification":
        others = [word for word in ("scoliosis", "a stent", "hiatal hernia", "a shunt") if word != cloze.answer]
        fields |= {"options": [*others[:1], cloze.answer, *others[1:3]], "answer": "B"}
    return fields
