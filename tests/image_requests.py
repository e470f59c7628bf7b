"""Requests with images, as lm-eval makes them, and a checkpoint to ask: for tests of the model class."""

import numpy as np
from lm_eval.api.instance import Instance
from PIL import Image
from stand_in import make_model, make_rows

from unlearn.checkpoints import save_checkpoint


SIZES = [(56, 56), (84, 56), (56, 112), (140, 84)]
QUESTIONS = [
    "Write the findings.",
    "Name the patient of this image, please.",
    "How large? A) 1 B) 2 C) 3 D) 4",
    "Why?",
]
OPTIONS = ["A", "B", "C", " Small opacity over the left lung, 45 mm.", " heart"]


def make_checkpoint(folder):
    model, processor = make_model(make_rows())
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3)  # answers that differ
    return str(save_checkpoint(folder, model, processor, {}))


def make_images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in SIZES]


def load(kind, checkpoint, batch_size=5, **kwargs):
    return kind(checkpoint, device="cpu", dtype="float32", batch_size=batch_size, **kwargs)


def prompt(model, question):
    return model.apply_chat_template([{"role": "user", "content": f"<image>{question}"}])


def instances(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


def to_generate(model, images, **kwargs):
    arguments = {"max_gen_toks": 12, "do_sample": False, "until": ["mm"]} | kwargs
    return [
        (prompt(model, question), dict(arguments), {"visual": [image.copy()]})
        for question in QUESTIONS
        for image in images
    ]


def to_score(model, images):
    return [
        (prompt(model, question), option, {"visual": [image.copy()]})
        for question in QUESTIONS
        for image in images
        for option in OPTIONS
    ]
