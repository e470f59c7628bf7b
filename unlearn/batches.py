"""Which images each step sees, in which batches, on however many processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class Batches(Sampler[list[int]], ABC):
    """
    Batches of images for all processes of a run.

    A step is a list of images, cut into as many batches as there are processes times batches accumulated, one after
    another; process p takes every batch whose number leaves p when divided by their count, as accelerate deals them
    out. A step therefore sees the same images whether they come in one batch, in several, or on several processes.
    The order depends on the seed and the epoch only, so that a run that was stopped can go on.

    Args:
        parts (`int`):
            Batches a step is cut into: processes times `gradient_accumulation_steps`.
        seed (`int`):
            Seed of the order.
    """

    def __init__(self, *, parts: int, seed: int):
        self.parts, self.seed = parts, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (`int`, from 0)."""
        self.epoch = epoch

    @abstractmethod
    def steps(self) -> Iterator[list[int]]:
        """The images of each step of the epoch."""

    def __iter__(self) -> Iterator[list[int]]:
        for images in self.steps():
            yield from _cut(images, self.parts)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)


class ImageBatches(Batches):
    """
    Every image once an epoch. The last step has what is left.

    Args:
        count (`int`):
            Images.
        batch_size (`int`):
            Images in a batch.
        **others:
            As in [`Batches`].
    """

    def __init__(self, count: int, batch_size: int, *, parts: int, seed: int):
        super().__init__(parts=parts, seed=seed)
        self.count, self.per_step = count, batch_size * parts

    def steps(self) -> Iterator[list[int]]:
        order = torch.randperm(self.count, generator=self._generator()).tolist()
        for start in range(0, self.count, self.per_step):
            yield order[start : start + self.per_step]


class RehearsalBatches(Batches):
    """
    Steps of new images, and after every few of them one step of images to rehearse. Every new image comes once an
    epoch.

    Args:
        new (`int`):
            Images 0 to `new - 1` are new, the others are rehearsed.
        total (`int`):
            All images.
        batch_size (`int`):
            New images in a batch.
        rehearsal_batch_size (`int`):
            Rehearsed images in a batch.
        every (`int`):
            A step of rehearsal follows so many steps of new images.
        **others:
            As in [`Batches`].
    """

    def __init__(
        self,
        new: int,
        total: int,
        *,
        batch_size: int,
        rehearsal_batch_size: int,
        every: int,
        parts: int = 1,
        seed: int,
    ):
        super().__init__(parts=parts, seed=seed)
        self.new, self.total, self.every = new, total, every
        self.per_step, self.per_rehearsal = batch_size * parts, rehearsal_batch_size * parts

    def steps(self) -> Iterator[list[int]]:
        generator = self._generator()
        new = torch.randperm(self.new, generator=generator).tolist()
        old = (self.new + torch.randperm(self.total - self.new, generator=generator)).tolist()
        for number, start in enumerate(range(0, len(new), self.per_step), start=1):
            yield new[start : start + self.per_step]
            if old and number % self.every == 0:
                yield old[: self.per_rehearsal]
                old = old[self.per_rehearsal :] + old[: self.per_rehearsal]


class MixedBatches(Batches):
    """
    Every batch has as many images with rows to forget, and as many without, as asked.

    An epoch passes once over the images with rows to forget; the last step is filled up from the first ones of the
    pass. Images without are drawn in passes of their own. Where there are none of one kind, a batch has images of the
    other alone.

    Args:
        has_forget (`Sequence[bool]`):
            For every image, whether it has rows to forget.
        forget_per_batch (`int`):
            Images with such rows in a batch.
        retain_per_batch (`int`):
            Images without in a batch.
        **others:
            As in [`Batches`].
    """

    def __init__(
        self,
        has_forget: Sequence[bool],
        forget_per_batch: int,
        retain_per_batch: int,
        *,
        parts: int = 1,
        seed: int,
    ):
        super().__init__(parts=parts, seed=seed)
        self.forget = [i for i, flag in enumerate(has_forget) if flag]
        self.retain = [i for i, flag in enumerate(has_forget) if not flag]
        self.size = forget_per_batch + retain_per_batch
        self.forget_per_batch = 0 if not self.forget else forget_per_batch if self.retain else self.size
        self.retain_per_batch = self.size - self.forget_per_batch

    def steps(self) -> Iterator[list[int]]:
        generator = self._generator()
        forget = _passes(self.forget, generator) if self.forget_per_batch else iter(())
        retain = _passes(self.retain, generator) if self.retain_per_batch else iter(())
        leading, size = (
            (self.forget, self.forget_per_batch) if self.forget_per_batch else (self.retain, self.retain_per_batch)
        )
        for _ in range(-(-len(leading) // (size * self.parts))):
            step = []
            for _ in range(self.parts):
                step += [next(forget) for _ in range(self.forget_per_batch)]
                step += [next(retain) for _ in range(self.retain_per_batch)]
            yield step


class SequentialBatches(Batches):
    """
    A pass over the images with rows to forget, then one over those with rows to retain, as MLLMU-Bench does.

    Args:
        has_forget (`Sequence[bool]`):
            For every image, whether its rows are to be forgotten. It has rows of one kind only.
        batch_size (`int`):
            Images in a batch.
        **others:
            As in [`Batches`].
    """

    def __init__(self, has_forget: Sequence[bool], batch_size: int, *, parts: int = 1, seed: int):
        super().__init__(parts=parts, seed=seed)
        self.kinds = [[i for i, flag in enumerate(has_forget) if flag == kind] for kind in (True, False)]
        self.per_step = batch_size * parts

    def steps(self) -> Iterator[list[int]]:
        generator = self._generator()
        for images in filter(None, self.kinds):
            order = [images[i] for i in torch.randperm(len(images), generator=generator).tolist()]
            for start in range(0, len(order), self.per_step):
                yield order[start : start + self.per_step]


def _cut(images: list[int], parts: int) -> Iterator[list[int]]:
    """Cut a step into parts of nearly equal size. Where it has fewer images than parts, its first ones come again."""
    images = [images[i % len(images)] for i in range(max(len(images), parts))]
    for i in range(parts):
        yield images[len(images) * i // parts : len(images) * (i + 1) // parts]


def _passes(items: Sequence[int], generator: torch.Generator) -> Iterator[int]:
    """Shuffled passes over the items, without end."""
    while True:
        yield from (items[i] for i in torch.randperm(len(items), generator=generator).tolist())
