"""The dataset card: its YAML head is what `load_dataset` reads, its body what people read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import datasets
from huggingface_hub import DatasetCard, DatasetCardData

from .benchmark import CONFIGS, SPLITS, Benchmark
from .hierarchy import LEVELS


TEMPLATE = Path(__file__).with_name("dataset_card.md")


def render_card(benchmark: Benchmark, features: datasets.Features, splits: dict, descriptions: dict[str, str]) -> str:
    """Fill `dataset_card.md`.

    Args:
        benchmark ([`~medforget_dataset.benchmark.Benchmark`]): What was built.
        features (`datasets.Features`): The row schema.
        splits (`dict`): (configuration, split) to its `rows`, `bytes` in memory, `file_bytes` on disk
            and `sha256`.
        descriptions (`dict[str, str]`): One sentence for each configuration.

    Returns:
        `str`: The README with its YAML head.
    """
    corpus, options = benchmark.corpus, benchmark.options
    data = DatasetCardData(
        language="en",
        license=corpus.license,
        pretty_name="MedForget",
        size_categories=[_size_category(sum(split["rows"] for split in splits.values()))],
        task_categories=["visual-question-answering"],
        configs=[_config_entry(name) for name in CONFIGS],
        dataset_info=_dataset_infos(features, splits, descriptions),
        tags=["machine-unlearning", "medical", "radiology", "chest-x-ray", "benchmark", "synthetic"],
    )
    sections = Counter(row["section"] for row in benchmark.rows if row["task"] == "generation")
    return str(
        DatasetCard.from_template(
            data,
            template_path=str(TEMPLATE),
            corpus=corpus,
            options=options,
            counts=options.counts,
            studies=len(benchmark.nodes),
            rows=len(benchmark.rows),
            forgotten={level: len(benchmark.forgotten(level)) for level in LEVELS},
            splits=[(config, split, info["rows"], descriptions[config]) for (config, split), info in splits.items()],
            sections=[(name, count, 100 * count / sections.total()) for name, count in sections.most_common()],
        )
    )


def _config_entry(name: str) -> dict:
    files = [{"split": split, "path": f"{name}/{split}-*.parquet"} for split in SPLITS[name]]
    return {"config_name": name, "data_files": files} | ({"default": True} if name == "finetune" else {})


def _dataset_infos(features: datasets.Features, splits: dict, descriptions: dict[str, str]) -> list[dict]:
    entries = []
    for name in CONFIGS:
        own = {split: splits[name, split] for split in SPLITS[name]}
        info = datasets.DatasetInfo(
            features=features,
            config_name=name,
            splits=datasets.SplitDict(
                {
                    split: datasets.SplitInfo(split, num_bytes=x["bytes"], num_examples=x["rows"])
                    for split, x in own.items()
                }
            ),
            download_size=sum(x["file_bytes"] for x in own.values()),
            dataset_size=sum(x["bytes"] for x in own.values()),
        )
        # `load_dataset` keeps what it prepared under a name made from this head, not from the files' content: with
        # the files' digests in it, another build is never answered from the cache of this one.
        digests = " ".join(x["sha256"][:16] for x in own.values())
        entries.append(info._to_yaml_dict() | {"description": f"{descriptions[name]} Content {digests}."})
    return entries


def _size_category(rows: int) -> str:
    return "n<1K" if rows < 1000 else "1K<n<10K" if rows < 10_000 else "10K<n<100K" if rows < 100_000 else "100K<n<1M"
