"""Measurements of this project against its peers, side by side in one run."""

import os


# Before any library is imported, here and in the processes that are started.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
