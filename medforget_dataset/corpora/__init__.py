"""Corpora: where institutions, patients, studies, reports and images come from.

A corpus is one module in this package that defines a class named `Corpus` following [`CorpusProtocol`]. It is found by
its module name (`medforget build --corpus NAME`); nothing else needs an edit.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Protocol

from PIL import Image

from ..errors import UserError
from ..hierarchy import Counts, Institution


class CorpusProtocol(Protocol):
    """What the builder asks of a corpus.

    Args:
        counts ([`~medforget_dataset.hierarchy.Counts`]): How many children a node has at each level.
        seed (`int`): Everything that is drawn at random depends on it and on the node's key, never on order.
    """

    name: str
    """Written to the `source` column and the card."""
    restricted: bool
    """Whether the data stands under an agreement that forbids sharing; written to every row."""
    license: str
    """Identifier of the data's licence, as the Hub spells it."""
    attribution: str
    """Who made the data and under which terms, for the card."""

    def __init__(self, counts: Counts, seed: int): ...

    def institutions(self) -> tuple[Institution, ...]:
        """The whole hierarchy, without images."""
        ...

    def image(self, patient_key: str, study_key: str, *, view_angle: float = 0.0, size: int = 224) -> Image.Image:
        """The study's frontal image seen from `view_angle` degrees, `size` × `size` pixels."""
        ...

    def general_med(self, split: str, *, size: int = 224) -> list[dict]:
        """Rows (`train` or `test`) that have nothing to do with any node of the hierarchy."""
        ...


def corpus_names() -> list[str]:
    """Names of all corpora in this package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get_corpus(name: str) -> type[CorpusProtocol]:
    """The class of a corpus.

    Raises:
        UserError: There is no such corpus.
    """
    if name not in corpus_names():
        raise UserError(f"--corpus {name}: unknown corpus; choose from {', '.join(corpus_names())}")
    return import_module(f"{__name__}.{name}").Corpus
