"""Training arguments."""

import math
import os
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch
from transformers.utils import is_flash_attn_2_available
from trl import SFTConfig

from medforget_dataset.errors import UserError
from medforget_dataset.hierarchy import LEVELS
from medforget_dataset.publishing import check_name

from .lora import LANGUAGE_LINEAR
from .methods import INITIAL, GradientMethod, Method, get_method, get_preset, make_method, method_arguments
from .processes import is_on_cpu


Config = TypeVar("Config", bound=SFTConfig)
SCHEDULES = ("interleaved", "sequential")


@dataclass
class FineTuneConfig(SFTConfig):
    r"""
    Arguments of [`~unlearn.trainer.FineTuneTrainer`]: those of [`~trl.SFTConfig`], with other defaults.

    One example is one image with all its rows, so that `per_device_train_batch_size` counts images.

    > Parameters that control what is trained

    Parameters:
        use_peft (`bool`, *optional*, defaults to `False`):
            Train a LoRA adapter instead of the model. The name is TRL's, as are the next four.
        lora_r (`int`, *optional*, defaults to `16`):
            Rank of the adapter. MedForget authors' and MLLMU-Bench's code.
        lora_alpha (`int`, *optional*, defaults to `16`):
            Scale of the adapter. The same.
        lora_dropout (`float`, *optional*, defaults to `0.05`):
            Share of the adapter's inputs dropped in training. The same.
        lora_target_modules (`str`, *optional*, defaults to the linear layers of the language model):
            Regular expression for the whole names of the layers that are adapted.
        freeze_vision (`bool`, *optional*, defaults to `False`):
            Do not train the vision tower, its merger included.

    > Parameters that control speed and memory

    Parameters:
        pack_images (`bool`, *optional*, defaults to `True`):
            One sequence an image, with all its rows. Otherwise one padded sequence a row: the same loss and gradients,
            several times slower.
        cache_vision (`bool`, *optional*, defaults to `False`):
            Encode each image once. The vision tower must not be trained.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type of the weights that are loaded. `"auto"` is bfloat16 under an adapter on a GPU that can, and else
            float32, in which AdamW's small steps are not rounded away.
        attn_implementation (`str`, *optional*, defaults to `"auto"`):
            Attention. `"auto"` is `sdpa`, and in the vision tower flash attention where it is installed on a GPU.
        bf16 (`bool`, *optional*):
            Whether to compute in bfloat16. Defaults to `True` on a GPU that can.
        activation_checkpointing (`bool`, *optional*):
            Whether to recompute activations in the backward pass, for models that would not fit otherwise. Defaults to
            `True` on a GPU, as in TRL. It takes the place of `gradient_checkpointing`, which is ignored.
        max_length (`int`, *optional*):
            Longest packed sequence in tokens. Longer ones are refused, never cut. No limit by default.

    > Parameters with another default

    Parameters:
        learning_rate (`float`, *optional*, defaults to `1e-4`):
            Highest learning rate. MedForget authors' fine-tuning code.
        lr_scheduler_type (`str`, *optional*, defaults to `"cosine_with_min_lr"`):
            Schedule: after the warm-up, half a cosine down to a share of `learning_rate`.
        lr_scheduler_kwargs (`dict` or `str`, *optional*):
            That share, by default `{"min_lr_rate": 0.1}`; other schedules have no arguments by default. Measured on
            the tiny model: 0.05 to 0.1.
        warmup_steps (`float`, *optional*, defaults to `0.05`):
            Steps of linear warm-up, or below 1 their share of all steps.
        adam_beta2 (`float`, *optional*, defaults to `0.98`):
            Second momentum of AdamW. Measured on the tiny model.
        logging_steps (`float`, *optional*, defaults to `10`):
            Steps between two lines of the log, or below 1 their share of all steps. TRL.
        save_strategy (`str`, *optional*, defaults to `"no"`):
            When to write intermediate checkpoints.
        report_to (`str`, *optional*, defaults to `"none"`):
            Service to send metrics to.
        hub_private_repo (`bool`, *optional*, defaults to `True`):
            Whether the repository of `push_to_hub` stays private. Of restricted rows it always does.
    """

    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of the model."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of the adapter."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Share of the adapter's inputs dropped in training."})
    lora_target_modules: str = field(
        default=LANGUAGE_LINEAR, metadata={"help": "Regular expression for the whole names of the adapted layers."}
    )
    freeze_vision: bool = field(default=False, metadata={"help": "Do not train the vision tower."})
    pack_images: bool = field(default=True, metadata={"help": "One sequence an image, not one a row."})
    cache_vision: bool = field(default=False, metadata={"help": "Encode each image once."})
    dtype: str = field(default="auto", metadata={"help": "Type of the weights: auto, float32 or bfloat16."})
    attn_implementation: str = field(default="auto", metadata={"help": "Attention: auto, sdpa or eager."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Highest learning rate."})
    lr_scheduler_type: str = field(default="cosine_with_min_lr", metadata={"help": "Learning-rate schedule."})
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Arguments of the schedule, such as the lowest learning rate as a share of the highest."},
    )
    warmup_steps: float = field(
        default=0.05, metadata={"help": "Steps of linear warm-up, or below 1 their share of all steps."}
    )
    adam_beta2: float = field(default=0.98, metadata={"help": "Second momentum of AdamW."})
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Compute in bfloat16. If not set, it is on where the GPU can."}
    )
    activation_checkpointing: bool | None = field(
        default=None, metadata={"help": "Recompute activations in the backward pass. If not set, it is on on a GPU."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Longest packed sequence in tokens. Longer ones are refused, never cut."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between two lines of the log."})
    save_strategy: str = field(default="no", metadata={"help": "When to write intermediate checkpoints."})
    report_to: None | str | list[str] = field(default="none", metadata={"help": "Service to send metrics to."})
    hub_private_repo: bool | None = field(
        default=True, metadata={"help": "Keep the repository of push_to_hub private."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Keep off: the collator reads columns that the model does not take."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Keep off: a loss that is not a number stops the run."}
    )
    accelerator_config: dict[str, Any] | str | None = field(
        # Our batches already fill every process.
        default_factory=lambda: {"even_batches": False},
        metadata={"help": "Configuration of accelerate."},
    )

    def __post_init__(self):
        self._check_numbers()
        on_gpu = torch.cuda.is_available() and not self.use_cpu
        if self.bf16 is None:
            self.bf16 = on_gpu and not self.fp16 and torch.cuda.is_bf16_supported()
        if self.activation_checkpointing is None:
            self.activation_checkpointing = on_gpu
        if self.lr_scheduler_kwargs is None and self.lr_scheduler_type == "cosine_with_min_lr":
            self.lr_scheduler_kwargs = {"min_lr_rate": 0.1}
        self.dataloader_pin_memory = self.dataloader_pin_memory and on_gpu
        super().__post_init__()
        # The older of the transformers versions we support read the switch under this name alone.
        self.gradient_checkpointing = self.activation_checkpointing
        if self.n_gpu > 1:
            # Without a launcher: one process, one GPU. DataParallel would split positions along the wrong axis.
            self._n_gpu = 1

    def _check_numbers(self) -> None:
        """Refuse what the trainer would take and misunderstand."""
        positive = ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps")
        for name in (*positive, "max_steps", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise UserError(f"{name} is {value!r}; it must be a number")
        for name in positive:
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be more than 0")
        if self.max_steps != -1 and self.max_steps <= 0:
            raise UserError(f"max_steps is {self.max_steps}; it must be more than 0, or -1 for whole epochs")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}; it must be between 0 and {2**32 - 1}")
        if self.push_to_hub and not self.hub_model_id:
            raise UserError("push_to_hub: give hub_model_id too, ORG/NAME")
        if self.push_to_hub:
            check_name(str(self.hub_model_id))
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise UserError(f"dtype is {self.dtype!r}; it must be auto, float32 or bfloat16")

    @property
    def sharding(self) -> str | None:
        """`"fsdp"` or `"deepspeed"` where `accelerate launch` has been told to spread the model over processes."""
        for name in ("fsdp", "deepspeed"):
            if os.environ.get(f"ACCELERATE_USE_{name.upper()}", "false").lower() in ("1", "true"):
                return name
        return None

    def load_arguments(self) -> dict[str, Any]:
        """How the model is to be loaded: `dtype` and `attn_implementation` for `from_pretrained`."""
        on_gpu = torch.cuda.is_available() and not self.use_cpu
        half = self.dtype == "bfloat16" or (self.dtype == "auto" and bool(self.bf16) and self.use_peft and on_gpu)
        attention: str | dict[str, str] = self.attn_implementation
        if attention == "auto":
            # Flash attention takes no mask, and packed sequences need one; the vision tower has none.
            flash = on_gpu and is_flash_attn_2_available()
            attention = {"text_config": "sdpa", "vision_config": "flash_attention_2"} if flash else "sdpa"
        return {"dtype": torch.bfloat16 if half else torch.float32, "attn_implementation": attention}


@dataclass
class UnlearnConfig(FineTuneConfig):
    r"""
    Arguments of [`~unlearn.trainer.UnlearnTrainer`].

    > Parameters that control unlearning

    Parameters:
        method (`str`, *optional*, defaults to `"npo"`):
            Name of a gradient method in `unlearn.methods`.
        method_args (`dict` or `str`, *optional*):
            Hyper-parameters of the method that differ from its defaults, such as `{"beta": 0.5}`.
        level (`str`, *optional*):
            Level of the hierarchy that is forgotten, for the record.
        forget_per_step (`int`, *optional*, defaults to `2`):
            Images with rows to forget in a batch. Measured on the tiny model.
        retain_per_step (`int`, *optional*, defaults to `4`):
            Images with nothing to forget in a batch. Where there are none, as when every study has a section to
            forget, a batch has `forget_per_step + retain_per_step` images of the other kind, and the reverse.
            `per_device_train_batch_size` is set to the sum. Measured on the tiny model.
        schedule (`"interleaved"` or `"sequential"`, *optional*, defaults to `"interleaved"`):
            Forget and retain rows in every step, or an epoch's forget rows and then its retain rows, as MLLMU-Bench
            does. The paper interleaves.
        precompute_ref_log_probs (`bool`, *optional*):
            Compute what a method needs of its reference once before training, where that is log-probabilities only.
            The reference is then not kept. By default done where rows are the same in every epoch.

    > Parameters that control when to stop and what to keep

    Parameters:
        keep_best (`bool`, *optional*, defaults to `False`):
            Keep the weights with the highest selectivity, the share of retain rows less that of forget rows answered
            exactly, instead of the last ones: paths are not monotonic.
        retain_floor (`float`, *optional*):
            Stop when a smaller share (0 to 1) of retain rows is answered exactly, measurement after measurement; what
            `keep_best` keeps is not below it.
        retain_patience (`int`, *optional*, defaults to `2`):
            Measurements in a row below the floor after which training stops: a path may dip and recover.
        selectivity_steps (`float`, *optional*, defaults to `0.1`):
            Steps between two measurements of selectivity, or below 1 their share of all steps.
        selectivity_images (`int`, *optional*, defaults to `32`):
            Images of each kind that are measured, drawn by the seed.

    > Parameters with another default

    Parameters:
        learning_rate (`float`, *optional*, defaults to `1e-5`):
            Highest learning rate. open-unlearning, MMUnlearner and CLEAR.
        logging_first_step (`bool`, *optional*, defaults to `True`):
            Whether to log the first step, with which a collapse is compared.

    Raises:
        UserError: If the method, one of its arguments or the level is unknown, or a value is out of range.
    """

    _VALID_DICT_FIELDS = [*FineTuneConfig._VALID_DICT_FIELDS, "method_args"]

    learning_rate: float = field(default=1e-5, metadata={"help": "Highest learning rate."})
    logging_first_step: bool = field(default=True, metadata={"help": "Log the first step too."})
    method: str = field(default="npo", metadata={"help": "Unlearning method."})
    method_args: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Hyper-parameters of the method that differ from its defaults, as JSON."}
    )
    level: str | None = field(default=None, metadata={"help": "Level of the hierarchy that is forgotten."})
    forget_per_step: int = field(default=2, metadata={"help": "Images with rows to forget in a batch."})
    retain_per_step: int = field(default=4, metadata={"help": "Images with nothing to forget in a batch."})
    schedule: str = field(default="interleaved", metadata={"help": "interleaved or sequential."})
    precompute_ref_log_probs: bool | None = field(
        default=None, metadata={"help": "Compute the reference's log-probabilities once. If not set, where possible."}
    )
    keep_best: bool = field(default=False, metadata={"help": "Keep the weights with the highest selectivity."})
    retain_floor: float | None = field(
        default=None, metadata={"help": "Stop when fewer retain rows (share, 0 to 1) are answered exactly."}
    )
    retain_patience: int = field(default=2, metadata={"help": "Measurements below the floor before training stops."})
    selectivity_steps: float = field(
        default=0.1, metadata={"help": "Steps between two measurements, or below 1 their share of all steps."}
    )
    selectivity_images: int = field(default=32, metadata={"help": "Images of each kind that are measured."})

    def __post_init__(self):
        for name in ("forget_per_step", "retain_per_step"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if not (batch := self.forget_per_step + self.retain_per_step):
            raise UserError("forget_per_step and retain_per_step are both 0; a batch needs an image")
        self.per_device_train_batch_size = batch
        if self.level is not None and self.level not in LEVELS:
            raise UserError(f"unknown level {self.level!r}; choose from {', '.join(LEVELS)}")
        super().__post_init__()
        if not self.forget_per_step:
            raise UserError("forget_per_step is 0; nothing would be forgotten")
        if self.schedule not in SCHEDULES:
            raise UserError(f"schedule is {self.schedule!r}; choose from {', '.join(SCHEDULES)}")
        if self.retain_floor is not None and not 0 <= self.retain_floor <= 1:
            raise UserError(f"retain_floor is {self.retain_floor}; it must be a share between 0 and 1")
        for name in ("selectivity_steps", "selectivity_images", "retain_patience"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise UserError(f"{name} is {value!r}; it must be a number more than 0")
        self.make_method()

    def make_method(self) -> GradientMethod:
        """The method with its hyper-parameters."""
        assert not isinstance(self.method_args, str)  # parsed by TrainingArguments
        method = make_method(self.method, self.method_args)
        if not isinstance(method, GradientMethod):
            raise UserError(f"{self.method} does not train; call its edit() instead")
        return method


def make_config(config_class: type[Config], **arguments: Any) -> Config:
    """
    A configuration, of which a wrong argument or value is told in one line.

    Args:
        config_class (`type`):
            [`FineTuneConfig`] or [`UnlearnConfig`].
        **arguments (`Any`):
            Its fields.

    Raises:
        UserError: If there is no such field, or its value is not one.
    """
    known = {f.name for f in fields(config_class) if f.init}
    for unknown in arguments.keys() - known:
        raise UserError(f"{unknown} is not a training argument; see the fields of TRL's SFTConfig")
    try:
        return config_class(**{"use_cpu": is_on_cpu(), **arguments})
    except UserError:
        raise
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(f"training arguments: {str(error).strip().partition(chr(10))[0]}") from error


def resolve(
    method: str, preset: str | None = None, base: dict[str, Any] | None = None, /, **chosen: Any
) -> tuple[Method, dict[str, Any]]:
    """
    Tell hyper-parameters of a method from training arguments, which presets and command lines give together.

    >>> method, training = resolve("npo", "tiny", learning_rate=1e-4)
    >>> method.beta, training["learning_rate"]
    (0.5, 0.0001)

    Args:
        method (`str`):
            Name of the method.
        preset (`str`, *optional*):
            Name of one of its presets.
        base (`dict[str, Any]`, *optional*):
            Training arguments that the preset overrides; a method that does not train has no use for them.
        **chosen (`Any`):
            Hyper-parameters of the method and fields of [`UnlearnConfig`]; they override the preset.

    Returns:
        `tuple[Method, dict[str, Any]]`: The method, and the training arguments.

    Raises:
        UserError: If the method, preset or an argument is unknown, or a value is out of range.
    """
    named = get_preset(method, preset) if preset else {}
    values = ((base or {}) if get_method(method).uses_gradients else {}) | named | chosen
    of_method = method_arguments(method)
    of_training = {f.name for f in fields(UnlearnConfig)}
    for name in values:
        if name not in of_method and name not in of_training:
            raise UserError(f"{method} has no argument {name!r}; it has {', '.join(of_method)}")
    needed = named.get("reference", INITIAL) is None
    if needed and values.get("reference") == INITIAL:
        raise UserError(
            f"{method}: preset {preset} compares with a retain-only model; give its folder with --reference"
        )
    instance = get_method(method)(**{name: value for name, value in values.items() if name in of_method})
    if not instance.uses_gradients and (unused := [n for n in chosen if n not in of_method and n != "seed"]):
        if "push_to_hub" in unused:
            raise UserError(f"push_to_hub: {method} does not train; push its checkpoint with `medforget push model`")
        raise UserError(f"{unused[0]}: {method} does not train; leave out {', '.join(unused)}")
    return instance, {name: value for name, value in values.items() if name not in of_method}
