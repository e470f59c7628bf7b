"""The benchmark as rows: hierarchy, questions and partition put together, images rendered when they are needed."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from .build_log import BuildLog
from .corpora import CorpusProtocol, get_corpus
from .errors import UserError
from .general_med import general_med_rows
from .hierarchy import LEVELS, StudyNode, stable_number, walk_studies
from .images import fit_square
from .options import BuildOptions
from .partition import forget_ids
from .processes import available_cores, start_worker
from .questions import rephrase_row, study_rows, template_questions, with_names
from .questions.llm import CONCURRENCY, check_llm, llm_questions
from .svdrr import SvDrr
from .views import turn_in_plane


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


class Benchmark:
    """All rows of all configurations.

    Args:
        options ([`~medforget_dataset.options.BuildOptions`]): What to build.
        workers (`int`, *optional*): Processes that render images, by default one a CPU core. The rows and the images
            do not depend on it.
        log ([`~medforget_dataset.build_log.BuildLog`], *optional*): Told of every fault and oddity of the sources.
        concurrency (`int`, *optional*, defaults to `8`): Requests to a language model in flight. No row depends on it.
    """

    def __init__(
        self,
        options: BuildOptions,
        workers: int | None = None,
        log: BuildLog | None = None,
        concurrency: int = CONCURRENCY,
    ):
        self.options, self.log, self.concurrency = options, log or BuildLog(options.on_error), concurrency
        self.workers = available_cores() if workers is None else workers
        if self.workers < 1:
            raise UserError(f"--workers {workers}: must be at least 1")
        if concurrency < 1:
            raise UserError(f"--concurrency {concurrency}: must be at least 1")
        self.corpus = get_corpus(options.corpus)(options, self.log)
        if options.questions == "llm":
            check_llm(options, restricted=self.corpus.restricted)
        by_svdrr = options.views == "svdrr"
        self.svdrr = SvDrr(Path(options.svdrr), Path(options.svdrr_model)) if by_svdrr else None
        self._images: dict[tuple[str, float], bytes] = {}

    @cached_property
    def nodes(self) -> list[StudyNode]:
        """All studies, in order of their addresses."""
        return list(walk_studies(self.corpus.institutions()))

    @cached_property
    def rows(self) -> list[dict]:
        """The rows of `finetune` without their images, sorted so that rows of one image are adjacent."""
        options = self.options
        image = self.corpus.image_noun
        questions = template_questions(self.nodes, options.seed, rendered=not self.corpus.reads_files, image=image)
        if options.questions == "llm":
            model: dict[str, Any] = {"restricted": self.corpus.restricted, "concurrency": self.concurrency}
            questions = llm_questions(self.nodes, options, templates=questions, image=image, log=self.log, **model)
        shared: dict[str, Any] = {
            "image": image,
            "seed": self.options.seed,
            "restricted": self.corpus.restricted,
            "source": self.corpus.name,
        }
        rows = [row for node in self.nodes for row in study_rows(node, questions, **shared)]
        forgotten = set().union(*(self._forget_ids(level, rows) for level in LEVELS))
        return [with_names(row, options.seed) if _may_name(row, forgotten) else row for row in rows]

    def forgotten(self, level: str) -> set[str]:
        """Ids of the rows forgotten at a level."""
        return self._forget_ids(level, self.rows)

    def _forget_ids(self, level: str, rows: list[dict]) -> set[str]:
        options = self.options
        return forget_ids(level, rows, self.corpus.institutions(), selection=options.selection, seed=options.seed)

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
        seed, method = self.options.seed, self.view_method
        return [rephrase_row(row, view_angle=self._angle(row), view_method=method, seed=seed) for row in rows]

    @property
    def view_method(self) -> str:
        """How turned views are made: `"projection"`, `"geometric"` or `"svdrr"`."""
        return self.corpus.views if self.options.views == "auto" else self.options.views

    def examples(self, config: str, split: str) -> Iterator[dict]:
        """Complete rows of a split, images as encoded bytes, in the order in which they are written."""
        if config == "general_med":
            # The mark holds for the folder as a whole: nobody has to tell the shareable part of it from the rest.
            mark = {"restricted": self.corpus.restricted}
            for row in general_med_rows(split, self.options, self.log):
                image = {"bytes": encode_image(row["image"]), "path": f"{row['id'].split('/')[1]}.jpg"}
                yield {**{key: value for key, value in row.items() if key != "held_out"}, **mark, "image": image}
            return
        rows = self.config_rows(config)
        if self.svdrr:  # all at once: each call loads the model
            self._images |= self._imagine(self._missing(rows), self.svdrr)
        for row in rows:
            study = row["id"].split("/")[2]
            angle = row["view_angle"]
            image = {"bytes": self._image(row["id"], angle), "path": f"{study}{f'_{angle:+.0f}' if angle else ''}.jpg"}
            yield {**{key: value for key, value in row.items() if key != "held_out"}, "image": image}

    def render_all(self, configs: tuple[str, ...] = CONFIGS) -> None:
        """Render every image the configurations need, so that [`examples`] has them at hand."""
        if "general_med" in configs:
            # Whatever is wrong with its source shows before the rendering, not after it.
            general_med_rows("test", self.options, self.log)
        rows = [row for config in configs if config != "general_med" for row in self.config_rows(config)]
        self._images |= self.render(self._missing(rows))

    def _missing(self, rows: list[dict]) -> dict[str, tuple[float, ...]]:
        """Address of a study to its angles, for the images of these rows that are not yet there."""
        wanted: dict[str, set[float]] = {}
        for row in rows:
            path = _study_path(row)
            if (path.split("/")[2], row["view_angle"]) not in self._images:
                wanted.setdefault(path, set()).add(row["view_angle"])
        return {path: tuple(sorted(angles)) for path, angles in wanted.items()}

    def render(self, views: dict[str, tuple[float, ...]]) -> dict[tuple[str, float], bytes]:
        """Render images in parallel, one patient at a time; turned ones by SV-DRR where that is asked for.

        Args:
            views (`dict[str, tuple[float, ...]]`): Address of a study to the angles wanted, in degrees.

        Returns:
            `dict`: (study key, angle) to the encoded image.
        """
        if self.svdrr is None:
            return self._render(views, self.options.image_size)
        upright: dict[str, tuple[float, ...]] = {path: (0.0,) for path, angles in views.items() if 0.0 in angles}
        images = self._render(upright, self.options.image_size) if upright else {}
        return images | self._imagine(views, self.svdrr)

    def _render(
        self, views: dict[str, tuple[float, ...]], size: int, kind: str = "JPEG"
    ) -> dict[tuple[str, float], bytes]:
        by_patient: dict[str, list[tuple[str, float]]] = {}
        for path, angles in views.items():
            _, patient, study = path.split("/")
            by_patient.setdefault(patient, []).extend((study, angle) for angle in angles)
        jobs = [(patient, tuple(wanted)) for patient, wanted in sorted(by_patient.items())]
        images: dict[tuple[str, float], bytes] = {}
        with tqdm(total=sum(len(wanted) for _, wanted in jobs), desc="rendering images", unit="image") as bar:
            for done in self._map(jobs, size, kind):
                images |= done
                bar.update(len(done))
        return images

    def _imagine(self, views: dict[str, tuple[float, ...]], svdrr: SvDrr) -> dict[tuple[str, float], bytes]:
        """The turned ones of these views, made from the unturned images in the model's own resolution."""
        wanted = {(path.split("/")[2], angle): path for path, angles in views.items() for angle in angles if angle}
        if not wanted:
            return {}
        inputs = self._render(dict.fromkeys(wanted.values(), (0.0,)), svdrr.size, kind="PNG")
        names = {f"{study}{angle:+g}": (study, angle) for study, angle in wanted}
        upright = {name: Image.open(io.BytesIO(inputs[study, 0.0])) for name, (study, _) in names.items()}
        turned = svdrr.turn(upright, {name: angle for name, (_, angle) in names.items()})
        size = self.options.image_size
        return {names[name]: encode_image(fit_square(image, size)) for name, image in turned.items()}

    def _map(self, jobs: list[tuple], size: int, kind: str) -> Iterator[dict]:
        render = partial(_render_patient, self.corpus, self.view_method, size, kind)
        if self.workers == 1:
            yield from map(render, jobs)
            return
        # spawn: forking a process that has run torch threads can hang.
        context, arguments = get_context("spawn"), (os.getpid(), 1)
        count = min(self.workers, len(jobs))
        with ProcessPoolExecutor(count, mp_context=context, initializer=start_worker, initargs=arguments) as pool:
            yield from pool.map(render, jobs)

    def _image(self, row_id: str, angle: float) -> bytes:
        _, patient, study = row_id.split("/")[:3]
        if (study, angle) not in self._images:
            job, size = (patient, ((study, angle),)), self.options.image_size
            self._images |= _render_patient(self.corpus, self.view_method, size, "JPEG", job)
        return self._images[study, angle]

    def _angle(self, row: dict) -> float:
        return REPHRASE_ANGLES[stable_number(self.options.seed, _study_path(row), "angle") % len(REPHRASE_ANGLES)]


def _study_path(row: dict) -> str:
    """Address of a row's study: institution, patient and study."""
    return "/".join(row["id"].split("/")[:3])


def _may_name(row: dict, forgotten: set[str]) -> bool:
    """Whether training may ask for this section by name: no level forgets the row, nor a name that would be said."""
    said = {row["id"], *(f"{_study_path(row)}/{level}" for level in ("institution", "patient", "study"))}
    return row["task"] == "generation" and not said & forgotten


def check_config(config: str) -> None:
    """Raise a `UserError` that lists the valid names unless `config` is a configuration."""
    if config not in CONFIGS:
        raise UserError(f"configuration {config!r} does not exist; choose from {', '.join(CONFIGS)}")


def encode_image(image: Image.Image, kind: str = "JPEG") -> bytes:
    """The image as JPEG bytes, or without loss as `"PNG"`."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind, quality=JPEG_QUALITY)
    return buffer.getvalue()


def _render_patient(
    corpus: CorpusProtocol, method: str, size: int, kind: str, job: tuple[str, tuple[tuple[str, float], ...]]
) -> dict[tuple[str, float], bytes]:
    patient, views = job
    images = {}
    for study, angle in views:
        if angle and method == "geometric":
            image = turn_in_plane(corpus.image(patient, study, size=size), angle)
        else:
            image = corpus.image(patient, study, view_angle=angle, size=size)
        images[study, angle] = encode_image(image, kind)
    return images
