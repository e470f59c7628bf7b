"""Image-packed sequences: all rows of an image share one prompt prefix.

A packed sequence is `[prefix][question 1, answer 1][question 2, answer 2]...`, where the prefix is the system text and
the image. Each pair attends to the prefix and to itself only, and its positions start where the prefix ends, so that
log-probabilities and gradients equal those of separate rows while the image is encoded and attended once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import datasets
import torch
from PIL import Image
from tqdm import tqdm
from transformers import ProcessorMixin

from medforget_dataset.errors import UserError

from .pixels import PixelCache


if TYPE_CHECKING:
    from .config import FineTuneConfig

IGNORED = -100
# What `row_index` holds for tokens that belong to no row.
PREFIX, PADDING = -1, -2
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"


class RowCollator:
    """
    One padded sequence per question, with positions left to the model: the ordinary way, which packing must equal.

    Args:
        processor ([`~transformers.ProcessorMixin`]):
            Processor of a Qwen2.5-VL checkpoint.
        redraw_wording (`bool`, *optional*, defaults to `False`):
            Draw each row's question from its `training_phrasings` anew every epoch.
        views (`Mapping[str, Sequence[PIL.Image.Image]]` or `Callable`, *optional*):
            Other images of the same study. A mapping gives for an image key all its views, the original among them,
            of which one is drawn every epoch; a key that it lacks keeps its image. A function takes `(key, epoch)`
            and returns an image, or `None` for the original.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws. A draw depends on the seed, the epoch and the row or image only, not on the order.
        max_length (`int`, *optional*):
            Longest sequence in tokens. Longer ones are refused, never cut.
        with_image (`bool`, *optional*, defaults to `True`):
            Whether the prompt holds the image. Without it, the prompt is the same less its vision tokens.
        cache_bytes (`int`, *optional*, defaults to 1 GiB):
            Bound on the processed images kept for the next epoch.

    Raises:
        UserError: If the chat template does not place the image as Qwen2.5-VL's does. From a call: if an image does
            not decode, or a sequence is longer than `max_length`.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        *,
        redraw_wording: bool = False,
        views: Mapping[str, Sequence[Image.Image]] | Callable[[str, int], Image.Image | None] | None = None,
        seed: int = 0,
        max_length: int | None = None,
        with_image: bool = True,
        cache_bytes: int = 1 << 30,
    ):
        self.processor: Any = processor  # Its image token is not in the type of the base class.
        self.tokenizer = processor.tokenizer
        self.redraw_wording = redraw_wording
        self.views = views
        self.seed = seed
        self.epoch = 0
        self.max_length = max_length
        self.with_image = with_image
        self.reference_log_probs: Mapping[str, torch.Tensor] | None = None
        self._pixels = PixelCache(processor, cache_bytes)
        self._prefixes: dict[tuple[int, int, int], tuple[list[int], torch.Tensor]] = {}
        self._prompt_ids: dict[str, list[int]] = {}
        self._answer_ids: dict[str, list[int]] = {}
        self._merge = processor.image_processor.merge_size
        self._before_image, after = self._around_image("")
        if not (self._before_image.endswith(VISION_START) and after.startswith(VISION_END)):
            raise UserError(
                f"the chat template of {type(processor).__name__} does not place an image between {VISION_START} and "
                f"{VISION_END}; MedForget trains Qwen2.5-VL models"
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose the wordings and views of this epoch (`int`, from 0)."""
        self.epoch = epoch

    def check(self, examples: datasets.Dataset, *, quiet: bool = False) -> None:
        """
        Find what calls would stumble over, before training starts: every image is decoded, and every sequence is
        counted, with the longest of a row's wordings where they are drawn.

        Args:
            examples ([`~datasets.Dataset`]):
                Examples of [`group_by_image`].
            quiet (`bool`, *optional*, defaults to `False`):
                No progress bar.

        Raises:
            UserError: If an image does not decode, or a sequence is longer than `max_length`. The message names it.
        """
        for example in tqdm(examples, desc="images", disable=quiet):
            _, grid = self._pixels.get((example["key"], None), example["image"])
            prefix, _ = self._prefix(grid)
            self._check_lengths(example, len(prefix), [self._longest(row) for row in example["rows"]])

    def _longest(self, row: dict[str, Any]) -> int:
        questions = [row["question"], *(row["training_phrasings"] if self.redraw_wording else ())]
        return max(sum(map(len, self._encode_row(question, row["answer"]))) for question in questions)

    def _check_lengths(self, example: dict[str, Any], prefix: int, rows: list[int]) -> None:
        for row, tokens in zip(example["rows"], rows, strict=True):
            self._check_length(row["id"], prefix + tokens)

    def encode_with(self, encode: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        """Put `encode(pixels, grid)` in place of an image's pixels, as [`~unlearn.vision_cache.VisionCache`] does."""
        self._pixels.encode_with(encode)

    @property
    def is_static(self) -> bool:
        """Whether a row is the same in every epoch: its wording and its view are not drawn."""
        return not self.redraw_wording and self.views is None

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Args:
            examples (`Sequence[dict]`):
                Examples of [`group_by_image`].

        Returns:
            `dict[str, torch.Tensor]`: The model's inputs, and `labels` of shape `(B, L)` (-100 but on answers),
            `row_index` of shape `(B, L)` (row of each token in the batch, -1 for none) and `forget` of shape `(R,)`.
            If [`RowCollator.reference_log_probs`] is set, by row id, `reference_log_probs` of shape `(N,)`, nats, for
            all answer tokens in order, 0 for rows that it lacks.
        """
        sequences, pixels, grids, forget = [], [], [], []
        for example in examples:
            pixel_values, grid = self._image(example)
            prefix, _ = self._prefix(grid)
            for row in example["rows"]:
                prompt, answer = self._row(row)
                self._check_length(row["id"], len(prefix) + len(prompt) + len(answer))
                sequences.append((prefix + prompt, answer))
                pixels.append(pixel_values)
                grids.append(grid)
                forget.append(row["forget"])
        shape = (len(sequences), max(len(prompt) + len(answer) for prompt, answer in sequences))
        input_ids = torch.full(shape, self.tokenizer.pad_token_id)  # (B, L), B = R
        labels = torch.full(shape, IGNORED)
        row_index = torch.full(shape, -1)
        for i, (prompt, answer) in enumerate(sequences):
            end = len(prompt) + len(answer)
            input_ids[i, :end] = torch.tensor(prompt + answer)
            labels[i, len(prompt) : end] = torch.tensor(answer)
            row_index[i, :end] = i
        batch = {
            "input_ids": input_ids,
            "attention_mask": (row_index >= 0).long(),
            "mm_token_type_ids": (input_ids == self.processor.image_token_id).int(),
            "labels": labels,
            "row_index": row_index,
            "forget": torch.tensor(forget),
        }
        return batch | self._vision_inputs(pixels, grids) | self._references(examples)

    def _references(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if self.reference_log_probs is None:
            return {}
        known = self.reference_log_probs
        rows = [row for example in examples for row in example["rows"]]
        values = [known[row["id"]] if row["id"] in known else torch.zeros(len(self._row(row)[1])) for row in rows]
        return {"reference_log_probs": torch.cat(values)}

    def _vision_inputs(self, pixels: list[torch.Tensor], grids: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        if not self.with_image:
            return {}
        return {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.stack(grids)}  # (patches, C), (images, 3)

    def _around_image(self, question: str) -> tuple[str, str]:
        """The prompt's text before the image token and after it."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        before, _, after = text.partition(self.processor.image_token)
        return before, after

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _prefix(self, grid: torch.Tensor) -> tuple[list[int], torch.Tensor]:
        """Token ids up to the end of the image, and their positions of shape `(3, prefix)`."""
        if (key := tuple(grid.tolist())) not in self._prefixes:
            time, height, width = key[0], key[1] // self._merge, key[2] // self._merge
            before = self._encode(self._before_image)
            if self.with_image:
                image = [self.processor.image_token_id] * (time * height * width)
                after = self._encode(VISION_END)
                ids = before + image + after
                start = len(before)
                # Time, height and width of each image token; text goes on after the largest of them.
                patches = torch.cartesian_prod(*(torch.arange(n) for n in (time, height, width))).view(-1, 3).T + start
                end = start + max(height, width)
                text_before = torch.arange(start).expand(3, -1)
                text_after = torch.arange(end, end + len(after)).expand(3, -1)
                positions = torch.cat([text_before, patches, text_after], dim=1)  # (3, prefix)
            else:
                ids = before[:-1]
                positions = torch.arange(len(ids)).expand(3, -1)
            self._prefixes[key] = ids, positions
        return self._prefixes[key]

    def _row(self, row: dict[str, Any]) -> tuple[list[int], list[int]]:
        """Token ids of a row's prompt after the prefix, and of its answer with the end token."""
        question = row["question"]
        if self.redraw_wording and row["training_phrasings"]:
            question = self._draw(row["id"], row["training_phrasings"])
        return self._encode_row(question, row["answer"])

    def _encode_row(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        if question not in self._prompt_ids:
            # A special token parts the two texts, so that encoding them apart gives the ids of the whole.
            _, after = self._around_image(question)
            self._prompt_ids[question] = self._encode(after.removeprefix(VISION_END))
        if answer not in self._answer_ids:
            self._answer_ids[answer] = [*self._encode(answer), self.tokenizer.eos_token_id]
        return self._prompt_ids[question], self._answer_ids[answer]

    def _draw(self, name: str, options: Sequence[Any]) -> Any:
        digest = hashlib.blake2b(f"{self.seed}/{self.epoch}/{name}".encode(), digest_size=8).digest()
        return options[int.from_bytes(digest, "big") % len(options)]

    def _image(self, example: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        key = example["key"]
        if callable(self.views):
            if (view := self.views(key, self.epoch)) is not None:
                return self._pixels.process(view)  # A function may never return the same image twice: not kept.
        elif self.views and key in self.views:
            number = self._draw(key, range(len(self.views[key])))
            return self._pixels.get((key, number), self.views[key][number])
        return self._pixels.get((key, None), example["image"])

    def _check_length(self, name: str, tokens: int) -> None:
        if self.max_length is not None and tokens > self.max_length:
            raise UserError(
                f"{name}: {tokens} tokens, more than max_length {self.max_length}; "
                "raise --max-length or use smaller images (--max-pixels); tokens are never cut"
            )


class PackedCollator(RowCollator):
    """
    One sequence per image, holding all its rows. Takes the arguments of [`RowCollator`] and returns the same tensors;
    the rows of a batch are numbered in the same order.

    There is no attention mask in the batch: [`packed_attention_mask`] makes it from `row_index`, which is -1 in the
    prefix and -2 in the padding. Positions of shape `(3, B, L)` start again after the prefix for every row.
    """

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        sequences, pixels, grids, forget = [], [], [], []
        for example in examples:
            pixel_values, grid = self._image(example)
            prefix, prefix_positions = self._prefix(grid)
            rows = [self._row(row) for row in example["rows"]]
            self._check_lengths(example, len(prefix), [len(prompt) + len(answer) for prompt, answer in rows])
            sequences.append((prefix, prefix_positions, rows))
            pixels.append(pixel_values)
            grids.append(grid)
            forget += [row["forget"] for row in example["rows"]]
        batch = self._pack(sequences)
        batch["forget"] = torch.tensor(forget)
        return batch | self._vision_inputs(pixels, grids) | self._references(examples)

    def _check_lengths(self, example: dict[str, Any], prefix: int, rows: list[int]) -> None:
        self._check_length(example["key"], prefix + sum(rows))

    def _pack(self, sequences: list[tuple[list[int], torch.Tensor, list]]) -> dict[str, torch.Tensor]:
        lengths = [len(prefix) + sum(len(p) + len(a) for p, a in rows) for prefix, _, rows in sequences]
        shape = (len(sequences), max(lengths))
        input_ids = torch.full(shape, self.tokenizer.pad_token_id)  # (B, L)
        labels = torch.full(shape, IGNORED)
        row_index = torch.full(shape, PADDING)
        position_ids = torch.zeros((3, *shape), dtype=torch.long)  # (3, B, L)
        number = 0
        for i, (prefix, prefix_positions, rows) in enumerate(sequences):
            ids, targets = list(prefix), [IGNORED] * len(prefix)
            blocks = [len(prefix)]
            for prompt, answer in rows:
                ids += prompt + answer
                targets += [IGNORED] * len(prompt) + answer
                blocks.append(len(prompt) + len(answer))
            input_ids[i, : len(ids)] = torch.tensor(ids)
            labels[i, : len(ids)] = torch.tensor(targets)
            sizes = torch.tensor(blocks[1:])
            row_index[i, : blocks[0]] = PREFIX
            row_index[i, blocks[0] : len(ids)] = torch.arange(number, number + len(rows)).repeat_interleave(sizes)
            starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
            position_ids[:, i, : blocks[0]] = prefix_positions
            position_ids[:, i, blocks[0] : len(ids)] = (
                torch.arange(len(starts)) - starts + prefix_positions[:, -1:] + 1
            )
            number += len(rows)
        return {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "labels": labels,
            "row_index": row_index,
        }


def packed_attention_mask(row_index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """
    Who sees whom in packed sequences: a token sees the prefix, and its own row up to itself.

    Additive, because a boolean mask is silently misread by eager attention. Padding sees itself: softmax over nothing
    is not a number.

    Args:
        row_index (`torch.Tensor` of shape `(B, L)`):
            Row of each token, -1 in the prefix, -2 in the padding.
        dtype (`torch.dtype`):
            Type of the mask.

    Returns:
        `torch.Tensor` of shape `(B, 1, L, L)`: 0 where a token sees another, the lowest number of the type elsewhere.
    """
    keys, queries = row_index[:, None, :], row_index[:, :, None]
    hidden = (keys != queries) & (keys != PREFIX)  # (B, L, L)
    length = row_index.shape[1]
    hidden |= torch.ones(length, length, dtype=torch.bool, device=row_index.device).triu_(diagonal=1)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=row_index.device)
    return mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None]


def make_collator(processor: ProcessorMixin, args: FineTuneConfig, **drawing: Any) -> RowCollator:
    """
    The collator that training arguments ask for.

    Args:
        processor ([`~transformers.ProcessorMixin`]):
            Processor of the model.
        args ([`~unlearn.config.FineTuneConfig`]):
            Training arguments.
        **drawing (`Any`):
            `redraw_wording` and `views` of [`RowCollator`].
    """
    kind = PackedCollator if args.pack_images else RowCollator
    return kind(processor, seed=args.seed, max_length=args.max_length, **drawing)
