"""Folders of finished runs, made in a second: answers to the real rows, drawn by chance instead of by a model."""

from __future__ import annotations

import json
import random
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure

from harness_tasks import scores
from harness_tasks.generate import CONTEXTS
from medforget_dataset.hierarchy import TASKS
from medforget_dataset.writer import parquet_path
from unlearn.measures.probe import FORMAT, KEY, SCHEMA
from unlearn.pipeline import write_run_report


VERSION = 1.1
JUDGE = "lexical"
# How often a row is answered right: to forget, to retain, under the attack's prompts.
KNOWS = {
    "vanilla": (1.0, 1.0, 0.95),
    "retrained": (0.05, 0.98, 0.05),
    "npo": (0.05, 0.95, 0.3),
    "grad_diff": (0.0, 0.9, 0.1),
    "kl_min": (0.02, 0.7, 0.1),
    "manu": (0.95, 0.96, 0.9),
}


@contextmanager
def undrawn():
    """Inside the context, a report's figures are empty: drawing takes most of the time, and is done in other tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, file, **_: file.write(b"<svg/>"))
        yield


class FinishedRun:
    """
    A run as `medforget run` leaves it, with evaluations, probes, relearning, training logs and stages.

    Args:
        folder (`Path`): Where to make it.
        data (`Path`): The dataset, which it links to.
        levels (`tuple[str, ...]`): Levels unlearned.
        methods (`tuple[str, ...]`): Methods.
        probed (`bool`): Write probes, which takes longest.
    """

    def __init__(self, folder: Path, data: Path, levels=("section", "patient"), methods=("npo", "manu"), probed=True):
        self.folder, self.levels, self.methods = folder, levels, methods
        folder.mkdir(parents=True)
        (folder / "medforget").symlink_to(data, target_is_directory=True)
        plan = {"levels": list(levels), "methods": list(methods), "preset": "tiny-robust", "seed": 0}
        (folder / "run.json").write_text(json.dumps({"format": 1, "preset": "demo", "plan": plan}))
        self.rows = {}
        for config in ("finetune", "general_med", *(f"{v}_{s}" for v in levels for s in ("forget", "retain"))):
            self.rows[config] = self._read(config, "test" if config == "general_med" else "train")
        for level in levels:
            self.rows[f"{level}_rephrase"] = self._read(f"{level}_forget_rephrase", "test")
        self.stages, self.failures = {"build": 12.0, "pretrain": 30.0}, {}
        for name, method, own in self.models():
            self.train(name, method)
            self.evaluate(name, method, own)
            if probed:
                self.probe(name, method, own[0])
        self.evaluate("vanilla-wrong-image", "retrained", levels, splits=("forget", "retain"))
        self.write_stages()

    def models(self):
        """Name, method and levels of every checkpoint."""
        yield "vanilla", "vanilla", self.levels
        for method in ("retrained", *self.methods):
            for level in self.levels:
                yield f"{method}-{level}", method, (level,)

    def _read(self, config, split):
        columns = ["id", "question", "answer", "task", "level", "section"]
        rows = pq.read_table(self.folder / "medforget" / parquet_path(config, split), columns=columns).to_pylist()
        return [row | {"task": TASKS[row["task"]]} for row in rows]

    def train(self, name, method):
        """A checkpoint's record with a training log."""
        (self.folder / name).mkdir()
        losses = [{"step": step, "loss": 2 / step, "epoch": 1.0} for step in range(1, 30, 4)]
        if method in self.methods:
            losses = [line | {"forget_loss": 0.1 * line["step"], "retain_loss": 0.3} for line in losses]
        info = {"stage": "x", "log": losses, "restricted": False}
        (self.folder / name / "medforget.json").write_text(json.dumps(info))
        self.stages[name] = 60.0

    def evaluate(self, name, method, levels, splits=("forget", "retain", "rephrase")):
        """Answers of a checkpoint, as `evaluate_checkpoint` writes them."""
        results = {}
        for level in levels:
            for split in splits:
                rows = self.rows[f"{level}_{split}"]
                for kind in TASKS:
                    of_kind = [row for row in rows if row["task"] == kind]
                    if of_kind:
                        task = f"medforget_{level}_{split}_{kind}"
                        self._answer(results, name, task, of_kind, KNOWS[method][split == "retain"])
                        if kind == "classification":
                            self._answer(results, name, f"{task}_text", of_kind, KNOWS[method][split == "retain"])
            if len(splits) == 3:
                asked = [row for row in self.rows[f"{level}_forget"] if row["task"] == "generation"]
                for context in CONTEXTS:
                    task = f"medforget_{level}_attack_{context}"
                    # A form that the model which knows everything does not understand.
                    share = 0.2 if (level, context) == ("patient", "institution") else KNOWS[method][2]
                    self._answer(results, name, task, asked, share)
        if len(splits) == 3:
            for kind in ("generation", "cloze", "classification"):
                of_kind = [row for row in self.rows["general_med"] if row["task"] == kind]
                self._answer(results, name, f"medforget_general_med_{kind}", of_kind, 0.7)
        (self.folder / "evaluation" / f"{name}.json").write_text(json.dumps(results, indent=1))
        self.stages[f"evaluate-{name}"] = 5.0

    def _answer(self, results, name, task, rows, share):
        draw, lines = random.Random(f"{name} {task}"), []
        answers = [row["answer"] for row in rows]
        for row in rows:
            response = row["answer"] if draw.random() < share else draw.choice(answers)
            line = {"id": row["id"], "question": row["question"], "answer": row["answer"], "response": response}
            lines.append(line | _scored(task, row, response))
        metrics = [key for key in lines[0] if key not in ("id", "question", "answer", "response")]
        means = {metric: sum(line[metric] for line in lines) / len(lines) for metric in metrics}
        judge = {"judge": JUDGE} if "gen_score" in means else {}
        results[task] = {"metrics": means, "n": len(lines), "version": VERSION} | judge
        path = self.folder / "evaluation" / name / f"{task}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def probe(self, name, method, level):
        """What `probe_checkpoint` writes, with token log-probabilities drawn by chance."""
        draw = random.Random(f"probe {name}")
        forgotten = {row["id"] for row in self.rows[f"{level}_forget"]}
        table = []
        rephrased = {row["id"].removesuffix("/rephrase") for row in self.rows[f"{level}_rephrase"]}
        for row in self.rows["finetune"]:
            share = KNOWS[method][row["id"] not in forgotten]
            sets = {"finetune": share, "unseen": 0.02, "wrong_image": 0.1}
            sets |= dict.fromkeys(("rephrase_wording", "rephrase_both"), share / 2) if row["id"] in rephrased else {}
            table += [_probed(row, name, of_set, draw) for name, of_set in sets.items()]
        info = json.dumps({"format": FORMAT}).encode()
        columns = pa.Table.from_pylist(table, schema=SCHEMA.with_metadata({KEY: info}))
        path = self.folder / "probes" / f"{name}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(columns, path)
        self.stages[f"probe-{name}"] = 8.0
        if method != "vanilla":
            points = [{"seconds": s, "rows": 8 * s, "forget_exact": s / 10, "retain_exact": 0.9} for s in range(10)]
            result = {"curve": points, "examples": 2, "rows_per_minute": 480.0, "forget_rows": 64}
            (self.folder / "relearning").mkdir(exist_ok=True)
            for taught, images in (("", 2), ("-all", 16)):
                content = json.dumps(result | {"examples": images, "recovered_after": {"rows": 72, "seconds": 9}})
                (self.folder / "relearning" / f"{name}{taught}.json").write_text(content)

    def write_stages(self):
        """Records of the finished stages."""
        (self.folder / ".stages").mkdir(exist_ok=True)
        for path in (self.folder / ".stages").iterdir():
            path.unlink()
        for name, seconds in self.stages.items():
            (self.folder / ".stages" / f"{name}.json").write_text(json.dumps({"key": "x", "seconds": seconds}))
        for name, why in self.failures.items():
            (self.folder / ".stages" / f"{name}.json").write_text(json.dumps({"key": "x", "failed": why}))

    def fail(self, stage, words):
        """Take a stage back, with what depends on it, as if it had failed with these words."""
        for name in (f"evaluate-{stage}", f"probe-{stage}"):
            self.stages.pop(name, None)
            self.failures[name] = f"{stage} failed"
        del self.stages[stage]
        self.failures[stage] = words
        relearned = (f"relearning/{stage}.json", f"relearning/{stage}-all.json")
        for path in (f"evaluation/{stage}.json", f"probes/{stage}.parquet", *relearned):
            (self.folder / path).unlink(missing_ok=True)
        self.write_stages()


def report_of(folder):
    """The report of a run: its records and its text."""
    write_run_report(folder)
    return json.loads((folder / "report.json").read_text()), (folder / "report.md").read_text()


def edit(path, change):
    """Let `change` work on what a JSON file holds."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def scored_methods(report):
    """The methods that have scores in a report."""
    return {record["method"] for record in report["records"] if record["measure"] == "score"}


def _scored(task, row, response):
    if "_text" in task:
        return {"acc_authors_code": float(response == row["answer"])}
    if "classification" in task:
        return scores.chosen(row, [response])
    right = scores.exact(row, [response])["exact_match"]
    if "cloze" in task or "identity" in task:
        return {"exact_match": right, "exact_match_authors_code": right}
    words, own = set(row["answer"].lower().split()), set(response.lower().split())
    rouge, factuality = len(words & own) / max(len(words | own), 1), (1 + round(9 * right)) / 10
    judged = {"factuality": factuality, "gen_score": 0.75 * factuality + 0.25 * rouge}
    return {"rouge_l": rouge, "exact_match": right, **judged, "exact_match_authors_code": right}


def _probed(row, name, share, draw):
    parts, tokens = row["id"].split("/"), 4
    known = draw.random() < share
    log_probs = [-draw.random() * (0.05 if known else 4) for _ in range(tokens)]
    greedy = [known or draw.random() < 0.5 for _ in range(tokens)]
    address = {"institution": parts[0], "patient": "/".join(parts[:2]), "study": "/".join(parts[:3])}
    level = parts[3] if row["task"] == "identity" else "section"
    return {
        "set": name,
        "id": row["id"],
        "task": row["task"],
        "level": level,
        **address,
        "section": parts[3] if level == "section" else "",
        "tokens": tokens,
        "exact": all(greedy),
        "log_prob": sum(log_probs),
        "token_log_probs": log_probs,
        "token_greedy": greedy,
    }
