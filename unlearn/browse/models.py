"""Ask checkpoints the questions of the page, with the prompts, the decoding and the scores of the evaluation."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import datasets
import torch
import yaml
from lm_eval.api.instance import Instance
from transformers.utils import logging as transformers_logging

from harness_tasks import rows as harness_rows
from harness_tasks import scores
from harness_tasks.evaluate import TASKS_FOLDER
from harness_tasks.vlm import MedForgetVLM
from medforget_dataset.errors import UserError

from ..answers import score_dataset
from ..checkpoints import load_checkpoint
from ..grouping import GROUPED_FEATURES
from ..measures.extraction import answer_probability


class Question(NamedTuple):
    """
    What is asked.

    Attributes:
        text (`str`):
            The question.
        answer (`str`):
            The right answer.
        task (`str`):
            Kind of the question, which decides how it is decoded: one letter for a classification.
        image (`bytes`):
            The encoded image.
    """

    text: str
    answer: str
    task: str
    image: bytes


class Reply(NamedTuple):
    """
    What a checkpoint makes of a question.

    Attributes:
        text (`str`):
            Its answer, decoded greedily as the evaluation does.
        is_right (`bool`):
            Whether it equals the right answer as the evaluation compares: the letter of a classification as it is,
            other answers after [`~harness_tasks.scores.normalize`].
        log_prob (`float`):
            Log-probability of the right answer, nats, summed over its tokens and the end token.
        tokens (`int`):
            Number of these tokens.
    """

    text: str
    is_right: bool
    log_prob: float
    tokens: int

    @property
    def probability(self) -> float:
        """Probability of the right answer, normalised for its length, as the report has it."""
        return float(answer_probability([self.log_prob], [self.tokens])[0])

    @property
    def plain_probability(self) -> float:
        """Probability of the right answer as a whole."""
        return float(answer_probability([self.log_prob], [1])[0])


class Models:
    """
    Checkpoints, each loaded when it is first asked and kept.

    Args:
        folders (`Mapping[str, Path]`):
            Folder of each checkpoint by its name.
    """

    def __init__(self, folders: Mapping[str, Path]):
        self.folders = dict(folders)
        self._loaded: dict[str, MedForgetVLM] = {}
        self._lock = Lock()

    def is_loaded(self, name: str) -> bool:
        """Whether a checkpoint has been asked before."""
        return name in self._loaded

    def ask(self, name: str, question: Question) -> Reply:
        """
        Ask a checkpoint.

        Raises:
            UserError: The checkpoint cannot be loaded, or memory does not suffice.
        """
        with self._lock:
            try:
                if name not in self._loaded:
                    self._loaded[name] = _load(self.folders[name])
                model = self._loaded[name]
                text = _answer(model, question, str(self.folders[name]))
                log_prob, tokens = _score(model, question)
            except torch.OutOfMemoryError as error:
                self._loaded.pop(name, None)
                beside = f" beside {', '.join(self._loaded)}; start again and ask fewer" if self._loaded else ""
                raise UserError(f"{self.folders[name]}: does not fit in memory{beside}") from error
        row = {"answer": question.answer}
        if question.task == "classification":
            is_right = scores.chosen(row, [text])["acc"]
        else:
            is_right = scores.exact(row, [text])["exact_match"]
        return Reply(text.strip(), bool(is_right), log_prob, tokens)


def _load(folder: Path) -> MedForgetVLM:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns that the model is not given by its name
    transformers_logging.disable_progress_bar()
    on_gpu = torch.cuda.is_available()
    model, processor = load_checkpoint(folder, dtype="auto" if on_gpu else torch.float32)
    device = "cuda" if on_gpu else "cpu"
    model.to(device)  # type: ignore[arg-type]
    return MedForgetVLM(model, tokenizer=processor, device=device, batch_size=1)


def _answer(model: MedForgetVLM, question: Question, checkpoint: str) -> str:
    row = {"id": "the question", "question": question.text, "image": {"bytes": question.image}}
    prompt = model.apply_chat_template([{"role": "user", "content": harness_rows.doc_to_text(row)}])
    decoding = _decoding(question.task)
    if "prefix_allowed_tokens_fn" in decoding:
        decoding["prefix_allowed_tokens_fn"] = partial(_letters, checkpoint)
    arguments: Any = (prompt, decoding, {"visual": harness_rows.doc_to_image(row)})
    request = Instance(request_type="generate_until", doc=row, arguments=arguments, idx=0)
    return model.generate_until([request], disable_tqdm=True)[0]


def _letters(checkpoint: str, batch: int, tokens: torch.Tensor) -> list[int]:
    return harness_rows.letter_tokens(checkpoint, "main")


class _Loader(yaml.SafeLoader):
    """Reads the functions that a task's YAML names as their names."""


_Loader.add_constructor("!function", _Loader.construct_scalar)


def _decoding(task: str) -> dict[str, Any]:
    """How the evaluation decodes answers to a kind of question."""
    text = (TASKS_FOLDER / f"_{task}_yaml").read_text(encoding="utf-8")
    return yaml.load(text, _Loader)["generation_kwargs"]


def _score(model: MedForgetVLM, question: Question) -> tuple[float, int]:
    row = {"id": "question", "question": question.text, "answer": question.answer, "task": question.task}
    rows = [row | {"training_phrasings": [], "level": "", "forget": False}]
    columns = {"key": ["image"], "image": [{"bytes": question.image, "path": None}], "rows": [rows]}
    grouped = datasets.Dataset.from_dict(columns, features=GROUPED_FEATURES)
    found = score_dataset(model.model, model.processor, grouped)[0]
    return found["log_prob"], found["tokens"]
