"""The same study from another angle.

The embedded corpus projects its volume anew. An acquired radiograph has no depth: SV-DRR, a generative model that the
user installs, imagines the view; without it the picture is turned in its plane, which is no other view of the patient,
and every such row says so in its column `view_method`.

Positive angles turn the patient's right front towards the detector, by projection and by SV-DRR alike: seen from above
the head, counter-clockwise. Turned in its plane, a picture goes counter-clockwise as one looks at it.
"""

from __future__ import annotations

from PIL import Image


# What the column `view_method` may say: the image as it was acquired or rendered, or how it was turned.
VIEW_METHODS = ("original", "projection", "geometric", "svdrr")


def turn_in_plane(image: Image.Image, angle: float) -> Image.Image:
    """The picture turned counter-clockwise by `angle` degrees, black where nothing was."""
    return image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=0)
