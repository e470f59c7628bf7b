"""Measures of what a model still knows, each explained in `docs/metrics.md`.

A checkpoint is asked everything once ([`probe_checkpoint`]); all measures but relearning are computed from what that
wrote. [`summary`] gives them all.
"""

from .probe import SETS, probe_checkpoint, read_probe, read_probe_info
from .records import summary
from .relearning import relearn


__all__ = ["SETS", "probe_checkpoint", "read_probe", "read_probe_info", "relearn", "summary"]
