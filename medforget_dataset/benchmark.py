"""The benchmark as rows: hierarchy, questions and partition put together, images rendered when they are needed."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from typing import Any

from PIL import Image
from tqdm import tqdm

from .corpora import get_corpus
from .errors import UserError
from .hierarchy import LEVELS, Counts, StudyNode, stable_number, walk_studies
from .partition import SELECTIONS, forget_ids
from .processes import available_cores, start_worker
from .questions import choose_clozes, rephrase_row, study_rows


# Paper, section 3.3: the four SV-DRR variations.
REPHRASE_ANGLES = (-30.0, -15.0, 15.0, 30.0)
CONFIGS = (
    "finetune",
    *(f"{level}_{split}" for level in LEVELS for split in ("forget", "retain", "forget_rephrase")),
    "general_med",
)
SPLITS: dict[str, tuple[str, ...]] = {
    name: ("test",) if name.endswith("_rephrase") else ("train", "test") if name == "general_med" else ("train",)
    for name in CONFIGS
}

# High enough that the weakest finding survives compression.
JPEG_QUALITY = 92
# The patch grid of a Qwen2.5-VL image encoder is 28 pixels; below twice that nothing of a chest is left.
IMAGE_SIZES = (56, 1024)


@dataclass(frozen=True)
class BuildOptions:
    """Everything the content of a build depends on.

    Args:
        corpus (`str`, *optional*, defaults to `"embedded"`): A module of `medforget_dataset.corpora`.
        institutions (`int`, *optional*, defaults to `8`): Institutions (paper, section 3.4; so are the next three).
        patients (`int`, *optional*, defaults to `8`): Patients an institution.
        studies (`int`, *optional*, defaults to `4`): Studies a patient.
        sections (`int`, *optional*, defaults to `4`): Sections a study.
        seed (`int`, *optional*, defaults to `0`): Another seed is another hospital.
        selection (`str`, *optional*, defaults to `"stratified"`): See [`~medforget_dataset.partition.forget_ids`].
        image_size (`int`, *optional*, defaults to `224`): Width and height of every image in pixels.

    Raises:
        UserError: A value is out of range.
    """

    corpus: str = "embedded"
    institutions: int = 8
    patients: int = 8
    studies: int = 4
    sections: int = 4
    seed: int = 0
    selection: str = "stratified"
    image_size: int = 224

    def __post_init__(self):
        self.counts  # noqa: B018 - refuses counts that 25 % does not divide
        get_corpus(self.corpus)
        if self.selection not in SELECTIONS:
            raise UserError(f"--selection {self.selection}: unknown selection; choose from {', '.join(SELECTIONS)}")
        low, high = IMAGE_SIZES
        if not low <= self.image_size <= high:
            raise UserError(f"--image-size {self.image_size}: must be between {low} and {high} pixels")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed}: must not be negative")

    @property
    def counts(self) -> Counts:
        """How many children a node has at each level."""
        return Counts(self.institutions, self.patients, self.studies, self.sections)


class Benchmark:
    """All rows of all configurations.

    Args:
        options ([`BuildOptions`]): What to build.
        workers (`int`, *optional*): Processes that render images, by default one a CPU core. The rows and the images
            do not depend on it.
    """

    def __init__(self, options: BuildOptions, workers: int | None = None):
        self.options = options
        self.workers = available_cores() if workers is None else workers
        if self.workers < 1:
            raise UserError(f"--workers {workers}: must be at least 1")
        self.corpus = get_corpus(options.corpus)(options.counts, options.seed)
        self._images: dict[tuple[str, float], bytes] = {}

    @cached_property
    def nodes(self) -> list[StudyNode]:
        """All studies, in order of their addresses."""
        return list(walk_studies(self.corpus.institutions()))

    @cached_property
    def rows(self) -> list[dict]:
        """The rows of `finetune` without their images, sorted so that rows of one image are adjacent."""
        clozes = choose_clozes(self.nodes, self.options.seed)
        shared: dict[str, Any] = {
            "seed": self.options.seed,
            "restricted": self.corpus.restricted,
            "source": self.corpus.name,
        }
        return [row for node in self.nodes for row in study_rows(node, clozes, **shared)]

    def forgotten(self, level: str) -> set[str]:
        """Ids of the rows forgotten at a level."""
        options = self.options
        return forget_ids(level, self.rows, self.corpus.institutions(), selection=options.selection, seed=options.seed)

    def config_rows(self, config: str) -> list[dict]:
        """Rows of a configuration of the hierarchy (any but `general_med`), without their images.

        Raises:
            UserError: Unknown configuration.
        """
        check_config(config)
        if config == "finetune":
            return self.rows
        level, split = config.split("_", 1)
        forget = self.forgotten(level)
        if split == "retain":
            return [row for row in self.rows if row["id"] not in forget]
        rows = [row for row in self.rows if row["id"] in forget]
        if split == "forget":
            return rows
        return [rephrase_row(row, view_angle=self._angle(row), seed=self.options.seed) for row in rows]

    def examples(self, config: str, split: str) -> Iterator[dict]:
        """Complete rows of a split, images as encoded bytes, in the order in which they are written."""
        if config == "general_med":
            for row in self.corpus.general_med(split, size=self.options.image_size):
                image = {"bytes": encode_image(row["image"]), "path": f"{row['id'].split('/')[1]}.jpg"}
                yield {**{key: value for key, value in row.items() if key != "held_out"}, "image": image}
            return
        for row in self.config_rows(config):
            study = row["id"].split("/")[2]
            angle = row["view_angle"]
            image = {"bytes": self._image(row["id"], angle), "path": f"{study}{f'_{angle:+.0f}' if angle else ''}.jpg"}
            yield {**{key: value for key, value in row.items() if key != "held_out"}, "image": image}

    def render_all(self, configs: tuple[str, ...] = CONFIGS) -> None:
        """Render every image the configurations need, so that [`examples`] has them at hand."""
        wanted: dict[str, set[float]] = {}
        for config in configs:
            for row in self.config_rows(config) if config != "general_med" else ():
                wanted.setdefault("/".join(row["id"].split("/")[:3]), set()).add(row["view_angle"])
        self._images.update(self.render({path: tuple(sorted(angles)) for path, angles in wanted.items()}))

    def render(self, views: dict[str, tuple[float, ...]]) -> dict[tuple[str, float], bytes]:
        """Render images in parallel, one patient at a time.

        Args:
            views (`dict[str, tuple[float, ...]]`): Address of a study to the angles wanted, in degrees.

        Returns:
            `dict`: (study key, angle) to the encoded image.
        """
        by_patient: dict[str, list[tuple[str, float]]] = {}
        for path, angles in views.items():
            _, patient, study = path.split("/")
            by_patient.setdefault(patient, []).extend((study, angle) for angle in angles)
        jobs = [(self.options, patient, tuple(wanted)) for patient, wanted in sorted(by_patient.items())]
        images: dict[tuple[str, float], bytes] = {}
        with tqdm(total=sum(len(job[2]) for job in jobs), desc="rendering images", unit="image") as bar:
            for done in self._map(jobs):
                images |= done
                bar.update(len(done))
        return images

    def _map(self, jobs: list[tuple]) -> Iterator[dict]:
        if self.workers == 1:
            yield from map(_render_patient, jobs)
            return
        # spawn: forking a process that has run torch threads can hang.
        context, arguments = get_context("spawn"), (os.getpid(), 1)
        count = min(self.workers, len(jobs))
        with ProcessPoolExecutor(count, mp_context=context, initializer=start_worker, initargs=arguments) as pool:
            yield from pool.map(_render_patient, jobs)

    def _image(self, row_id: str, angle: float) -> bytes:
        _, patient, study = row_id.split("/")[:3]
        if (study, angle) not in self._images:
            self._images |= _render_patient((self.options, patient, ((study, angle),)), self.corpus)
        return self._images[study, angle]

    def _angle(self, row: dict) -> float:
        study = "/".join(row["id"].split("/")[:3])
        return REPHRASE_ANGLES[stable_number(self.options.seed, study, "angle") % len(REPHRASE_ANGLES)]


def check_config(config: str) -> None:
    """Raise a `UserError` that lists the valid names unless `config` is a configuration."""
    if config not in CONFIGS:
        raise UserError(f"configuration {config!r} does not exist; choose from {', '.join(CONFIGS)}")


def encode_image(image: Image.Image) -> bytes:
    """The image as JPEG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def _render_patient(job: tuple, corpus=None) -> dict[tuple[str, float], bytes]:
    options, patient, views = job
    corpus = corpus or get_corpus(options.corpus)(options.counts, options.seed)
    return {
        (study, angle): encode_image(corpus.image(patient, study, view_angle=angle, size=options.image_size))
        for study, angle in views
    }
