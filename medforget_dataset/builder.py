"""The dataset's configurations, declared once, as a `datasets` builder.

`MedForget(config_name="patient_forget")` generates, prepares and streams by itself. What the Hub and `load_dataset`
serve is the Parquet that [`~medforget_dataset.writer.build`] writes from the same rows.
"""

from __future__ import annotations

from dataclasses import field, fields, make_dataclass

import datasets

from .benchmark import CONFIGS, SPLITS, Benchmark
from .hierarchy import LEVELS, TASKS
from .options import BuildOptions


VERSION = "1.2.0"
FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "image": datasets.Image(),
        "question": datasets.Value("string"),
        "answer": datasets.Value("string"),
        "choices": datasets.List(datasets.Value("string")),
        "training_phrasings": datasets.List(datasets.Value("string")),
        "restricted": datasets.Value("bool"),
        "task": datasets.ClassLabel(names=list(TASKS)),
        "level": datasets.ClassLabel(names=list(LEVELS)),
        "institution": datasets.Value("string"),
        "patient": datasets.Value("string"),
        "study": datasets.Value("string"),
        "section": datasets.Value("string"),
        "view_angle": datasets.Value("float32"),
        "view_method": datasets.Value("string"),
        "original_question": datasets.Value("string"),
        "source": datasets.Value("string"),
    }
)
DESCRIPTIONS = {
    "finetune": "Every row of the benchmark.",
    **{f"{level}_forget": f"Rows to forget when a quarter of the nodes at {level} level must go." for level in LEVELS},
    **{f"{level}_retain": f"The exact complement of {level}_forget in finetune." for level in LEVELS},
    **{
        f"{level}_forget_rephrase": f"The rows of {level}_forget in held-out wordings, seen from another angle."
        for level in LEVELS
    },
    "general_med": "Medical questions that have nothing to do with any institution, patient or study.",
}


class _ConfigBase(datasets.BuilderConfig):
    """A configuration together with the build options it is generated with.

    Takes every field of [`~medforget_dataset.options.BuildOptions`], with the same defaults.
    """

    @property
    def options(self) -> BuildOptions:
        """The build options alone."""
        return BuildOptions(**{field.name: getattr(self, field.name) for field in fields(BuildOptions)})


MedForgetConfig = make_dataclass(
    "MedForgetConfig",
    [(option.name, option.type, field(default=option.default)) for option in fields(BuildOptions)],
    bases=(_ConfigBase,),
    namespace={"__doc__": _ConfigBase.__doc__, "__module__": __name__},
)


class MedForget(datasets.GeneratorBasedBuilder):
    """The dataset loading script of MedForget, in the form that `datasets` still runs.

    Example:
        >>> from medforget_dataset import MedForget
        >>> builder = MedForget(config_name="patient_forget", image_size=56)
        >>> row = next(iter(builder.as_streaming_dataset(split="train")))
        >>> row["id"].count("/")
        3
    """

    VERSION = datasets.Version(VERSION)
    BUILDER_CONFIG_CLASS = MedForgetConfig
    BUILDER_CONFIGS = [
        MedForgetConfig(name=name, version=datasets.Version(VERSION), description=DESCRIPTIONS[name])
        for name in CONFIGS
    ]
    DEFAULT_CONFIG_NAME = "finetune"

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(description=DESCRIPTIONS[self.config.name], features=FEATURES)

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(name=split, gen_kwargs={"split": split}) for split in SPLITS[self.config.name]]

    def _generate_examples(self, split: str):
        benchmark = Benchmark(self.config.options, workers=1)
        for example in benchmark.examples(self.config.name, split):
            yield example["id"], example
