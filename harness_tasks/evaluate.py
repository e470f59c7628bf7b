"""Evaluate a checkpoint on MedForget in this process, through lm-eval's own API."""

import gc
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.api.registry import get_model
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from medforget_dataset.errors import UserError


TASKS_FOLDER = Path(__file__).parent


def evaluate_checkpoint(
    checkpoint: str | os.PathLike,
    data_dir: str | os.PathLike,
    tasks: Sequence[str],
    *,
    batch_size: int = 64,
    limit: int | None = None,
    output_path: str | os.PathLike | None = None,
    wrong_image: bool = False,
) -> dict[str, dict[str, Any]]:
    """
    Score a checkpoint on lm-eval tasks of this folder, as the stock `lm_eval --model hf-multimodal` does.

    The model is loaded once, and the questions of all tasks are batched together. On a CPU it computes in float32, so
    that the batch size changes no answer.

    Args:
        checkpoint (`str` or `os.PathLike`):
            Folder with an image-text-to-text model and its processor.
        data_dir (`str` or `os.PathLike`):
            Dataset folder written by `medforget build`.
        tasks (`Sequence[str]`):
            Names of tasks, of their tags such as `"medforget_patient_forget"`, of the group `"medforget"`, or globs.
        batch_size (`int`, *optional*, defaults to `64`):
            Questions per forward pass.
        limit (`int`, *optional*):
            Ask only this many rows of each task.
        output_path (`str` or `os.PathLike`, *optional*):
            Folder for the answers: a file TASK.jsonl with the id, question, answer, response and scores of each row.
        wrong_image (`bool`, *optional*, defaults to `False`):
            Ask every row about the image of another patient's study, the control for what is answered unseen.

    Returns:
        `dict[str, dict]`: For each task `{"metrics": {name: value}, "n": rows}`, values between 0 and 1.

    Raises:
        UserError: If the checkpoint is no folder with a model and a processor, a task is unknown, or the data is
            missing, damaged, or without rows for a task.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns once a task that metadata exists
    checkpoint = _checked(Path(checkpoint))
    metadata = {"pretrained": str(checkpoint), "data": str(data_dir), "wrong_image": wrong_image}
    manager = TaskManager(include_path=str(TASKS_FOLDER), include_defaults=False, metadata=metadata)
    names = _names(manager, tasks)
    try:
        loaded = manager.load(names)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from error
    on_gpu = torch.cuda.is_available()
    model = get_model("hf-multimodal").create_from_arg_obj(
        {"pretrained": str(checkpoint), "dtype": "auto" if on_gpu else "float32"},
        {"device": "cuda" if on_gpu else "cpu", "batch_size": batch_size},
    )
    gc.collect()
    gc.freeze()  # hf-multimodal collects garbage after every batch: 0.3 s each over all that is loaded by now
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
    if output_path:
        for name, task in loaded["tasks"].items():
            _write_answers(Path(output_path) / f"{name}.jsonl", task)
    return {name: _scores(results, name) for name in loaded["tasks"]}


def tasks_digest() -> str:
    """Hexadecimal digest of everything in this folder that a score depends on: the task files and their code."""
    digest = hashlib.sha256()
    for path in sorted([*TASKS_FOLDER.glob("*yaml"), TASKS_FOLDER / "rows.py", TASKS_FOLDER / "scores.py"]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _checked(checkpoint: Path) -> Path:
    if not (checkpoint / "config.json").is_file():
        raise UserError(f"{checkpoint}: not a checkpoint folder (no config.json)")
    if not any((checkpoint / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        raise UserError(f"{checkpoint}: has no processor (no processor_config.json); save the model's processor there")
    return checkpoint


def _names(manager: TaskManager, tasks: Sequence[str]) -> list[str]:
    unknown = [pattern for pattern in tasks if not manager.match_tasks([pattern])]
    if unknown or not tasks:
        wanted = ", ".join(unknown) or "an empty list"
        known = ", ".join([*manager.all_groups, *manager.all_tags])
        raise UserError(f"no task, tag or group matches {wanted}; groups and tags: {known}")
    return manager.match_tasks(list(tasks))


def _scores(results: dict[str, Any], task: str) -> dict[str, Any]:
    # lm-eval names a metric "acc,none" after its filter, and puts "acc_stderr,none" beside it.
    values = {name.removesuffix(",none"): value for name, value in results["results"][task].items() if "," in name}
    metrics = {name: float(value) for name, value in values.items() if not name.endswith("_stderr")}
    return {"metrics": metrics, "n": results["n-samples"][task]["effective"]}


def _write_answers(path: Path, task: Task) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for request in task.instances:
            row = {name: request.doc[name] for name in ("id", "question", "answer")}
            scores = task.process_results(request.doc, request.resps)
            file.write(json.dumps({**row, "response": request.resps[0], **scores}, ensure_ascii=False) + "\n")
