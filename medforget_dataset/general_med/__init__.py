"""The general-medical set: questions that know no institution, patient or study, by which lost skill is noticed."""

from __future__ import annotations

from ..options import BuildOptions
from .anatomy import anatomy_rows


__all__ = ["general_med_rows"]


def general_med_rows(split: str, options: BuildOptions) -> list[dict]:
    """Rows of a split, each with its `image` as a `PIL.Image.Image`; the splits share no image.

    Args:
        split (`str`): `"train"` or `"test"`.
        options ([`~medforget_dataset.options.BuildOptions`]): `general_med` says where the questions come from.
    """
    return anatomy_rows(split, size=options.image_size, seed=options.seed)
