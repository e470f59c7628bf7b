"""How the tests have sections asked about, and replies of the stub changed."""

import json

from medforget_dataset import BuildOptions
from medforget_dataset.build_log import BuildLog
from medforget_dataset.hierarchy import Institution, Patient, Section, Study, StudyNode
from medforget_dataset.llm import client
from medforget_dataset.questions import template_questions
from medforget_dataset.questions.llm import llm_questions


TEXT = "There is a small right pleural effusion. The heart is mildly enlarged, without edema."


def nodes_of(*texts, key="findings"):
    """One study for each text."""
    nodes = []
    for number, text in enumerate(texts):
        study = Study(f"study{number:03d}", f"s{number}", (Section(key, text),))
        patient = Patient(f"pat{number:03d}", "A B", (study,))
        nodes.append(StudyNode(Institution("inst00", "Elm", (patient,)), patient, study))
    return nodes


def ask_all(server, tmp_path, *texts, log=None, restricted=True, concurrency=1, **options):
    nodes = nodes_of(*texts or (TEXT,))
    chosen = BuildOptions(**{"questions": "llm", "endpoint": server.url, "llm_model": "stub"} | options)
    return llm_questions(
        nodes,
        chosen,
        templates=template_questions(nodes, 0, rendered=False, image="film"),
        image="film",
        restricted=restricted,
        log=log or BuildLog(chosen.on_error),
        cache=tmp_path / "llm",
        concurrency=concurrency,
    )


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def change(**values):
    """Other values for fields; a function is given the good fields."""
    return lambda fields: (
        fields | {name: value(fields) if callable(value) else value for name, value in values.items()}
    )


def first(wording):
    """Another first training wording."""
    return change(training=lambda fields: [wording, *fields["training"][1:]])


def shorten_waits(monkeypatch):
    """Nothing is waited for long, and neither a key nor a proxy comes from the environment."""
    monkeypatch.setattr(client, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(client, "TIMEOUT_SECONDS", 2.0)
    for name in ("OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
