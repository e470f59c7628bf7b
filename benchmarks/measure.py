"""What a training loop takes: time by step, peak memory, and the weights it holds."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn


class PeakMemory:
    """
    Peak memory above what was in use when this was made.

    On a CPU, the process' resident memory: freed memory is first given back to the system, then the kernel's
    high-water mark is reset (`/proc/self/clear_refs`), so that loading the model does not count.
    On a GPU, PyTorch's allocations.

    Args:
        device (`str`):
            `"cpu"` or `"cuda"`.
    """

    def __init__(self, device: str):
        self.device = device
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self.before = _resident("VmRSS")

    def bytes_above(self) -> int:
        """The peak so far, less what was in use before."""
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else _resident("VmHWM")
        return peak - self.before


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def synchronise(device: str) -> None:
    """Wait for the device, so that a clock read next sees its work done."""
    if device == "cuda":
        torch.cuda.synchronize()


def weight_shapes(model: nn.Module) -> set[torch.Size]:
    """The shapes of a model's weight matrices."""
    return {parameter.shape for parameter in model.parameters() if parameter.dim() > 1}


def weight_bytes(shapes: set[torch.Size], besides: Iterable[torch.Tensor] = ()) -> int:
    """
    Bytes of all distinct live tensors that have the shape of a weight matrix, however they are held.

    Args:
        shapes (`set[torch.Size]`):
            From [`weight_shapes`].
        besides (`Iterable[torch.Tensor]`, *optional*, defaults to `()`):
            Tensors that are not weights though they have such a shape: an optimizer's state.
    """
    gc.collect()
    not_weights = {tensor.untyped_storage().data_ptr() for tensor in besides}
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.is_floating_point() and thing.shape in shapes:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            if thing.is_leaf and thing.grad is not None:
                not_weights.add(thing.grad.untyped_storage().data_ptr())
    return sum(size for address, size in storages.items() if address not in not_weights)


class Timer:
    """A clock that first waits for the device, and starts again at every reading."""

    def __init__(self, device: str):
        self.device = device
        self.restart()

    def restart(self) -> None:
        """Start again."""
        synchronise(self.device)
        self.last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last reading."""
        synchronise(self.device)
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        return seconds
