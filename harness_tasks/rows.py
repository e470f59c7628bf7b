"""Rows of MedForget as lm-eval documents: where the data is, which rows a task asks, their image and their prompt.

lm-eval imports this file by its path, from wherever the folder was copied to, so it imports nothing of the project.
"""

import functools
import io
import json
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi
from PIL import Image
from transformers import AutoTokenizer


LETTERS = "ABCD"
CONTEXTS = ("institution", "patient", "study", "none")
IMAGE_PLACEHOLDER = "<image>"  # lm-eval's, whatever the model's own image token is


def load(
    config: str,
    split: str,
    task: str,
    context: str = "none",
    data: str | None = None,
    wrong_image: bool = False,
    pretrained: str | None = None,
    tokenizer: str | None = None,
    revision: str = "main",
    **metadata: Any,
) -> dict[str, datasets.Dataset]:
    """
    Load the rows of one lm-eval task; the `custom_dataset` of every task.

    lm-eval passes the task's `dataset_kwargs` and, as metadata, every key of `--model_args` and `--metadata`.

    Args:
        config (`str`):
            Configuration, such as `"patient_forget"`.
        split (`str`):
            Split of the configuration to evaluate on.
        task (`str`):
            Kind of question: `"identity"`, `"generation"`, `"cloze"` or `"classification"`.
        context (`str`, *optional*, defaults to `"none"`):
            Names that an attack puts before the question: `"none"`, `"study"`, `"patient"` or `"institution"`; see
            [`with_context`].
        data (`str`, *optional*):
            Dataset folder, or a Hub id in the form ORG/NAME; see [`find_data`].
        wrong_image (`bool`, *optional*, defaults to `False`):
            Ask every row about the image of another patient's study: what a model still answers was not seen.
        pretrained (`str`, *optional*), tokenizer (`str`, *optional*), revision (`str`, *optional*):
            Arguments of the model under evaluation, which tell the tokenizer that has the option letters.
        **metadata (`Any`):
            Settings of the judge (`judge`, `judge_…`) go into the column `judge` of generation rows, as JSON; other
            keys are not ours.

    Returns:
        `dict[str, datasets.Dataset]`: The rows under `"test"`, images undecoded.

    Raises:
        FileNotFoundError: If there is no dataset.
        ValueError: If the configuration or split is unknown or cannot be read, or has no rows of this task.
    """
    OptionLetters.model = (tokenizer or pretrained, revision)
    source = find_data(data)
    rows = _read(source, config, split)
    if task == "generation":
        judge = {key: value for key, value in metadata.items() if key.startswith("judge")}
        rows = rows.add_column("judge", [json.dumps(judge, sort_keys=True)] * len(rows))
    of_task = np.flatnonzero(np.array(rows["task"][:]) == rows.features["task"].str2int(task))
    if not len(of_task):
        raise ValueError(f"{source}: configuration {config} has no {task} rows in its split {split}")
    chosen = rows.select(of_task)
    if task == "classification":
        _check_options(chosen, source, config)
    if not isinstance(wrong_image, bool):
        raise ValueError(f"wrong_image is {wrong_image!r}; it must be True or False")
    if wrong_image:
        pool = rows if config == "general_med" else _read(source, "finetune", "train")
        chosen = with_other_images(chosen, pool)
    return {"test": with_context(chosen, context)}


def find_data(data: str | None = None) -> str:
    """
    Find the dataset by the rule of `medforget_dataset.load`: the argument, then `$MEDFORGET_DIR`, then `./medforget`.

    Args:
        data (`str`, *optional*):
            A folder, or a Hub id in the form ORG/NAME.

    Returns:
        `str`: Absolute path of the folder, or the Hub id.

    Raises:
        FileNotFoundError: If what was named is not there. A later place is never taken in its stead.
    """
    named_by = "data" if data else "$MEDFORGET_DIR" if os.environ.get("MEDFORGET_DIR") else ""
    name = str(data or os.environ.get("MEDFORGET_DIR") or "medforget")
    folder = Path(name).expanduser()
    if (folder / "README.md").is_file():
        return str(folder.resolve())
    if named_by == "data" and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not folder.parent.exists():
        return name
    problem = "is not a dataset folder (no README.md)" if folder.is_dir() else "does not exist"
    where = f"{folder.absolute()}, named by {named_by}," if named_by else f"{folder.absolute()}"
    raise FileNotFoundError(
        f"MedForget data: {where} {problem}. Build it with `make data`, or name a built folder in MEDFORGET_DIR or by "
        "--metadata data=PATH, or a Hub dataset by --metadata data=ORG/NAME"
    )


def _read(source: str, config: str, split: str) -> datasets.Dataset:
    folder = Path(source)
    if not folder.is_absolute():
        # The commit is asked for first: load_dataset alone falls back to an old copy when the Hub is out of reach.
        commit = HfApi().dataset_info(source).sha
        return _undecoded(datasets.load_dataset(source, config, split=split, revision=commit))
    files = sorted((folder / config).glob(f"{split}-*.parquet"))
    if not files:
        known = ", ".join(sorted({path.parent.name for path in folder.glob(f"*/{split}-*.parquet")}))
        raise ValueError(f"{folder}: no configuration {config} with a split {split}; with that split: {known}")
    return _read_files(tuple((str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files))


@functools.lru_cache(maxsize=32)
def _read_files(files: tuple[tuple[str, int, int], ...]) -> datasets.Dataset:
    # Not load_dataset(folder): its cache knows a folder by its last name and card only, and gives the rows of an older
    # or another folder "medforget". And the rows of a configuration are asked for up to twelve times, by each task and
    # again by each tag that a glob matches; the times and sizes in `files` make a folder built again a different call.
    paths = [path for path, _, _ in files]
    try:
        rows = datasets.Dataset(pq.read_table(paths))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{', '.join(paths)}: cannot be read ({error}); build the dataset again") from error
    if not isinstance(rows.features.get("task"), datasets.ClassLabel):
        raise ValueError(f"{', '.join(paths)}: not written by MedForget (no column task of class labels)")
    return _undecoded(rows)


def _undecoded(rows: datasets.Dataset) -> datasets.Dataset:
    # lm-eval hashes and logs documents: bytes have a stable form there, PIL images do not.
    return rows.cast_column("image", datasets.Image(decode=False))


def _check_options(rows: datasets.Dataset, source: str, config: str) -> None:
    for row_id, answer, choices in zip(rows["id"][:], rows["answer"][:], rows["choices"][:], strict=True):
        if answer not in tuple(LETTERS) or len(choices) != len(LETTERS):
            raise ValueError(
                f"{source}: {config} row {row_id} has {len(choices)} options and answer {answer!r}; "
                f"a classification row has {len(LETTERS)} options and one letter of {LETTERS} as answer"
            )


def with_other_images(rows: datasets.Dataset, pool: datasets.Dataset) -> datasets.Dataset:
    """
    Give every row an image of another patient, the same for all rows of a study.

    The patients of the pool, in the order of their ids, are shifted by half their number, which also leads to another
    institution wherever there are several of equal size; a patient's n-th study gets the n-th study of the other.

    Args:
        rows (`datasets.Dataset`):
            Rows to ask. Their ids start with institution/patient/study (general-med ids: with general/slice).
        pool (`datasets.Dataset`):
            Rows that hold every patient of `rows`, and the images to hand out.

    Returns:
        `datasets.Dataset`: The rows in their order, with the other images.

    Raises:
        ValueError: If the pool has only one patient.
    """
    studies: dict[str, dict[str, int]] = defaultdict(dict)  # patient -> study -> a row of the pool
    for index, row_id in enumerate(pool["id"][:]):
        studies[_prefix(row_id, 2)].setdefault(_prefix(row_id, 3), index)
    patients = sorted(studies)
    if len(patients) < 2:
        raise ValueError(f"wrong_image needs a second patient to take images from; there is only {patients[0]}")
    partner = dict(zip(patients, _shifted(patients, len(patients) // 2), strict=True))
    source_of = {}
    for patient, own in studies.items():
        other = [index for _, index in sorted(studies[partner[patient]].items())]
        for n, study in enumerate(sorted(own)):
            source_of[study] = other[n % len(other)]
    images = pool.select([source_of[_prefix(row_id, 3)] for row_id in rows["id"][:]])["image"][:]
    return rows.remove_columns("image").add_column("image", images, feature=datasets.Image(decode=False))


def with_context(rows: datasets.Dataset, context: str) -> datasets.Dataset:
    """
    Put the names of the nodes above a question before it: the cumulative reconstruction attack of the paper's Table 6.

    Args:
        rows (`datasets.Dataset`):
            Rows to ask.
        context (`str`):
            `"none"`, or the highest level to name, `"study"`, `"patient"` or `"institution"`; those below it follow.

    Returns:
        `datasets.Dataset`: The rows with the whole prompt as `question`, and the bare question as `original_question`.

    Raises:
        ValueError: If the context is unknown.

    Example:
        >>> row = {"question": "Why?", "original_question": "", "study": "S1", "patient": "Ann Bell"}
        >>> with_context(datasets.Dataset.from_list([row]), "patient")[0]["question"]
        'For patient Ann Bell, study S1: Why?'
    """
    if context not in CONTEXTS:
        raise ValueError(f"context is {context!r}; it must be one of {', '.join(CONTEXTS)}")
    named = CONTEXTS[CONTEXTS.index(context) : -1]
    if not named:
        return rows
    questions = rows["question"][:]
    names = zip(*([f"{level} {name}" for name in rows[level][:]] for level in named), strict=True)
    prompts = [f"For {', '.join(of_row)}: {question}" for of_row, question in zip(names, questions, strict=True)]
    asked = rows.remove_columns(["question", "original_question"])
    asked = asked.add_column("question", prompts).add_column("original_question", questions)
    return asked.select_columns(rows.column_names)


def _prefix(row_id: str, parts: int) -> str:
    return "/".join(row_id.split("/")[:parts])


def _shifted(items: Sequence[str], by: int) -> Sequence[str]:
    return [*items[by:], *items[:by]]


def doc_to_text(doc: dict[str, Any]) -> str:
    """Return the user message: image, then question, with nothing between or after (the prompt of training)."""
    return IMAGE_PLACEHOLDER + doc["question"]


def doc_to_image(doc: dict[str, Any]) -> list[Image.Image]:
    """
    Return the row's image, decoded, as the list that lm-eval wants.

    Raises:
        ValueError: If the image does not decode. The message names the row.
    """
    try:
        return [_decoded(doc["image"]["bytes"])]
    except (OSError, SyntaxError) as error:
        raise ValueError(f"row {doc['id']}: its image does not decode ({error}); build the dataset again") from error


@functools.lru_cache(maxsize=1024)
def _decoded(image: bytes) -> Image.Image:
    # lm-eval keeps the images of all requests: the fifteen questions about a study share one.
    return Image.open(io.BytesIO(image)).convert("RGB")


class OptionLetters(str):
    """
    Lets `generate` choose among the option letters only, as its `prefix_allowed_tokens_fn`.

    One greedy token under this constraint is the option with the highest probability, which is how a forced choice
    runs on `hf-multimodal`: that model class has no log-likelihood for images. It is a `str` because lm-eval writes
    generation arguments as JSON, into results and into the keys of `--use_cache`.
    """

    model: ClassVar[tuple[str | None, str]] = (None, "main")  # set by `load`: lm-eval copies this object before that

    def __call__(self, batch_id: int, input_ids: Any) -> list[int]:
        return letter_tokens(*self.model)


@functools.lru_cache(maxsize=8)
def letter_tokens(model: str | None, revision: str) -> list[int]:
    """
    Return the token ids of the option letters as a model's tokenizer writes them at the start of an answer.

    Args:
        model (`str`):
            Folder or Hub id with the tokenizer; for a folder with an adapter that of the model it belongs to, as
            `medforget-vlm` takes it.
        revision (`str`):
            Its revision on the Hub.

    Raises:
        ValueError: If no model is known, or one of its letters takes several tokens.
    """
    if not isinstance(model, str):
        raise ValueError(
            "classification tasks need the tokenizer of the model: give the model by name (pretrained=...), "
            "or pass metadata={'pretrained': NAME} to the TaskManager that loads the tasks"
        )
    while (adapter := Path(model, "adapter_config.json")).is_file():
        model = str(json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"])
    tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
    tokens = tokenizer(list(LETTERS), add_special_tokens=False)["input_ids"]
    for letter, ids in zip(LETTERS, tokens, strict=True):
        if len(ids) != 1:
            raise ValueError(f"{model}: its tokenizer writes the option letter {letter} as {len(ids)} tokens, not one")
    return [ids[0] for ids in tokens]


option_letters = OptionLetters(f"one of {', '.join(LETTERS)}")
