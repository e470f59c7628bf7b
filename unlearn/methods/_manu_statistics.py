"""Running sums over the activations of a model, in one pass over the images, on however many processes."""

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from medforget_dataset.errors import UserError

from ..packing import PackedCollator
from ..processes import processes


Part = Literal["language", "vision"]


class RunningSums:
    """
    Sums over activations of C channels, in float64, on the device of the activations until [`Recorder.run`] ends.
    Their size does not depend on how many activations there are.

    Args:
        channels (`int`):
            C.
        threshold (`float`):
            Size from which an activation counts as one.
        limit (`float`, *optional*):
            Size to which activations are clamped.

    Attributes:
        count (`int`):
            Activations of each channel.
        sums (`torch.Tensor` of shape `(4, C)`):
            Sums of z, |z| and z², and how many |z| exceed the threshold.
    """

    def __init__(self, channels: int, threshold: float, limit: float | None = None):
        self.threshold, self.limit = threshold, limit
        self.count = 0
        self.sums = torch.zeros(4, channels, dtype=torch.float64)

    def add(self, activations: torch.Tensor) -> None:
        """Add activations of shape `(tokens, C)`."""
        z = activations.to(torch.float64, copy=True)
        if self.limit is not None:
            z.clamp_(-self.limit, self.limit)
        # Nothing is read back, so that a GPU does not wait; in place, so that one copy is all there ever is.
        self.sums = self.sums.to(z.device)
        self.count += len(z)
        self.sums[0] += z.sum(0)
        self.sums[1] += z.abs_().sum(0)
        self.sums[3] += (z > self.threshold).sum(0)
        self.sums[2] += z.square_().sum(0)

    @property
    def mean_size(self) -> torch.Tensor:
        """Mean of |z|, of shape `(C,)`."""
        return self.sums[1] / max(self.count, 1)

    @property
    def mean_square(self) -> torch.Tensor:
        """Mean of z², of shape `(C,)`."""
        return self.sums[2] / max(self.count, 1)

    @property
    def variance(self) -> torch.Tensor:
        """Variance of z, of shape `(C,)`, the sum of squares over its count."""
        mean = self.sums[0] / max(self.count, 1)
        return (self.mean_square - mean.square()).clamp(min=0)


class Recorder:
    """
    Adds what modules compute to running sums when they compute it, apart for rows to forget and rows to retain, and
    for rows with their image and without.

    Of the language model the question and answer tokens of the rows are added, of the vision tower all patches of the
    images that carry such rows, once an image.

    Args:
        threshold (`float`):
            As in [`RunningSums`].
        limit (`float`, *optional*):
            As in [`RunningSums`].

    Attributes:
        sums (`dict[tuple[str, bool, bool], RunningSums]`):
            The sums by name, by whether the rows are to be forgotten and by whether they have their image.
    """

    def __init__(self, threshold: float, limit: float | None = None):
        self.threshold, self.limit = threshold, limit
        self.sums: dict[tuple[str, bool, bool], RunningSums] = {}
        self._watched: list[tuple[str, Part, nn.Linear, bool]] = []
        self._tokens: dict[bool, torch.Tensor] = {}  # Of the current pass, for each kind of row that it holds.
        self._with_image = True

    def watch(self, name: str, part: Part, module: nn.Linear, *, output: bool) -> None:
        """
        Add what goes into a module, or what comes out of it.

        Args:
            name (`str`):
                Name of the sums. Modules watched under one name share them.
            part (`"language"` or `"vision"`):
                Where the module is.
            module (`torch.nn.Linear`):
                The module.
            output (`bool`):
                Whether to add its output rather than its input.
        """
        channels = module.out_features if output else module.in_features
        for key in itertools.product([name], (True, False), (True, False)):
            self.sums.setdefault(key, RunningSums(channels, self.threshold, self.limit))
        self._watched.append((name, part, module, output))

    @torch.no_grad()
    def run(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        grouped: datasets.Dataset,
        forward: Callable[[dict[str, torch.Tensor], bool], Any],
        chosen: set[str] | None = None,
    ) -> None:
        """
        Pass every image through the model twice with all its rows, with the image and without it. Each process takes
        its share of the images; afterwards all have the sums over all of them, on the CPU.

        Args:
            model ([`~transformers.PreTrainedModel`]):
                Model that the watched modules are of.
            processor ([`~transformers.ProcessorMixin`]):
                Its processor.
            grouped ([`~datasets.Dataset`]):
                Examples of [`~unlearn.grouping.group_by_image`].
            forward (`Callable`):
                Given a packed batch of one image on the model's device, and whether it holds the image, runs the
                watched modules.
            chosen (`set[str]`, *optional*):
                Ids of the rows to use. All by default.

        Raises:
            UserError: If there are no rows to forget or no rows to retain.
        """
        images = [i for i, rows in enumerate(rows_by_image(grouped)) if chosen is None or chosen & rows.keys()]
        # The second pass wants other pixels, and no image comes again: keeping them would only take memory.
        collators = [PackedCollator(processor, with_image=with_image, cache_bytes=0) for with_image in (True, False)]
        state = processes()
        share = images[state.process_index :: state.num_processes]
        was_training = model.training
        model.eval()
        with ExitStack() as hooks:
            for watched in self._watched:
                hooks.enter_context(self._hook(*watched))
            for index in tqdm(share, desc="manu", unit="image", disable=not state.is_main_process):
                # One image at a time: all patches then belong to the same rows.
                example = grouped[index]
                rows = [row for row in example["rows"] if chosen is None or row["id"] in chosen]
                for collator in collators:
                    batch = collator([{**example, "rows": rows}])
                    self._tokens = {k: tokens.to(model.device) for k, tokens in _tokens_by_kind(batch).items()}
                    self._with_image = collator.with_image
                    forward({name: value.to(model.device) for name, value in batch.items()}, collator.with_image)
        model.train(was_training)
        self._gather(state)

    def _hook(self, name: str, part: Part, module: nn.Linear, output: bool) -> Any:
        def add(_: nn.Module, inputs: tuple[torch.Tensor, ...], outputs: torch.Tensor) -> None:
            z = (outputs if output else inputs[0]).flatten(0, -2)  # (tokens, C)
            for forget, tokens in self._tokens.items():
                self.sums[name, forget, self._with_image].add(z if part == "vision" else z[tokens.to(z.device)])

        return module.register_forward_hook(add)

    def _gather(self, state: PartialState) -> None:
        """Add up the sums of all processes, in one exchange, and move them to the CPU."""
        device = state.device if state.num_processes > 1 else torch.device("cpu")
        parts = list(self.sums.values())
        counts = torch.tensor([part.count for part in parts], dtype=torch.float64, device=device)
        flat = torch.cat([*(part.sums.to(device).flatten() for part in parts), counts])
        *sums, counts = reduce(flat, "sum").cpu().split([*(part.sums.numel() for part in parts), len(parts)])
        for part, total, count in zip(parts, sums, counts.tolist(), strict=True):
            part.sums, part.count = total.view_as(part.sums), int(count)


def rows_by_image(grouped: datasets.Dataset) -> list[dict[str, bool]]:
    """
    For every image, its rows' ids and whether each is to be forgotten.

    Raises:
        UserError: If there are no rows of one of the two kinds.
    """
    images = [{row["id"]: row["forget"] for row in example["rows"]} for example in grouped.select_columns(["rows"])]
    kinds = {forget for rows in images for forget in rows.values()}
    for kind, forget in (("forget", True), ("retain", False)):
        if forget not in kinds:
            raise UserError(f"manu compares rows to forget with rows to retain, and there are no {kind} rows")
    return images


def gated_mlps(model: nn.Module) -> dict[str, Any]:
    """The SwiGLU MLPs of the language model and of the vision tower, by name, from the first layer to the last."""
    parts = ("gate_proj", "up_proj", "down_proj")
    return {name: module for name, module in model.named_modules() if all(hasattr(module, part) for part in parts)}


def part_of(name: str) -> Part:
    """
    Where the module with a name is.

    >>> part_of("model.visual.blocks.0.mlp")
    'vision'
    """
    return "vision" if "visual" in name.split(".") else "language"


def _tokens_by_kind(batch: dict[str, torch.Tensor]) -> dict[bool, torch.Tensor]:
    """Positions of the tokens of rows to forget and of rows to retain, of the kinds that the batch holds."""
    rows = batch["row_index"].flatten()  # (L,)
    is_row, is_forget = rows >= 0, batch["forget"][rows]
    kinds = {True: (is_row & is_forget).nonzero()[:, 0], False: (is_row & ~is_forget).nonzero()[:, 0]}
    return {forget: tokens for forget, tokens in kinds.items() if len(tokens)}
