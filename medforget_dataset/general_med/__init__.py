"""The general-medical set: questions that know no institution, patient or study, by which lost skill is noticed."""

from __future__ import annotations

from collections.abc import Iterable

from ..build_log import BuildLog
from ..options import BuildOptions
from .anatomy import anatomy_rows
from .pmc_vqa import pmc_vqa_rows


__all__ = ["general_med_rows"]


def general_med_rows(split: str, options: BuildOptions, log: BuildLog | None = None) -> Iterable[dict]:
    """Rows of a split, each with its `image` as a `PIL.Image.Image`; the splits share no image.

    Sources are read when this is called, images when the rows are gone through.

    Args:
        split (`str`): `"train"` or `"test"`.
        options ([`~medforget_dataset.options.BuildOptions`]): `general_med` says where the questions come from.
        log ([`~medforget_dataset.build_log.BuildLog`], *optional*): Told of every fault and oddity of the sources.

    Raises:
        UserError: The source is not there, lacks something, or has a fault and faults stop the build.
    """
    size, seed = options.image_size, options.seed
    if options.general_med == "anatomy":
        return anatomy_rows(split, size=size, seed=seed)
    log = log or BuildLog(options.on_error)
    return pmc_vqa_rows(split, source=options.general_med, size=size, seed=seed, log=log)
