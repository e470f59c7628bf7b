"""What a dataset is built from: every choice that its content depends on, checked before any work begins."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .corpora import corpus_name, get_corpus
from .errors import UserError
from .hierarchy import Counts
from .hub_files import has_hub_form
from .partition import SELECTIONS


# The patch grid of a Qwen2.5-VL image encoder is 28 pixels; below twice that nothing of a chest is left.
IMAGE_SIZES = (56, 1024)
CHOICES = {
    "selection": SELECTIONS,
    "section_kinds": ("standard", "any"),
    "on_error": ("stop", "skip"),
    "questions": ("templates", "llm"),
    "views": ("auto", "geometric", "svdrr"),
}

FOLDERS = ("root", "images", "svdrr", "svdrr_model")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class BuildOptions:
    """Everything the content of a build depends on.

    Args:
        corpus (`str`, *optional*, defaults to `"embedded"`): A module of `medforget_dataset.corpora`.
        root (`str`, *optional*): Folder of the corpus' files; the embedded corpus has none.
        images (`str`, *optional*): Folder of its images, where they do not lie below `root`.
        institutions (`int`, *optional*, defaults to `8`): Institutions (paper, section 3.4; so are the next three).
        patients (`int`, *optional*, defaults to `8`): Patients an institution.
        studies (`int`, *optional*, defaults to `4`): Studies a patient.
        sections (`int`, *optional*, defaults to `4`): Sections a study.
        section_kinds (`str`, *optional*, defaults to `"standard"`): `"standard"` takes the four sections that every
            study must have (paper, section 3.2); `"any"` draws from all sections of these studies (Figure 4).
        seed (`int`, *optional*, defaults to `0`): Another seed is another hospital.
        selection (`str`, *optional*, defaults to `"stratified"`): See [`~medforget_dataset.partition.forget_ids`].
        image_size (`int`, *optional*, defaults to `224`): Width and height of every image in pixels.
        views (`str`, *optional*, defaults to `"auto"`): How turned views are made; see `medforget_dataset.views`.
        svdrr (`str`, *optional*): Folder of an installation of SV-DRR.
        svdrr_model (`str`, *optional*): Checkpoint of SV-DRR.
        general_med (`str`, *optional*, defaults to `"anatomy"`): `"anatomy"` for the embedded questions, or a folder
            or Hub id of PMC-VQA (paper, section 3.3).
        license (`str`, *optional*): Licence of a table's data. Without one a table is taken for restricted.
        questions (`str`, *optional*, defaults to `"templates"`): `"templates"`, or `"llm"` for a language model.
        endpoint (`str`, *optional*): OpenAI-compatible endpoint of the language model.
        llm_model (`str`, *optional*): Its name there.
        endpoint_complies (`str`, *optional*): Who agreed, under what terms, that restricted text may go to
            `endpoint`; recorded in the card.
        on_error (`str`, *optional*, defaults to `"stop"`): `"stop"` at the first faulty file or row, or `"skip"` it
            and take another.

    Raises:
        UserError: A value is out of range.
    """

    corpus: str = _option("embedded", "where the data is from")
    root: str = _option("", "folder of the corpus' files; the embedded corpus has none")
    images: str = _option("", "folder of its images, where they are not below --root")
    institutions: int = _option(8, "institutions: a multiple of 4")
    patients: int = _option(8, "patients an institution: a multiple of 4")
    studies: int = _option(4, "studies a patient: a multiple of 4")
    sections: int = _option(4, "sections a study: a multiple of 4")
    section_kinds: str = _option("standard", "")
    seed: int = _option(0, "another seed is another hospital")
    selection: str = _option(
        "stratified",
        f"which quarter is forgotten: {', '.join(SELECTIONS)}. stratified: a quarter of every node's children; "
        "nested: everything under the same institutions; flat: as many rows, at random",
    )
    image_size: int = _option(224, "pixels a side")
    views: str = _option(
        "auto",
        "how turned views are made. auto: true projections for the embedded corpus, geometric for all others; "
        "geometric: the picture is turned in its plane, and rows and card say so; svdrr: by your own SV-DRR",
    )
    svdrr: str = _option("", "folder of an installation of SV-DRR, for --views svdrr")
    svdrr_model: str = _option("", "checkpoint folder of SV-DRR, for --views svdrr")
    general_med: str = _option(
        "anatomy", "where general_med is from: anatomy (embedded), or a folder or Hub id of PMC-VQA"
    )
    license: str = _option(
        "", "licence of a table's data, such as cc-by-4.0; without one the table is taken for restricted"
    )
    questions: str = _option(
        "templates", "templates: fixed wordings; llm: written by a language model, needs --endpoint and --llm-model"
    )
    endpoint: str = _option("", "OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1")
    llm_model: str = _option("", "name of the language model at the endpoint")
    endpoint_complies: str = _option(
        "",
        "who agreed, under what terms, that restricted text may go to an endpoint that is not this machine; "
        "recorded in the card",
    )
    on_error: str = _option("stop", "at a faulty file or row: stop, or skip it and take another (build-log.jsonl)")

    def __post_init__(self):
        object.__setattr__(self, "corpus", corpus_name(self.corpus))
        self.counts  # noqa: B018 - refuses counts that 25 % does not divide
        for name, valid in CHOICES.items():
            if (value := getattr(self, name)) not in valid:
                raise UserError(f"{flag(name)} {value}: unknown; choose from {', '.join(valid)}")
        low, high = IMAGE_SIZES
        if not low <= self.image_size <= high:
            raise UserError(f"--image-size {self.image_size}: must be between {low} and {high} pixels")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed}: must not be negative")
        for name in ("svdrr", "svdrr_model"):
            if bool(getattr(self, name)) != (self.views == "svdrr"):
                problem = "needs it" if self.views == "svdrr" else "has no use for it"
                raise UserError(f"{flag(name)} {getattr(self, name)!r}: --views {self.views} {problem}")
        for name in ("endpoint", "llm_model", "endpoint_complies"):
            if getattr(self, name) and self.questions != "llm":
                raise UserError(f"{flag(name)}: is for --questions llm; --questions {self.questions} asks nobody")
        if self.license and self.corpus != "table":
            raise UserError(
                f"--license {self.license}: the corpus {self.corpus} has its own; it is for --corpus table"
            )
        reads_files = get_corpus(self.corpus).reads_files
        if self.images and not reads_files:
            raise UserError(f"--images {self.images}: the corpus {self.corpus} has no files to read")
        if reads_files != bool(self.root):
            problem = "has no files to read" if self.root else "reads files; name their folder"
            raise UserError(f"{f'--root {self.root}'.strip()}: the corpus {self.corpus} {problem}")

    @property
    def counts(self) -> Counts:
        """How many children a node has at each level."""
        return Counts(self.institutions, self.patients, self.studies, self.sections)

    def changed(self) -> dict[str, Any]:
        """The options that differ from their defaults, in order."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}

    def folders(self) -> dict[str, Path]:
        """The folders of this machine that it is built from, by the option that names each."""
        given = {name: value for name, value in self.changed().items() if is_folder(name, str(value))}
        return {name: Path(value).expanduser() for name, value in given.items()}


def command(options: BuildOptions) -> str:
    """The call that builds the same, with folders of the machine left out.

    Example:
        >>> command(BuildOptions(seed=3, section_kinds="any", patients=4))
        'medforget build --patients 4 --sections 4 any --seed 3'
    """
    words = ["medforget", "build"]
    changed = options.changed()
    for name in (option.name for option in fields(options)):
        if name == "sections":
            kinds = [options.section_kinds] if "section_kinds" in changed else []
            if kinds or name in changed:
                words += ["--sections", str(options.sections), *kinds]
        elif name in changed and name != "section_kinds":
            value = str(changed[name])
            words += [flag(name), name.upper() if is_folder(name, value) else shlex.quote(value)]
    return " ".join(words)


def is_folder(name: str, value: str) -> bool:
    """Whether an option names a folder of this machine: `general_med` may also name a Hub id, or the embedded set.

    Example:
        >>> is_folder("root", "files"), is_folder("general_med", "RadGenome/PMC-VQA")
        (True, False)
    """
    if name == "general_med":
        return value != "anatomy" and (not has_hub_form(value) or Path(value).expanduser().is_dir())
    return name in FOLDERS


def flag(name: str) -> str:
    """How the command line spells an option.

    Example:
        >>> flag("image_size"), flag("section_kinds")
        ('--image-size', '--sections')
    """
    return "--sections" if name == "section_kinds" else f"--{name.replace('_', '-')}"
