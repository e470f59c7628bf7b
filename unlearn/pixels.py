"""Images as the model takes them, kept for the next epoch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import datasets
import torch
from PIL import Image
from transformers import ProcessorMixin

from medforget_dataset.errors import UserError


class PixelCache:
    """Output of the image processor, the least recently used dropped first."""

    def __init__(self, processor: ProcessorMixin, max_bytes: int | None):
        self.processor = processor
        self.max_bytes = max_bytes
        self.bytes = 0
        self.encode: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
        self.entries: OrderedDict[tuple[str, int | None], tuple[torch.Tensor, torch.Tensor]] = OrderedDict()

    def get(self, name: tuple[str, int | None], image: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels and grid of the image with this key and view number. `image` is decoded only if they are not kept."""
        if name in self.entries:
            self.entries.move_to_end(name)
            return self.entries[name]
        decoded = _decode(name[0], image)
        try:
            entry = self.entries[name] = self.process(decoded)
        except ValueError as error:
            size = "{} × {}".format(*decoded.size)
            raise UserError(f"{name[0]}: the processor does not take its image of {size} pixels: {error}") from error
        self.bytes += entry[0].nbytes
        while self.max_bytes is not None and self.bytes > self.max_bytes and len(self.entries) > 1:
            self.bytes -= self.entries.popitem(last=False)[1][0].nbytes
        return entry

    def encode_with(self, encode: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        """Keep `encode(pixels, grid)` of every image in place of pixels, from now on."""
        self.encode = encode
        self.max_bytes = None
        self.entries.clear()
        self.bytes = 0

    def process(self, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels of shape `(patches, channels)`, or encoded `(tokens, H)`, and grid (time, height, width) `(3,)`."""
        features = self.processor.image_processor(images=[image.convert("RGB")], return_tensors="pt")
        pixels, grid = features["pixel_values"], features["image_grid_thw"][0]
        return pixels if self.encode is None else self.encode(pixels, grid), grid


def _decode(key: str, stored: Image.Image | dict[str, Any] | None) -> Image.Image:
    if stored is None:
        raise UserError(f"{key}: has no image; build the dataset again")
    if isinstance(stored, Image.Image):
        return stored
    try:
        return datasets.Image().decode_example(stored)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{key}: its image does not decode ({error}); build the dataset again") from error
