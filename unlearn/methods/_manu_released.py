"""
MANU as its authors released it: https://github.com/franciscoliu/MANU, `prune/prune_utility.py`,
`prune/activation_collect.py` and `prune/prune_incremental.py`. It is not what their paper says.

The same as there:

- A unit is an output of an MLP matrix, before any gate or activation function, clamped to ±1000. Each matrix is taken
  by itself; the rows of its weights, and its biases, are zeroed.
- Forget rows are compared with retain rows within a modality, images in the vision tower and text without images in
  the language model. With $I_k$ the mean of $|z|$, the standard deviation of $z$ and the root mean square of $z$, the
  score of a unit is $\\sum_k 2 (I_k^f / (I_k^r + 10^{-5}) - 1)$. The share of $|z|$ above a threshold has weight 0
  there, and is left out here.
- The statistics of a matrix are pooled over all layers of its tower: there every layer registers under the names of
  the last three. Only the last three layers are changed, all three in the same units. The α per cent are of the units
  of these three layers, for each modality, rounded down and then up to whole units of all three.
- No more retain rows are used than there are forget rows.

Not the same:

- LLaVA's vision MLPs have the matrices fc1 and fc2; the gate, up and down matrices of Qwen2.5-VL's are in their place.
- There the statistics are taken for each position in a batch, over its rows and all layers, and averaged over
  positions, batches and chunks of ten batches, padding and prompt included. Here they are over all question and answer
  tokens, and over the patches of each image once, so that neither batch size nor padding enters.
- There the text has the person's name in place of "this person". Here a row without its image is as it is.
- There the retain rows are the first of a shuffled order. Here they are those of the first images of one.
"""

import math
import random
from typing import Any

import datasets
import torch
from transformers import PreTrainedModel, ProcessorMixin

from ..answers import model_inputs
from ._manu_statistics import Part, Recorder, RunningSums, gated_mlps, part_of, rows_by_image


MATRICES = ("gate_proj", "up_proj", "down_proj")
LAST_LAYERS = 3
LIMIT = 1e3
WEIGHT = 2.0
EPSILON = 1e-5
_SEED = 0


def zero_units(
    model: PreTrainedModel, processor: ProcessorMixin, grouped: datasets.Dataset, alpha: float
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """
    Zero the output units that the released code zeroes.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model to change.
        processor ([`~transformers.ProcessorMixin`]):
            Its processor.
        grouped ([`~datasets.Dataset`]):
            Examples of [`~unlearn.grouping.group_by_image`].
        alpha (`float`):
            Per cent of the output units of the matrices of the last three layers, of each tower.

    Returns:
        `tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]`: The scores of all units, of shape `(C,)`, and the
        numbers of those zeroed, by name of the matrix.

    Raises:
        UserError: If there are no rows to forget or no rows to retain.
    """
    sums = _unit_sums(model, processor, grouped)
    mlps = gated_mlps(model)
    scores, zeroed = {}, {}
    parts: tuple[Part, ...] = ("language", "vision")
    for part in parts:
        layers = [name for name in mlps if part_of(name) == part][-LAST_LAYERS:]
        pooled = [_score(sums, part, matrix) for matrix in MATRICES]
        allowed = math.floor(sum(map(len, pooled)) * len(layers) * alpha / 100)
        best = torch.cat(pooled).topk(math.ceil(allowed / len(layers))).indices
        is_best = torch.zeros(sum(map(len, pooled)), dtype=torch.bool)
        is_best[best] = True
        for matrix, score, chosen in zip(MATRICES, pooled, is_best.split([len(s) for s in pooled]), strict=True):
            for layer in layers:
                name = f"{layer}.{matrix}"
                scores[name], zeroed[name] = score, chosen.nonzero()[:, 0]
                _zero_rows(getattr(mlps[layer], matrix), zeroed[name])
    return scores, zeroed


def row_sample(grouped: datasets.Dataset) -> set[str]:
    """
    Ids of all rows to forget, and of at most as many rows to retain: those of the first images of an order drawn by a
    fixed seed.

    Raises:
        UserError: If there are no rows to forget or no rows to retain.
    """
    images = rows_by_image(grouped)
    random.Random(_SEED).shuffle(images)
    forget, retain = (
        [name for rows in images for name, is_forget in rows.items() if is_forget == kind] for kind in (True, False)
    )
    return {*forget, *retain[: len(forget)]}


def _unit_sums(
    model: PreTrainedModel, processor: ProcessorMixin, grouped: datasets.Dataset
) -> dict[tuple[str, bool, bool], RunningSums]:
    recorder = Recorder(threshold=0, limit=LIMIT)
    for name, mlp in gated_mlps(model).items():
        for matrix in MATRICES:
            recorder.watch(f"{part_of(name)} {matrix}", part_of(name), getattr(mlp, matrix), output=True)
    tower: Any = next(module for name, module in model.named_modules() if name.endswith("visual"))

    def forward(batch: dict[str, torch.Tensor], with_image: bool) -> None:
        if with_image:
            tower(batch["pixel_values"].to(tower.dtype), grid_thw=batch["image_grid_thw"])
        else:
            model(**model_inputs(model, batch), logits_to_keep=1, use_cache=False)

    recorder.run(model, processor, grouped, forward, chosen=row_sample(grouped))
    return recorder.sums


def _score(sums: dict[tuple[str, bool, bool], RunningSums], part: Part, matrix: str) -> torch.Tensor:
    """Score of each output unit, of shape `(C,)`, float64."""
    of_forget, of_retain = (_importances(sums[f"{part} {matrix}", kind, part == "vision"]) for kind in (True, False))
    return (WEIGHT * (of_forget / (of_retain + EPSILON) - 1)).sum(0)


def _importances(sums: RunningSums) -> torch.Tensor:
    """Mean size, standard deviation and root mean square of each unit, of shape `(3, C)`."""
    unbiased = sums.variance * (sums.count / max(sums.count - 1, 1))
    return torch.stack([sums.mean_size, unbiased.sqrt(), sums.mean_square.sqrt()])


@torch.no_grad()
def _zero_rows(projection: Any, units: torch.Tensor) -> None:
    units = units.to(projection.weight.device)
    projection.weight[units] = 0
    if projection.bias is not None:
        projection.bias[units] = 0
