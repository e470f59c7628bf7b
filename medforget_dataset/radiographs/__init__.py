"""Rendered chest radiographs and labelled CT slices: the images of the embedded corpus.

patient's key ──> anatomy ──> body ──> findings inserted ──> projection ──> response ──> image
"""

from __future__ import annotations

from .findings import Finding
from .render import render, visible_change
from .slices import slice_image, slice_structures


__all__ = ["Finding", "render", "slice_image", "slice_structures", "visible_change"]
