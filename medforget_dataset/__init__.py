"""MedForget's dataset: a hospital as Institution ⊃ Patient ⊃ Study ⊃ Section, asked in image-question-answer rows.

Example:
    >>> from medforget_dataset import CONFIGS
    >>> CONFIGS[:3]
    ('finetune', 'institution_forget', 'institution_retain')
"""

from .benchmark import CONFIGS
from .builder import FEATURES, MedForget
from .errors import UserError
from .hierarchy import LEVELS, TASKS
from .loading import load
from .options import BuildOptions
from .writer import build


__all__ = ["CONFIGS", "FEATURES", "LEVELS", "TASKS", "BuildOptions", "MedForget", "UserError", "build", "load"]
