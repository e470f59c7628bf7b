"""How the tests have answers judged by a stub."""

import json

from openai_server import OpenAIServer

from harness_tasks.judges import Answered, JudgeSettings
from harness_tasks.judges.llm import LLMJudge, budget


def judge_server(script=None):
    """A model that finds every answer as good as its last word says, and otherwise gives it a 7."""
    return OpenAIServer(script, good=good_mark)


def good_mark(body):
    asked = json.loads(body["messages"][1]["content"])
    last = asked["answer"].split()[-1:] or ["7"]
    return {"score": int(last[0]) if last[0].isdigit() else 7, "reasoning": f"read {asked['answer']!r}"}


def answers(*texts, restricted=True):
    return [Answered("What do the findings say?", "No effusion.", text, restricted) for text in texts]


def settings_of(server, folder, **settings):
    return JudgeSettings("llm", server.url, "stub", cache=str(folder / "judge"), **settings)


def marks_of(server, folder, *texts, **settings):
    """The marks of a new process."""
    budget.cache_clear()
    return LLMJudge(settings_of(server, folder, **settings)).marks(answers(*texts))
