"""The processes of a run: one, or those that accelerate or torchrun started."""

import torch
from accelerate import PartialState


def is_on_cpu() -> bool:
    """
    Whether there is no accelerator.

    Unless it is told so, accelerate then takes the processes of torchrun for separate runs.
    """
    return not torch.accelerator.is_available()


def processes() -> PartialState:
    """Which of how many processes this is."""
    return PartialState(cpu=is_on_cpu())


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes."""
    return processes().is_main_process
