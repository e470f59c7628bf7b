"""Training arguments."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch
from trl import SFTConfig

from medforget_dataset.errors import UserError
from medforget_dataset.hierarchy import LEVELS

from .methods import INITIAL, GradientMethod, Method, get_method, get_preset, make_method, method_arguments


Config = TypeVar("Config", bound=SFTConfig)


@dataclass
class FineTuneConfig(SFTConfig):
    r"""
    Arguments of [`~unlearn.trainer.FineTuneTrainer`]: those of [`~trl.SFTConfig`], with other defaults.

    One example is one image with all its rows, so that `per_device_train_batch_size` counts images.

    Parameters:
        learning_rate (`float`, *optional*, defaults to `1e-4`):
            Highest learning rate. MedForget authors' fine-tuning code.
        lr_scheduler_type (`str`, *optional*, defaults to `"cosine_with_min_lr"`):
            Schedule: after the warm-up, half a cosine down to a share of `learning_rate`.
        lr_scheduler_kwargs (`dict` or `str`, *optional*, defaults to `{"min_lr_rate": 0.1}`):
            That share. Measured on the tiny model: 0.05 to 0.1.
        warmup_steps (`float`, *optional*, defaults to `0.05`):
            Steps of linear warm-up, or below 1 their share of all steps.
        adam_beta2 (`float`, *optional*, defaults to `0.98`):
            Second momentum of AdamW. Measured on the tiny model.
        bf16 (`bool`, *optional*):
            Whether to compute in bfloat16. Defaults to `True` on a GPU that can.
        activation_checkpointing (`bool`, *optional*, defaults to `False`):
            Whether to recompute activations in the backward pass, for models that would not fit otherwise. It takes
            the place of `gradient_checkpointing`, which is ignored.
        max_length (`int`, *optional*):
            Longest packed sequence in tokens. Longer ones are refused, never cut. No limit by default.
        logging_steps (`float`, *optional*, defaults to `50`):
            Steps between two lines of the log.
        save_strategy (`str`, *optional*, defaults to `"no"`):
            When to write intermediate checkpoints.
        report_to (`str`, *optional*, defaults to `"none"`):
            Service to send metrics to.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "Highest learning rate."})
    lr_scheduler_type: str = field(default="cosine_with_min_lr", metadata={"help": "Learning-rate schedule."})
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default_factory=lambda: {"min_lr_rate": 0.1},
        metadata={"help": "Arguments of the schedule, such as the lowest learning rate as a share of the highest."},
    )
    warmup_steps: float = field(
        default=0.05, metadata={"help": "Steps of linear warm-up, or below 1 their share of all steps."}
    )
    adam_beta2: float = field(default=0.98, metadata={"help": "Second momentum of AdamW."})
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Compute in bfloat16. If not set, it is on where the GPU can."}
    )
    activation_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations in the backward pass to save memory."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Longest packed sequence in tokens. Longer ones are refused, never cut."}
    )
    logging_steps: float = field(default=50, metadata={"help": "Steps between two lines of the log."})
    save_strategy: str = field(default="no", metadata={"help": "When to write intermediate checkpoints."})
    report_to: None | str | list[str] = field(default="none", metadata={"help": "Service to send metrics to."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Keep off: the collator reads columns that the model does not take."}
    )

    def __post_init__(self):
        self._check_numbers()
        on_gpu = torch.cuda.is_available() and not self.use_cpu
        if self.bf16 is None:
            self.bf16 = on_gpu and not self.fp16 and torch.cuda.is_bf16_supported()
        self.dataloader_pin_memory = self.dataloader_pin_memory and on_gpu
        super().__post_init__()
        # The older of the transformers versions we support read the switch under this name alone.
        self.gradient_checkpointing = self.activation_checkpointing

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

    > Parameters with another default

    Parameters:
        learning_rate (`float`, *optional*, defaults to `1e-5`):
            Highest learning rate. open-unlearning, MMUnlearner and CLEAR.

    Raises:
        UserError: If the method, one of its arguments or the level is unknown, or a value is out of range.
    """

    _VALID_DICT_FIELDS = [*FineTuneConfig._VALID_DICT_FIELDS, "method_args"]

    learning_rate: float = field(default=1e-5, metadata={"help": "Highest learning rate."})
    method: str = field(default="npo", metadata={"help": "Unlearning method."})
    method_args: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Hyper-parameters of the method that differ from its defaults, as JSON."}
    )
    level: str | None = field(default=None, metadata={"help": "Level of the hierarchy that is forgotten."})
    forget_per_step: int = field(default=2, metadata={"help": "Images with rows to forget in a batch."})
    retain_per_step: int = field(default=4, metadata={"help": "Images with nothing to forget in a batch."})

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
        return config_class(**arguments)
    except UserError:
        raise
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(f"training arguments: {str(error).strip().partition(chr(10))[0]}") from error


def resolve(method: str, preset: str | None = None, **chosen: Any) -> tuple[Method, dict[str, Any]]:
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
        **chosen (`Any`):
            Hyper-parameters of the method and fields of [`UnlearnConfig`]; they override the preset.

    Returns:
        `tuple[Method, dict[str, Any]]`: The method, and the training arguments.

    Raises:
        UserError: If the method, preset or an argument is unknown, or a value is out of range.
    """
    values = (get_preset(method, preset) if preset else {}) | chosen
    of_method = method_arguments(method)
    of_training = {f.name for f in fields(UnlearnConfig)}
    for name in values:
        if name not in of_method and name not in of_training:
            raise UserError(f"{method} has no argument {name!r}; it has {', '.join(of_method)}")
    needed = preset and get_preset(method, preset).get("reference", INITIAL) is None
    if needed and values.get("reference") == INITIAL:
        raise UserError(
            f"{method}: preset {preset} compares with a retain-only model; give its folder with --reference"
        )
    instance = get_method(method)(**{name: value for name, value in values.items() if name in of_method})
    if not instance.uses_gradients and (unused := [n for n in chosen if n not in of_method and n != "seed"]):
        raise UserError(f"{method} does not train; it has no use for {', '.join(unused)}")
    return instance, {name: value for name, value in values.items() if name not in of_method}
