"""lm-eval's `hf-multimodal` for Qwen2.5-VL, in which what questions about an image share is computed once.

A prompt is the text up to and with the image, and the question after it. The first part is passed through the model
once for all questions about the image; its keys and values then serve generation and log-likelihood alike. Special
tokens are never merged with their neighbours, so that both parts can be turned into tokens apart.
"""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, hash_args
from lm_eval.models.hf_vlms import DEFAULT_IMAGE_PLACEHOLDER, HFMultimodalLM
from lm_eval.models.utils import handle_stop_sequences, replace_placeholders, resize_image
from peft import PeftModel
from PIL import Image
from tqdm import tqdm
from transformers import ProcessorMixin, Qwen2_5_VLForConditionalGeneration

from medforget_dataset.errors import UserError

from .adapters import base_and_adapters
from .batching import Part, Prefix, Request, batches, by_prefix, digest, share_out
from .cache_owner import Owner, claim, owner_of
from .prefixes import Shared, generate, log_probs, share


logger = logging.getLogger(__name__)

_SAVE_PROCESSOR = "save the processor of the model that it was trained from beside it"

Images = dict[str, Sequence[Image.Image]]
"""Images by their digest."""


class MedForgetVLM(HFMultimodalLM):
    """
    `hf-multimodal` with the same arguments and, in float32, the same answers, several times faster on Qwen2.5-VL.

    - Questions about an image share its keys and values, in generation and in log-likelihood.
    - Log-likelihood of requests with images, which `hf-multimodal` refuses. Only spaces at the end of a context move
      into the continuation, so that the line break that ends a chat template stays with it.
    - A request that several tasks make is answered once.
    - `--use_cache` keeps each answer under the whole request, its image included, as soon as it is there; a file with
      another checkpoint's answers is refused.
    - `pretrained` may be a folder with a LoRA adapter, whose base may be one too.
    - Processes that `accelerate launch` or torchrun has started, on GPUs or CPUs, divide the images. lm-eval deals out
      rows in turn: each process would pass every image through the model, and answer again what another one has
      answered for another task.

    Other models, and requests that sample or search, take the way of `hf-multimodal`.

    Args:
        pretrained (`str` or [`~transformers.PreTrainedModel`]):
            Checkpoint, adapter folder, or Hub id; or a model with its processor beside it.
        **kwargs (`Any`):
            Arguments of `hf-multimodal`.

    Raises:
        UserError: If the folder, the model that an adapter belongs to, or the processor is missing, or the batch size
            is `auto`.
    """

    _owner: Owner | None = None  # of a model that is given as such, nothing is known

    def __init__(self, pretrained: Any, **kwargs: Any):
        if str(kwargs.get("batch_size")).startswith("auto"):
            raise UserError(
                f"--batch_size {kwargs['batch_size']}: lm-eval finds no batch size for models of images; give a "
                "number, such as 64"
            )
        adapters = [kwargs["peft"]] if kwargs.get("peft") else []
        if isinstance(pretrained, str):
            if not torch.accelerator.is_available():
                # Unless it is told so, accelerate takes several processes on CPUs for separate runs. The time is
                # lm-eval's: the others wait for what the first one does alone.
                PartialState(cpu=True, timeout=timedelta(weeks=52))
            pretrained, own = base_and_adapters(pretrained)
            adapters += own
            self._owner = owner_of([*adapters, pretrained], kwargs.get("revision") or "main")
        super().__init__(pretrained, **kwargs | {"peft": adapters.pop() if adapters else None})
        for adapter in reversed(adapters):
            self._model: Any = PeftModel.from_pretrained(self._model.merge_and_unload(), adapter).eval()
        if hasattr(self, "accelerator"):
            # lm-eval sets these only where one machine has several GPUs.
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        model: Any = self.model
        # An adapter's layers stay in the model that PEFT wraps.
        self._vlm: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self._has_met_others = False
        layers = getattr(self.config.get_text_config(), "layer_types", ())
        is_known = isinstance(self._vlm, Qwen2_5_VLForConditionalGeneration)
        self.shares_prefixes = is_known and "sliding_attention" not in layers
        if not self.shares_prefixes:
            logger.warning(
                "medforget-vlm knows %s; %s is evaluated as by hf-multimodal, without log-likelihoods",
                "no sliding attention, which this config.json asks for" if is_known else "Qwen2.5-VL only",
                type(self._vlm).__name__,
            )
        self._check_processor()

    def _check_processor(self) -> None:
        own, needed = getattr(self.processor, "image_token_id", None), getattr(self.config, "image_token_id", None)
        if self.shares_prefixes and own != needed:
            raise UserError(
                f"{self.tokenizer.name_or_path}: the processor is not this model's: its image token is {own}, the "
                f"model's {needed}; {_SAVE_PROCESSOR}"
            )

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(tokenizer, ProcessorMixin):
            self.processor, self.tokenizer = tokenizer, tokenizer.tokenizer
            return
        where = tokenizer or pretrained  # `hf-multimodal` loads the first, and forgets it
        try:
            super()._create_tokenizer(where, None, *args, **kwargs)
        except AttributeError as error:
            kind = type(self.processor).__name__
            raise UserError(
                f"{where}: holds a {kind} but no processor of text and images; {_SAVE_PROCESSOR}"
            ) from error
        except Exception as error:  # of the type that tokenizers raises
            why = str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".")
            raise UserError(f"{where}: no processor that can be read ({why}); {_SAVE_PROCESSOR}") from error

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Take the place where lm-eval will look up and keep answers; a `UserError` if it has another checkpoint's."""
        if self._owner and cache_hook.dbdict is not None:
            claim(cache_hook.dbdict, self._owner)
        super().set_cache_hook(cache_hook)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that prompts are made with."""
        template = super().chat_template(chat_template)
        if chat_template and not template:
            raise UserError(f"{self.tokenizer.name_or_path}: the processor has no chat template; {_SAVE_PROCESSOR}")
        return template

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, as of `hf-multimodal`."""
        if not self._is_ours(requests) or not all(map(_is_greedy, requests)):
            return super().generate_until(requests, disable_tqdm)
        return self._answer("generate_until", requests, self._texts, disable_tqdm)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, in nats, and whether it is the greedy one."""
        if not self._is_ours(requests):
            return super().loglikelihood(requests, disable_tqdm)
        return self._answer("loglikelihood", requests, self._scores, disable_tqdm)

    def barrier(self) -> None:
        """Wait for the other processes, as lm-eval has all do after each kind of request."""
        if self.world_size > 1 and not self._has_met_others:
            # All answers of this process were in its cache, but others may still have to be met.
            self._answer("", [], lambda requests, images: iter(()), True)
        self._has_met_others = False
        super().barrier()

    def _is_ours(self, requests: Sequence[Instance]) -> bool:
        return self.shares_prefixes and all(len(request.args) > 2 for request in requests)

    def _answer(
        self,
        kind: str,
        instances: Sequence[Instance],
        compute: Callable[[list[Request], Images], Iterator[tuple[Request, Any]]],
        quiet: bool,
    ) -> list[Any]:
        """Answer each request once, on one of the processes."""
        requests, images = self._read(kind, instances)
        keys = [request.key for request in requests]
        asked = self._gather(dict(zip(keys, requests, strict=True)))
        cache = self.cache_hook.dbdict
        kept = {}
        if cache is not None and len(asked) > 1:  # what this process had answered for others before a crash
            kept = {k: cache[r.cache_key] for of_one in asked for k, r in of_one.items() if r.cache_key in cache}
        answers = _merged(self._gather(kept))
        mine = share_out(asked, answers)[self.rank]
        given = {}
        title = f"{kind}: {len(instances)} requests"
        with tqdm(total=len(mine), disable=quiet or self.rank != 0, desc=title, unit="request") as bar:
            for request, answer in compute(mine, images):
                given[request.key] = answer
                if cache is not None:
                    cache[request.cache_key] = answer
                bar.update()
        answers |= _merged(self._gather(given))
        self._has_met_others = True
        return [answers[key] for key in keys]

    def _gather(self, own: dict[str, Any]) -> list[dict[str, Any]]:
        """What each process has, in the order of their ranks."""
        return gather_object([own]) if self.world_size > 1 else [own]

    def _read(self, kind: str, instances: Sequence[Instance]) -> tuple[list[Request], Images]:
        requests = []
        images: Images = {}
        digests: dict[tuple[int, ...], str] = {}  # by identity: the questions about an image have the same object
        for instance in instances:
            context, arguments, media = instance.args
            visual = media["visual"]
            ids = tuple(id(image) for image in visual)
            if ids not in digests:
                digests[ids] = digest(visual)
                images.setdefault(digests[ids], visual)
            if not self.chat_applied:
                context = replace_placeholders(context, DEFAULT_IMAGE_PLACEHOLDER, self.image_token, self.max_images)
            before, image_token, suffix = context.rpartition(self.image_token)
            cache_key = "" if self.cache_hook.dbdict is None else hash_args(kind, instance.args)
            requests.append(Request(Prefix(before + image_token, digests[ids]), suffix, arguments, cache_key))
        return requests, images

    def _texts(self, requests: Iterable[Request], images: Images) -> Iterator[tuple[Request, str]]:
        alike: dict[str, list[Request]] = defaultdict(list)
        for request in requests:
            alike[request.decoding].append(request)
        for group in alike.values():
            arguments = copy.deepcopy(group[0].arguments)
            eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
            until = handle_stop_sequences(arguments.pop("until", None), eos=eos)
            arguments["max_new_tokens"] = arguments.pop("max_gen_toks", self.max_gen_toks)
            arguments.pop("temperature", None)
            arguments["do_sample"] = False
            parts = by_prefix(group, images, lambda request: (self._tokens(request.suffix), []))
            for batch in batches(parts, int(self.batch_size)):
                texts = generate(self._vlm, self.tokenizer, self._share(batch), until, **arguments)
                rows = [row for part in batch for row in part.rows]
                for row, text in zip(rows, texts, strict=True):
                    yield from ((request, text) for request, _ in row.owners)

    def _scores(self, requests: Iterable[Request], images: Images) -> Iterator[tuple[Request, tuple[float, bool]]]:
        for batch in batches(by_prefix(requests, images, self._continuation), int(self.batch_size)):
            rows = [row for part in batch for row in part.rows]
            keep = [max(len(scored) for _, scored in row.owners) for row in rows]
            of_rows = log_probs(self._vlm, self._share(batch), keep)
            for row, of_row in zip(rows, of_rows, strict=True):
                for request, scored in row.owners:
                    target = torch.tensor(scored, device=of_row.device, dtype=torch.long)
                    last = of_row[len(of_row) - len(scored) :]  # (tokens, V)
                    total = last.gather(1, target[:, None]).sum().item()
                    yield request, (total, bool((last.argmax(-1) == target).all()))

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def _continuation(self, request: Request) -> tuple[list[int], list[int]]:
        """The tokens to pass for a continuation, all but its last, and its own."""
        whole = self._tokens(request.suffix + request.arguments)
        return whole[:-1], whole[len(self._tokens(request.suffix.rstrip(" "))) :]

    def _share(self, batch: Sequence[Part]) -> Shared:
        fitted = [part._replace(images=self._fitted(part.images)) for part in batch]
        return share(self._vlm, self.processor, fitted, self.image_token_id)

    def _fitted(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        """Images as `hf-multimodal` has them."""
        sizes = self.image_width, self.image_height, self.image_max_side
        fitted = [resize_image(image, *sizes) for image in images[: self.max_images]]
        return [image.convert("RGB") for image in fitted] if self.rgb else fitted


def _is_greedy(request: Instance) -> bool:
    return not request.args[1].get("do_sample") and request.args[1].get("num_beams", 1) == 1


def _merged(of_each: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return {key: value for of_one in of_each for key, value in of_one.items()}
