"""lm-eval's `hf-multimodal` for Qwen2.5-VL, in which what questions about an image share is computed once.

A prompt is the text up to and with the image, and the question after it. The first part is passed through the model
once for all questions about the image; its keys and values then serve generation and log-likelihood alike. Special
tokens are never merged with their neighbours, so that both parts can be turned into tokens apart.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.hf_vlms import DEFAULT_IMAGE_PLACEHOLDER, HFMultimodalLM
from lm_eval.models.utils import handle_stop_sequences, replace_placeholders, resize_image
from lm_eval.models.utils_hf import stop_sequences_criteria
from PIL import Image
from tqdm import tqdm
from transformers import DynamicCache, Qwen2_5_VLForConditionalGeneration


logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"


class Prefix(NamedTuple):
    """Text up to and with the last image, and the images: what questions share."""

    text: str
    images: tuple[Image.Image, ...]
    digest: bytes

    @property
    def key(self) -> tuple[str, bytes]:
        """What makes two prefixes the same."""
        return self.text, self.digest


class Part(NamedTuple):
    """Questions about one prefix that are passed through the model together: their tokens, and whose they are."""

    prefix: Prefix
    suffixes: list[list[int]]
    owners: list[Any]


class Shared(NamedTuple):
    """Prefixes passed through the model, repeated for their questions, and these, padded on the left to (B, L)."""

    cache: DynamicCache
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    rope_deltas: torch.Tensor
    suffix_length: int


class MedForgetVLM(HFMultimodalLM):
    """
    `hf-multimodal` with the same arguments and, in float32, the same answers, several times faster on Qwen2.5-VL.

    - Questions about an image share its keys and values, in generation and in log-likelihood.
    - Log-likelihood of requests with images, which `hf-multimodal` refuses. Only spaces at the end of a context move
      into the continuation, so that the line break that ends a chat template stays with it.
    - A request that several tasks make is answered once.
    - `--use_cache` keeps each answer under the whole request, its image included, as soon as it is there.
    - `pretrained` may be a folder with a LoRA adapter.

    Other models, and requests that sample, take the way of `hf-multimodal`.

    Args:
        pretrained (`str` or [`~transformers.PreTrainedModel`]):
            Checkpoint, adapter folder, or Hub id; or a model with its processor beside it.
        **kwargs (`Any`):
            Arguments of `hf-multimodal`.
    """

    def __init__(self, pretrained: Any, **kwargs: Any):
        adapter = Path(pretrained) / ADAPTER_CONFIG if isinstance(pretrained, str) else None
        if adapter and adapter.is_file():
            kwargs["peft"] = pretrained
            pretrained = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
        super().__init__(pretrained, **kwargs)
        model: Any = self.model
        # An adapter's layers stay in the model that PEFT wraps.
        self._vlm = model.get_base_model() if self.peft else model
        self.shares_prefixes = isinstance(self._vlm, Qwen2_5_VLForConditionalGeneration)
        if not self.shares_prefixes:
            logger.warning(
                "medforget-vlm knows Qwen2.5-VL only; %s is evaluated as by hf-multimodal, without log-likelihoods",
                type(self._vlm).__name__,
            )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, as of `hf-multimodal`."""
        if not self._is_ours(requests) or any(request.args[1].get("do_sample") for request in requests):
            return super().generate_until(requests, disable_tqdm)
        answers = _Answers(requests, "generate_until", self.cache_hook, disable_tqdm or self.rank != 0)
        by_arguments = _grouped(answers.unique, lambda args: json.dumps(args[1], sort_keys=True, default=repr))
        for alike in by_arguments.values():
            arguments = copy.deepcopy(alike[0][1])
            eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
            until = handle_stop_sequences(arguments.pop("until", None), eos=eos)
            new_tokens = arguments.pop("max_gen_toks", self.max_gen_toks)
            arguments.pop("temperature", None)
            arguments["do_sample"] = False
            for batch in self._batches(self._parts(alike, lambda args: [(self._tokens(self._suffix(args)), args)])):
                texts = self._generate(self._share(batch), until, max_new_tokens=new_tokens, **arguments)
                for args, text in zip([owner for part in batch for owner in part.owners], texts, strict=True):
                    answers.give(args, text)
        return answers.all()

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, in nats, and whether it is the greedy one."""
        if not self._is_ours(requests):
            return super().loglikelihood(requests, disable_tqdm)
        answers = _Answers(requests, "loglikelihood", self.cache_hook, disable_tqdm or self.rank != 0)
        for batch in self._batches(self._parts(answers.unique, self._continuations, merge=True)):
            owners = [owner for part in batch for owner in part.owners]
            longest = max(len(tokens) for of_row in owners for _, tokens in of_row)
            log_probs = self._log_probs(self._share(batch), longest)  # (B, longest, V)
            for row, of_row in zip(log_probs, owners, strict=True):
                for args, tokens in of_row:
                    target = torch.tensor(tokens, device=row.device)
                    last = row[-len(tokens) :]  # (tokens, V)
                    total = last.gather(1, target[:, None]).sum().item()
                    answers.give(args, (total, bool((last.argmax(-1) == target).all())))
        return answers.all()

    def _is_ours(self, requests: Sequence[Instance]) -> bool:
        return self.shares_prefixes and all(len(request.args) > 2 for request in requests)

    # What is asked

    def _split(self, args: tuple) -> tuple[str, str]:
        """A context, parted after its last image."""
        context = args[0]
        if not self.chat_applied:
            context = replace_placeholders(context, DEFAULT_IMAGE_PLACEHOLDER, self.image_token, self.max_images)
        before, image, after = context.rpartition(self.image_token)
        return before + image, after

    def _suffix(self, args: tuple) -> str:
        return self._split(args)[1]

    def _prefix(self, args: tuple) -> Prefix:
        images = [
            resize_image(image, self.image_width, self.image_height, self.image_max_side)
            for image in args[2]["visual"]
        ]
        images = images[: self.max_images]
        if self.rgb:
            images = [image.convert("RGB") for image in images]
        digest = hashlib.sha256()
        for image in images:
            digest.update(f"{image.mode} {image.size}".encode() + image.tobytes())
        return Prefix(self._split(args)[0], tuple(images), digest.digest())

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def _continuations(self, args: tuple) -> list[tuple[list[int], Any]]:
        """The tokens to pass for a continuation, all but its last, and its own."""
        suffix, continuation = self._suffix(args), args[1]
        context = suffix.rstrip(" ")
        whole = self._tokens(suffix + continuation)
        own = whole[len(self._tokens(context)) :]
        return [(whole[:-1], (args, own))]

    def _parts(self, requests: Iterable[tuple], rows, merge: bool = False) -> Iterator[Part]:
        """Requests by prefix, the largest images first; with `merge`, equal rows are one that has all their owners."""
        prefixes: dict[Hashable, Prefix] = {}
        members: dict[Hashable, list[tuple]] = {}
        for args in requests:
            prefix = self._prefix(args)
            prefixes.setdefault(prefix.key, prefix)
            members.setdefault(prefix.key, []).append(args)
        for key in sorted(members, key=lambda key: -sum(i.width * i.height for i in prefixes[key].images)):
            found = [row for args in members[key] for row in rows(args)]
            if merge:
                owners: dict[tuple[int, ...], list[Any]] = {}
                for tokens, owner in found:
                    owners.setdefault(tuple(tokens), []).append(owner)
                found = [(list(tokens), together) for tokens, together in owners.items()]
            found.sort(key=lambda row: len(row[0]))
            yield Part(prefixes[key], [tokens for tokens, _ in found], [owner for _, owner in found])

    def _batches(self, parts: Iterable[Part]) -> Iterator[list[Part]]:
        """Parts in batches of at most `batch_size` rows; one that is larger is cut."""
        size = int(self.batch_size)
        batch: list[Part] = []
        rows = 0
        for prefix, suffixes, owners in parts:
            for start in range(0, len(suffixes), size):
                piece = Part(prefix, suffixes[start : start + size], owners[start : start + size])
                if batch and rows + len(piece.suffixes) > size:
                    yield batch
                    batch, rows = [], 0
                batch.append(piece)
                rows += len(piece.suffixes)
        if batch:
            yield batch

    # What is computed

    @torch.inference_mode()
    def _share(self, batch: Sequence[Part]) -> Shared:
        """Pass the prefixes of a batch through the model, and put their questions behind them."""
        encoded = self.processor(
            text=[part.prefix.text for part in batch],
            images=[list(part.prefix.images) for part in batch],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(self.device)
        prefix_ids, prefix_mask = encoded["input_ids"], encoded["attention_mask"]  # (P, Lp)
        cache = DynamicCache(config=self._vlm.config.get_text_config())
        inner = self._vlm.model
        inner.rope_deltas = None
        inner(
            input_ids=prefix_ids,
            attention_mask=prefix_mask,
            pixel_values=encoded["pixel_values"].to(self._vlm.dtype),
            image_grid_thw=encoded["image_grid_thw"],
            mm_token_type_ids=(prefix_ids == self.image_token_id).int(),
            past_key_values=cache,
            use_cache=True,
        )
        of_row = torch.tensor([i for i, part in enumerate(batch) for _ in part.suffixes], device=self.device)  # (B,)
        cache.batch_select_indices(of_row)
        suffixes = [tokens for part in batch for tokens in part.suffixes]
        length = max(len(tokens) for tokens in suffixes)
        padding = [[self.tokenizer.pad_token_id] * (length - len(tokens)) for tokens in suffixes]
        ids = torch.tensor([pad + tokens for pad, tokens in zip(padding, suffixes, strict=True)], device=self.device)
        mask = torch.tensor(
            [[0] * len(pad) + [1] * len(tokens) for pad, tokens in zip(padding, suffixes, strict=True)],
            device=self.device,
        )  # (B, Ls)
        return Shared(
            cache,
            torch.cat([prefix_ids[of_row], ids], dim=1),
            torch.cat([prefix_mask[of_row], mask], dim=1),
            inner.rope_deltas[of_row],
            length,
        )

    def _generate(self, shared: Shared, until: list[str], **arguments: Any) -> list[str]:
        start = shared.input_ids.shape[1]
        self._vlm.model.rope_deltas = shared.rope_deltas
        tokens = self._vlm.generate(
            input_ids=shared.input_ids,
            attention_mask=shared.attention_mask,
            past_key_values=shared.cache,
            pad_token_id=self.tokenizer.pad_token_id,
            stopping_criteria=stop_sequences_criteria(self.tokenizer, until, start, len(shared.input_ids)),
            use_cache=True,
            **arguments,
        )
        return [_up_to(self.tok_decode(row), until) for row in tokens[:, start:].tolist()]

    @torch.inference_mode()
    def _log_probs(self, shared: Shared, keep: int) -> torch.Tensor:
        """Log-probabilities of what follows each of the last `keep` tokens: (B, keep, V)."""
        length = shared.suffix_length
        positions = (shared.attention_mask.cumsum(-1) - 1).clamp_min(0)[:, -length:] + shared.rope_deltas  # (B, Ls)
        logits = self._vlm(
            input_ids=shared.input_ids[:, -length:],
            attention_mask=shared.attention_mask,
            position_ids=positions[None].expand(3, -1, -1),
            past_key_values=shared.cache,
            use_cache=True,
            logits_to_keep=keep,
        ).logits
        return logits.float().log_softmax(-1)


class _Answers:
    """Answers to requests, of which equal ones are asked once."""

    def __init__(self, requests: Sequence[Instance], kind: str, cache_hook: Any, quiet: bool):
        self.kind, self.cache_hook = kind, cache_hook
        self.keys = [_key(request.args) for request in requests]
        by_key = {key: request.args for key, request in zip(self.keys, requests, strict=True)}
        self.unique = list(by_key.values())
        self.key_of = {id(args): key for key, args in by_key.items()}
        self.given: dict[str, Any] = {}
        self.bar = tqdm(
            total=len(self.unique), disable=quiet, desc=f"{kind}: {len(requests)} requests", unit="request"
        )

    def give(self, args: tuple, answer: Any) -> None:
        self.given[self.key_of[id(args)]] = answer
        self.cache_hook.add_partial(self.kind, args, answer)
        self.bar.update()

    def all(self) -> list[Any]:
        self.bar.close()
        return [self.given[key] for key in self.keys]


def _key(args: tuple) -> str:
    digest = hashlib.sha256(json.dumps(args[:2], sort_keys=True, default=repr).encode())
    for image in args[2]["visual"]:
        digest.update(f"{image.mode} {image.size}".encode() + image.tobytes())
    return digest.hexdigest()


def _grouped(items: Iterable[Any], key) -> dict[Hashable, list[Any]]:
    groups: dict[Hashable, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _up_to(text: str, until: Iterable[str]) -> str:
    for stop in until:
        if stop:
            text = text.split(stop)[0]
    return text
