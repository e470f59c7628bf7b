"""Rows of MedForget's schema made in a moment, and models small enough for tests of the training code."""

import io

import datasets
import numpy as np
from PIL import Image

from medforget_dataset import FEATURES
from unlearn.models import TinyConfig, tiny_model


SMALL = TinyConfig(
    hidden_size=32, intermediate_size=48, heads=2, vision_hidden_size=32, vision_intermediate_size=40, vision_heads=2
)

ORGANS = ("heart", "left lung", "right lung", "aorta", "spine")


def make_rows(patients: int = 3, studies: int = 2, seed: int = 0) -> datasets.Dataset:
    """Nine rows a study: three of identity, and three tasks for each of two sections."""
    rng = np.random.default_rng(seed)
    rows = []
    for patient in range(patients):
        for study in range(patient * studies, (patient + 1) * studies):
            image = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
            encoded = io.BytesIO()
            image.save(encoded, "PNG")
            key = f"inst{patient // 2:02d}/pat{patient:03d}/study{study:03d}"
            shared = {"image": {"bytes": encoded.getvalue(), "path": None}, "patient": f"Patient {patient}"}
            names = {
                "institution": f"Hospital {patient // 2}",
                "patient": f"Ann B. {patient}",
                "study": f"S{study:05d}",
            }
            for level, name in names.items():
                wordings = [f"Which {level} is it?", f"Name the {level} of this image, please."]
                rows.append(_row(f"{key}/{level}", wordings, name, "identity", level, shared))
            for section in ("findings", "impression"):
                organ = ORGANS[rng.integers(len(ORGANS))]
                wordings = [f"Write the {section}.", f"What do the {section} of study {study % 2} say?"]
                text = f"Small opacity over the {organ}, {rng.integers(10, 99)} mm."
                rows.append(_row(f"{key}/{section}/generation", wordings, text, "generation", "section", shared))
                wordings = [f"{section}: opacity over the [blank].", f"Fill in {section}: over the [blank]"]
                rows.append(_row(f"{key}/{section}/cloze", wordings, organ, "cloze", "section", shared))
                wordings = [f"{section}, how large? A) 1 B) 2 C) 3 D) 4", f"Size in {section}? A) 1 B) 2 C) 3 D) 4"]
                letter = "ABCD"[rng.integers(4)]
                rows.append(
                    _row(f"{key}/{section}/classification", wordings, letter, "classification", "section", shared)
                )
    return datasets.Dataset.from_list(rows, features=FEATURES)


def _row(row_id: str, wordings: list[str], answer: str, task: str, level: str, shared: dict) -> dict:
    empty = {name: "" for name, feature in FEATURES.items() if feature == datasets.Value("string")}
    known = {"id": row_id, "question": wordings[0], "answer": answer, "training_phrasings": wordings}
    rest = {"choices": [], "restricted": False, "task": task, "level": level, "view_angle": 0.0}
    return {**empty, **shared, **known, **rest}


def make_model(rows: datasets.Dataset, seed: int = 0):
    """A small untrained model and its processor."""
    texts = [text for name in ("question", "answer") for text in rows[name]]
    return tiny_model(texts, vocab_size=400, seed=seed, config=SMALL)
