"""Several stages at a time, each in a process of its own."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from medforget_dataset.processes import available_cores, start_worker


if TYPE_CHECKING:
    from .stages import Stage

logger = logging.getLogger(__name__)

# What one stage's settings or data can bring about. Anything else, such as a full disk, would meet the next too.
SURVIVABLE = (ValueError, RuntimeError, MemoryError)

_POLL_SECONDS = 1.0
_PERCENT = re.compile(rb"(\d+)%\|")
_LOG_TAIL_BYTES = 4096


class Workers:
    """Processes that stages run in; they end with the process that started them, however that ends.

    Args:
        logs (`Path`): Folder for what each stage prints.
        jobs (`int`): Processes. Each computes with its share of the CPU cores: two models trained side by side with
            one thread each take less time than one after the other with two.
    """

    def __init__(self, logs: Path, jobs: int):
        self.logs, self.jobs = logs, jobs

    def __enter__(self) -> Workers:
        self.logs.mkdir(exist_ok=True)
        threads = max(1, available_cores() // self.jobs)
        self._pool = ProcessPoolExecutor(
            self.jobs, mp_context=get_context("spawn"), initializer=start_worker, initargs=(os.getpid(), threads)
        )
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            for process in (self._pool._processes or {}).values():
                process.terminate()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def run(
        self,
        stages: Sequence[Stage],
        finished: Callable[[Stage, float], None],
        failed: Callable[[Stage, Exception], set[str]] | None = None,
    ) -> None:
        """Run stages, each when those it reads are done, and show how far each has come.

        Args:
            stages (`Sequence[Stage]`): What to do.
            finished (`Callable`): Told each stage and its duration in seconds.
            failed (`Callable`, *optional*): Told each optional stage that failed, and with what; returns the names of
                the stages that cannot be done for it, itself included.
        """
        waiting, running = list(stages), dict[Future, "Stage"]()
        with tqdm(total=len(stages), desc="stages", unit="stage") as bar, logging_redirect_tqdm():
            while waiting or running:
                blocked = {stage.name for stage in [*waiting, *running.values()]}
                ready = [stage for stage in waiting if not blocked & set(stage.after)]
                for stage in ready[: self.jobs - len(running)]:
                    running[self._pool.submit(_make, stage, self._log(stage))] = stage
                    waiting.remove(stage)
                done, _ = wait(running, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
                for future in done:
                    stage = running.pop(future)
                    error = future.exception()
                    lost = {stage.name}
                    if error:
                        logger.error("%s failed; what it printed is in %s", stage.name, self._log(stage))
                    # A process that died takes all others of its pool with it.
                    survives = stage.optional and not isinstance(error, BrokenExecutor)
                    if failed and survives and isinstance(error, SURVIVABLE):
                        lost = failed(stage, error)
                        waiting = [other for other in waiting if other.name not in lost]
                    else:
                        finished(stage, future.result())
                    bar.update(len(lost))
                bar.set_postfix_str(" · ".join(f"{s.name} {_progress(self._log(s))}" for s in running.values()))

    def _log(self, stage: Stage) -> Path:
        return self.logs / f"{stage.name}.log"


def _progress(log: Path) -> str:
    """How far a stage has come, by the last progress bar in its log."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
            percents = _PERCENT.findall(file.read())
    except FileNotFoundError:
        return ""
    return f"{percents[-1].decode()} %" if percents else ""


def _make(stage: Stage, log: Path) -> float:
    start = time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    with log.open("w") as file:
        # The descriptors, not the Python objects: libraries write to both.
        saved = os.dup(1), os.dup(2)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            stage.make()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, original in zip((1, 2), saved, strict=True):
                os.dup2(original, descriptor)
                os.close(original)
    return time.monotonic() - start
