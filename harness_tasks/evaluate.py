"""Evaluate a checkpoint on MedForget in this process, through lm-eval's own API."""

import gc
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.api.registry import get_model
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from medforget_dataset.atomic import write_text
from medforget_dataset.errors import UserError
from medforget_dataset.questions import negation, terms

from .adapters import base_and_adapters
from .cli import MODEL, register_model
from .judges import JudgeSettings


TASKS_FOLDER = Path(__file__).parent
# What a task scores and says that is not a number of its rows.
NOT_OF_A_ROW = ("judge", "judge_failed")


def evaluate_checkpoint(
    checkpoint: str | os.PathLike,
    data_dir: str | os.PathLike,
    tasks: Sequence[str],
    *,
    batch_size: int = 64,
    limit: int | None = None,
    output_path: str | os.PathLike | None = None,
    wrong_image: bool = False,
    judge: JudgeSettings | None = None,
) -> dict[str, dict[str, Any]]:
    """
    Score a checkpoint on lm-eval tasks of this folder, as `medforget eval` does.

    The model is loaded once, and the questions of all tasks are answered together. On a CPU it computes in float32, so
    that the batch size changes no answer.

    Args:
        checkpoint (`str` or `os.PathLike`):
            Folder with a model and its processor, or with a LoRA adapter.
        data_dir (`str` or `os.PathLike`):
            Dataset folder written by `medforget build`.
        tasks (`Sequence[str]`):
            Names of tasks, of their tags such as `"medforget_patient_forget"`, of the group `"medforget"`, or globs.
        batch_size (`int`, *optional*, defaults to `64`):
            Questions per forward pass.
        limit (`int`, *optional*):
            Ask only this many rows of each task.
        output_path (`str` or `os.PathLike`, *optional*):
            Folder for the answers: a file TASK.jsonl with the id, question, answer, response and scores of each row,
            `null` for a score that is missing.
        wrong_image (`bool`, *optional*, defaults to `False`):
            Ask every row about the image of another patient's study, the control for what is answered unseen.
        judge ([`~harness_tasks.judges.JudgeSettings`], *optional*):
            Who marks generated sections, by default the lexical judge.

    Returns:
        `dict[str, dict]`: For each task `{"metrics": {name: value}, "n": rows, "version": number}`, values between 0
        and 1, or `None` if no row has one. Generation tasks also have `"judge"`, whose marks are behind `factuality`
        and `gen_score`; and `"missing": {name: rows}` where rows have none.

    Raises:
        UserError: If the checkpoint has no model, processor or chat template, a task is unknown, the data is missing,
            damaged, or without rows for a task, or the judge cannot be asked.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns once a task that metadata exists
    base_and_adapters(str(checkpoint))  # before the rows are read, which takes longer
    metadata = {"pretrained": str(checkpoint), "data": str(data_dir), "wrong_image": wrong_image}
    metadata |= judge.metadata() if judge else {}
    manager = TaskManager(include_path=str(TASKS_FOLDER), include_defaults=False, metadata=metadata)
    names = _names(manager, tasks)
    try:
        loaded = manager.load(names)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from error
    model = _model(str(checkpoint), batch_size)
    scored = {name: _recorded(task) for name, task in loaded["tasks"].items()}
    gc.collect()
    gc.freeze()  # models unlike Qwen2.5-VL collect garbage after every batch: 0.3 s each over all that is loaded
    try:
        # Not simple_evaluate: it sets the global random seeds, and spends seconds on a report of installed packages.
        results = lm_eval.evaluate(
            lm=model,
            task_dict=loaded,
            limit=limit,
            apply_chat_template=True,
            fewshot_as_multiturn=True,
            bootstrap_iters=0,
            log_samples=False,
        )
    except ValueError as error:
        if not str(error).startswith("row "):
            raise
        # A row of the data, as rows.py names it; lm-eval loads that file by its path, so that no class can be shared.
        raise UserError(f"{data_dir}: {error}") from error
    finally:
        gc.unfreeze()
    rows = {name: _rows(task, scored[name]) for name, task in loaded["tasks"].items()}
    if output_path:
        for name, of_task in rows.items():
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in of_task)
            write_text(Path(output_path) / f"{name}.jsonl", lines)
    return {name: _scores(results, name, rows[name]) for name in loaded["tasks"]}


def tasks_digest() -> str:
    """Hexadecimal digest of all that the scores of given answers depend on: task files, their code, the judges'."""
    paths = [*TASKS_FOLDER.glob("*yaml"), TASKS_FOLDER / "rows.py", TASKS_FOLDER / "scores.py"]
    paths += [*(TASKS_FOLDER / "judges").glob("*.py"), *(Path(str(module.__file__)) for module in (negation, terms))]
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _model(checkpoint: str, batch_size: int) -> Any:
    on_gpu = torch.cuda.is_available()
    register_model()
    try:
        model: Any = get_model(MODEL).create_from_arg_obj(
            {"pretrained": checkpoint, "dtype": "auto" if on_gpu else "float32"},
            {"device": "cuda" if on_gpu else "cpu", "batch_size": batch_size},
        )
        model.chat_template(True)  # refuses a model that has none
        return model
    except UserError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{checkpoint}: model cannot be loaded ({reason})") from error


def _names(manager: TaskManager, tasks: Sequence[str]) -> list[str]:
    unknown = [pattern for pattern in tasks if not manager.match_tasks([pattern])]
    if unknown or not tasks:
        wanted = ", ".join(unknown) or "an empty list"
        known = ", ".join([*manager.all_groups, *manager.all_tags])
        raise UserError(f"no task, tag or group matches {wanted}; groups and tags: {known}")
    return manager.match_tasks(list(tasks))


def _recorded(task: Any) -> dict[str, dict[str, Any]]:
    """Have a task keep what it scores; the scores of each row by its id, filled while lm-eval runs."""
    kept: dict[str, dict[str, Any]] = {}
    process_results = task.config.process_results

    def keep(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
        kept[doc["id"]] = scores = process_results(doc, results)
        return scores

    task.config.process_results = keep
    return kept


def _rows(task: Task, scored: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for request in task.instances:
        row = {name: request.doc[name] for name in ("id", "question", "answer")} | {"response": request.resps[0]}
        for name, value in scored[row["id"]].items():
            if name not in NOT_OF_A_ROW:
                row[name] = value[name] if isinstance(value, Mapping) else value
        rows.append(row)
    return rows


def _scores(results: dict[str, Any], task: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    # lm-eval names a metric "acc,none" after its filter, and puts "acc_stderr,none" beside it.
    values = {name.removesuffix(",none"): value for name, value in results["results"][task].items() if "," in name}
    names = [name for name in values if not name.endswith("_stderr") and name not in NOT_OF_A_ROW]
    missing = {name: sum(row[name] is None for row in rows) for name in names}
    scores = {
        "metrics": {name: float(values[name]) if missing[name] < len(rows) else None for name in names},
        "n": results["n-samples"][task]["effective"],
        "version": results["versions"][task],
    }
    if "judge" in values:
        scores["judge"] = values["judge"]
    if any(missing.values()):
        scores["missing"] = {name: count for name, count in missing.items() if count}
    return scores
