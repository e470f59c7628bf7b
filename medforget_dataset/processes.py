"""Worker processes: how many, and that none outlives the process that started it; which process prints."""

from __future__ import annotations

import os
import threading
import time


_POLL_SECONDS = 1.0


def available_cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def start_worker(parent: int, threads: int) -> None:
    """Initializer of a worker process: its share of the cores, and its end when the parent ends, even by SIGKILL.

    Args:
        parent (`int`): Process id of the parent.
        threads (`int`): Threads that torch computes with.
    """
    import torch

    torch.set_num_threads(threads)

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def is_first_process() -> bool:
    """Whether this process is the one that prints, of those that accelerate or torchrun has started, if it has."""
    return int(os.environ.get("RANK", "0")) == 0
