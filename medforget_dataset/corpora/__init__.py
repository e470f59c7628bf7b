"""Corpora: where institutions, patients, studies, reports and images come from.

A corpus is one module in this package that defines a class named `Corpus` following [`CorpusProtocol`]; those that
read a hospital's files derive it from [`~medforget_dataset.corpora._hospital.HospitalCorpus`]. It is found by its
module's name, with hyphens for underscores (`medforget build --corpus mimic-cxr`); nothing else needs an edit.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from PIL import Image

from ..errors import UserError
from ..hierarchy import Institution


if TYPE_CHECKING:
    from ..build_log import BuildLog
    from ..options import BuildOptions


class CorpusProtocol(Protocol):
    """What the builder asks of a corpus.

    Args:
        options ([`~medforget_dataset.options.BuildOptions`]): What to build. Everything that is drawn at random
            depends on its seed and on the node's key, never on order.
        log ([`~medforget_dataset.build_log.BuildLog`], *optional*): Told of every fault and oddity of the files.
    """

    name: str
    """Written to the `source` column and the card."""
    restricted: bool
    """Whether the data stands under an agreement that forbids sharing; written to every row."""
    license: str
    """Identifier of the data's licence, as the Hub spells it; `"other"` for an agreement."""
    license_name: str
    """The agreement's or licence's name in words; empty where `license` says it."""
    license_link: str
    """Where its text stands; empty where `license` says it."""
    image_noun: str
    """What questions call an image, for example `"radiograph"`."""
    real_institutions: bool
    """Whether the institutions' names are the source's own."""
    grouping_note: str
    """What the card must say about how studies were grouped; empty where patients are the source's own."""
    attribution: str
    """Who made the data and under which terms, for the card."""
    reads_files: bool
    """Whether it needs `--root`."""
    views: str
    """How its turned views are made: `"projection"`, `"geometric"` or `"svdrr"`."""

    def __init__(self, options: BuildOptions, log: BuildLog | None = None): ...

    def institutions(self) -> tuple[Institution, ...]:
        """The whole hierarchy, without images."""
        ...

    def image(self, patient_key: str, study_key: str, *, view_angle: float = 0.0, size: int = 224) -> Image.Image:
        """The study's frontal image seen from `view_angle` degrees, `size` × `size` pixels."""
        ...


def corpus_names() -> list[str]:
    """Names of all corpora in this package."""
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name.replace("_", "-") for name in modules if not name.startswith("_"))


def corpus_name(name: str) -> str:
    """The name of a corpus as `corpus_names` spells it; `mimic_cxr` is `mimic-cxr`.

    Raises:
        UserError: There is no such corpus.
    """
    if (canonical := name.replace("_", "-").lower()) not in corpus_names():
        raise UserError(f"--corpus {name}: unknown corpus; choose from {', '.join(corpus_names())}")
    return canonical


def get_corpus(name: str) -> type[CorpusProtocol]:
    """The class of a corpus.

    Raises:
        UserError: There is no such corpus.
    """
    return import_module(f"{__name__}.{corpus_name(name).replace('-', '_')}").Corpus
