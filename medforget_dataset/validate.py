"""Recount every invariant of a built dataset from its Parquet files alone, and name each violation."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow.parquet as pq
from tqdm import tqdm

from .benchmark import CONFIGS, REPHRASE_ANGLES, SPLITS
from .builder import FEATURES
from .hierarchy import LEVELS
from .options import BuildOptions
from .partition import is_forgotten
from .questions import BLANK
from .questions.cloze import MAX_SHARE
from .questions.phrasings import contains
from .viewer import CARD, viewer_problems
from .views import VIEW_METHODS
from .writer import changed_file, parquet_path, read_options, read_record


MAX_LETTER_SHARE = 0.35
MIN_DISTINCT_TEXTS = 0.9
# Shares are only meaningful where a single row is not already above them.
MIN_KIND = 20


def validate(folder: Path) -> list[str]:
    """Check a dataset folder.

    Args:
        folder (`Path`): A folder written by [`~medforget_dataset.build`].

    Returns:
        `list[str]`: One line for each violation, naming the file or row; empty if there is none.

    Raises:
        UserError: The folder is not a MedForget dataset at all, or was built by another version.
    """
    record = read_record(folder)
    tables: dict[tuple[str, str], list[dict]] = {}
    options = read_options(folder, record)
    names = dict.fromkeys([*record["files"], CARD, *(parquet_path(*split) for split in _splits())])
    problems = [problem for name in names if (problem := changed_file(folder, name, record))]
    for config, split in _splits():
        path = folder / parquet_path(config, split)
        try:
            tables[config, split] = _read(path)
        except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
            problems.append(f"{path}: cannot be read: {error}")
            continue
        problems += _schema_problems(path)
    problems += viewer_problems(folder)
    if len(tables) < len(_splits()):
        return problems
    finetune = tables["finetune", "train"]
    problems += _count_problems(finetune, options)
    problems += _partition_problems(tables, options)
    for name, rows in tables.items():
        problems += [f"{'/'.join(name)}: {problem}" for problem in _row_problems(rows, record["restricted"])]
    if options.questions == "templates":
        problems += [f"finetune: {problem}" for problem in _option_problems(finetune)]
    if _is_balanced_by_us(options):
        problems += [f"finetune: {problem}" for problem in _balance_problems(finetune)]
    if options.general_med == "anatomy":
        general = [row for split in SPLITS["general_med"] for row in tables["general_med", split]]
        problems += [f"general_med: {problem}" for problem in _letter_problems(general)]
    problems += _general_problems(tables["general_med", "train"], tables["general_med", "test"])
    for name in tqdm(tables, desc="decoding images", unit="split"):
        problems += _image_problems(folder / parquet_path(*name), options.image_size)
    return problems


def notes(folder: Path) -> list[str]:
    """What is worth knowing of a dataset whose balance is its hospital's, and breaks no rule.

    Args:
        folder (`Path`): A folder that [`validate`] found nothing wrong with.

    Returns:
        `list[str]`: A line each for a frequent cloze answer, a frequent letter, and texts that repeat.
    """
    if _is_balanced_by_us(read_options(folder, read_record(folder))):
        return []
    return [f"finetune: {note}" for note in _balance_problems(_read(folder / parquet_path("finetune", "train")))]


def _is_balanced_by_us(options: BuildOptions) -> bool:
    """Whether balance is a promise: how often a hospital finds nothing, or repeats a sentence, is not ours to mend."""
    return options.corpus == "embedded" and options.questions == "templates"


def _splits() -> list[tuple[str, str]]:
    return [(config, split) for config in CONFIGS for split in SPLITS[config]]


def _read(path: Path) -> list[dict]:
    columns = [name for name in FEATURES if name != "image"]
    rows = pq.read_table(path, columns=columns).to_pylist()
    for row in rows:
        row["task"], row["level"] = (FEATURES[key].int2str(row[key]) for key in ("task", "level"))
    return rows


def _schema_problems(path: Path) -> Iterator[str]:
    found = datasets.Features.from_arrow_schema(pq.read_schema(path))
    if found != FEATURES:
        yield f"{path}: columns differ from the schema: {sorted(set(found) ^ set(FEATURES)) or 'types'}"


def _count_problems(rows: list[dict], options: BuildOptions) -> Iterator[str]:
    counts = options.counts
    expected = {
        "rows": counts.rows,
        "institutions": counts.institutions,
        "patients": counts.institutions * counts.patients,
        "studies": counts.institutions * counts.patients * counts.studies,
        "sections": counts.institutions * counts.patients * counts.studies * counts.sections,
    }
    found = {"rows": len(rows)} | {
        name: len(
            {"/".join(row["id"].split("/")[:depth]) for row in rows if len(row["id"].split("/")) >= max(depth, least)}
        )
        for name, depth, least in (("institutions", 1, 1), ("patients", 2, 1), ("studies", 3, 1), ("sections", 4, 5))
    }
    for name, count in expected.items():
        if found[name] != count:
            yield f"finetune: {found[name]} {name}, expected {count}"
    for id, count in Counter(row["id"] for row in rows).items():
        if count > 1:
            yield f"finetune: id {id} occurs {count} times"


def _partition_problems(tables: dict, options: BuildOptions) -> Iterator[str]:
    everything = {row["id"]: row for row in tables["finetune", "train"]}
    trained = {wording for row in everything.values() for wording in row["training_phrasings"]}
    counts = options.counts
    studies = counts.institutions * counts.patients * counts.studies
    sections = 3 * counts.sections * studies // 4
    identity = {"institution": 3, "patient": 2, "study": 1, "section": 0}
    for level in LEVELS:
        forget = {row["id"]: row for row in tables[f"{level}_forget", "train"]}
        retain = {row["id"]: row for row in tables[f"{level}_retain", "train"]}
        rephrase = tables[f"{level}_forget_rephrase", "test"]
        expected = sections + identity[level] * studies // 4
        if len(forget) != expected:
            yield f"{level}_forget: {len(forget)} rows, expected {expected} (25 % of the nodes)"
        if options.selection != "flat":
            yield from _node_problems(level, everything, set(forget))
        for id in sorted(forget.keys() & retain.keys()):
            yield f"{level}: {id} is both forgotten and retained"
        for id in sorted(everything.keys() ^ (forget.keys() | retain.keys())):
            yield f"{level}: {id} is not in exactly one of forget and retain"
        for id, row in (forget | retain).items():
            if row != everything.get(id):
                yield f"{level}: {id} differs from finetune"
        for id, row in forget.items():
            if any(contains(wording, row["study"]) for wording in row["training_phrasings"]):
                yield f"{level}_forget: a training wording of {id} names its study"
        yield from _rephrase_problems(level, forget, rephrase, trained)


def _node_problems(level: str, everything: dict[str, dict], forget: set[str]) -> Iterator[str]:
    """Whole nodes are forgotten: their own identity rows and what is beneath them, and nothing above."""
    depth = LEVELS.index(level) + 1
    nodes = {"/".join(id.split("/")[:depth]) for id in forget}
    for id, row in everything.items():
        if is_forgotten(row, level, nodes) != (id in forget):
            yield f"{level}: {id} is {'kept' if id not in forget else 'forgotten'} against the scope of its node"


def _rephrase_problems(level: str, forget: dict[str, dict], rephrase: list[dict], trained: set[str]) -> Iterator[str]:
    originals = {row["id"].removesuffix("/rephrase") for row in rephrase}
    for id in sorted(originals ^ forget.keys()):
        yield f"{level}_forget_rephrase: {id} is not in both forget and forget_rephrase"
    for row in rephrase:
        original = forget.get(row["id"].removesuffix("/rephrase"))
        if row["question"] in trained:
            yield f"{level}_forget_rephrase: {row['id']} asks in a wording that training uses"
        if row["view_method"] not in VIEW_METHODS[1:]:
            yield f"{level}_forget_rephrase: {row['id']} does not say how its view was turned: {row['view_method']!r}"
        if row["view_angle"] not in REPHRASE_ANGLES:
            yield f"{level}_forget_rephrase: {row['id']} is seen from {row['view_angle']}°"
        if original and (row["answer"], row["original_question"]) != (original["answer"], original["question"]):
            yield f"{level}_forget_rephrase: {row['id']} has another answer or original question than its forget row"


def _row_problems(rows: list[dict], restricted: bool) -> Iterator[str]:
    for row in rows:
        wordings = [row["question"], *row["training_phrasings"]]
        if not row["view_angle"] and row["view_method"] != VIEW_METHODS[0]:
            yield f"{row['id']}: the view is not turned, and view_method is {row['view_method']!r}"
        if row["restricted"] != restricted:
            yield f"{row['id']}: restricted is {row['restricted']}, the build says {restricted}"
        if len(set(row["training_phrasings"])) < 4:
            yield f"{row['id']}: fewer than four training phrasings"
        if row["task"] == "cloze" and any(wording.count(BLANK) != 1 for wording in wordings):
            yield f"{row['id']}: {BLANK} does not occur exactly once"
        if row["task"] == "classification":
            if len(set(row["choices"])) != 4 or row["answer"] not in ("A", "B", "C", "D"):
                yield f"{row['id']}: needs four distinct choices and a letter A to D"
        elif any(contains(wording, row["answer"]) for wording in wordings):
            yield f"{row['id']}: the question contains its answer {row['answer']!r}"


def _letter_problems(rows: list[dict]) -> Iterator[str]:
    letters = Counter(row["answer"] for row in rows if row["task"] == "classification")
    for letter, count in letters.items():
        if count > MAX_LETTER_SHARE * letters.total():
            yield f"letter {letter} answers {count} of {letters.total()} classification rows"


def _balance_problems(rows: list[dict]) -> Iterator[str]:
    yield from _letter_problems(rows)
    texts = [row["answer"] for row in rows if row["task"] == "generation"]
    if len(set(texts)) < MIN_DISTINCT_TEXTS * len(texts):
        yield f"only {len(set(texts))} of {len(texts)} section texts are distinct"
    clozes: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        if row["task"] == "cloze":
            clozes[row["section"]][re.sub(r"\s+", " ", row["answer"].lower())] += 1
    for section, answers in clozes.items():
        answer, count = answers.most_common(1)[0]
        if answers.total() >= MIN_KIND and count > MAX_SHARE * answers.total():
            yield f"cloze answer {answer!r} fills {count} of {answers.total()} blanks of section {section}"


def _option_problems(rows: list[dict]) -> Iterator[str]:
    """Options that differ between studies would identify the study."""
    choices: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for row in rows:
        if row["task"] == "classification":
            choices[row["section"]].add(tuple(row["choices"]))
    for section, sets in choices.items():
        if len(sets) > 1:
            yield f"section {section} is classified with {len(sets)} different sets of options"


def _general_problems(train: list[dict], test: list[dict]) -> Iterator[str]:
    shared = {row["id"].split("/")[1] for row in train} & {row["id"].split("/")[1] for row in test}
    for image in sorted(shared):
        yield f"general_med: image {image} is in train and in test"
    for id, count in Counter(row["id"] for row in train + test).items():
        if count > 1:
            yield f"general_med: id {id} occurs {count} times"
    for row in train + test:
        if row["institution"] or row["patient"] or row["study"]:
            yield f"general_med: {row['id']} names a node of the hierarchy"


def _image_problems(path: Path, size: int) -> Iterator[str]:
    table = pq.read_table(path, columns=["id", "image"])
    decoder = datasets.Image()
    seen: dict[str, bytes] = {}
    for id, image in zip(table["id"].to_pylist(), table["image"].to_pylist(), strict=True):
        place = "/".join(id.split("/")[: 2 if id.startswith("general/") else 3])
        if place in seen:
            if seen[place] != image["bytes"]:
                yield f"{path}: {id} shows another image than the other rows of its study"
            continue
        seen[place] = image["bytes"]
        try:
            decoded = decoder.decode_example(image)
        except (OSError, ValueError, SyntaxError) as error:  # all that Pillow raises for a broken file
            yield f"{path}: image of {id} does not decode: {error}"
            continue
        if decoded.size != (size, size):
            yield f"{path}: image of {id} is {decoded.size[0]} × {decoded.size[1]}, expected {size} × {size}"
