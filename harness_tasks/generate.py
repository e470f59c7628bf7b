"""Write the task YAMLs: ``python -m harness_tasks.generate``, or ``--check`` to only compare."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


FOLDER = Path(__file__).parent
LEVELS = ("institution", "patient", "study", "section")
# Each with a file _KIND_yaml; classification_text asks the rows of classification, without forcing a letter.
KINDS = ("generation", "cloze", "classification", "classification_text", "identity")
# Names in an attack's prompt, each with those before it (paper, Table 6).
CONTEXTS = ("none", "study", "patient", "institution")
# What follows the level in the name of a configuration of the dataset, for each split.
CONFIGS = {"forget": "forget", "retain": "retain", "rephrase": "forget_rephrase", "attack": "forget"}
VERSION = 1.1
GROUP_FILE = "medforget.yaml"


class Leaf(NamedTuple):
    """One lm-eval task: the rows of one kind in one split of the evaluation, or an attack."""

    level: str  # "" for general_med
    split: str  # forget, retain, rephrase, attack or general_med, as the report names them
    kind: str
    context: str = ""  # what an attack names before the question

    @property
    def slice(self) -> str:
        """The task's name without its kind or context, which is also a tag."""
        return "_".join(part for part in ("medforget", self.level, self.split) if part)

    @property
    def name(self) -> str:
        return f"{self.slice}_{self.context or self.kind}"

    @property
    def config(self) -> str:
        """Configuration of the dataset."""
        if not self.level:
            return self.split
        return f"{self.level}_{CONFIGS[self.split]}"

    @property
    def data_split(self) -> str:
        """Split of that configuration."""
        return "test" if self.split in ("rephrase", "general_med") else "train"

    @property
    def task(self) -> str:
        """Kind of question that the rows have."""
        return self.kind.removesuffix("_text")

    @property
    def tags(self) -> list[str]:
        tags = [f"medforget_{self.level}", self.slice] if self.level else [self.slice]
        return [*tags, "medforget_attack"] if self.context else tags

    def yaml(self) -> str:
        context = f", context: {self.context}" if self.context else ""
        return (
            f"include: _{self.kind}_yaml\n"
            f"task: {self.name}\n"
            f"tag: [{', '.join(self.tags)}]\n"
            f"dataset_kwargs: {{config: {self.config}, split: {self.data_split}, task: {self.task}{context}}}\n"
        )


def _leaves() -> Iterator[Leaf]:
    for level in LEVELS:
        for split in ("forget", "retain", "rephrase"):
            for kind in KINDS:
                # Forgetting sections forgets no identity row: those lie above it (paper, Table 2).
                if (level, kind) != ("section", "identity") or split == "retain":
                    yield Leaf(level, split, kind)
        for context in CONTEXTS:
            yield Leaf(level, "attack", "generation", context)
    for kind in KINDS[:-1]:  # general_med knows no hospital, so it has no identity rows
        yield Leaf("", "general_med", kind)


LEAVES = tuple(_leaves())


def files() -> dict[str, str]:
    """Return the text of every generated file by its name: the tasks and the group."""
    group_members = "".join(f"  - {tag}\n" for tag in dict.fromkeys(leaf.tags[0] for leaf in LEAVES))
    group = f"group: medforget\ntask:\n{group_members}metadata:\n  version: {VERSION}\n"
    return {f"{leaf.name}.yaml": leaf.yaml() for leaf in LEAVES} | {GROUP_FILE: group}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m harness_tasks.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is not as generated")
    check = parser.parse_args(arguments).check
    wanted = files()
    found = {path.name: path.read_text() for path in FOLDER.glob("*.yaml")}
    stale = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if check:
        for name in stale:
            sys.stderr.write(f"{FOLDER / name}: not as generated; run python -m harness_tasks.generate\n")
        return int(bool(stale))
    for name in stale:
        if name in wanted:
            (FOLDER / name).write_text(wanted[name])
        else:
            (FOLDER / name).unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
