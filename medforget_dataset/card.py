"""The dataset card: its YAML head is what `load_dataset` reads, its body what people read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import DatasetCard, DatasetCardData

from .agreement import RESTRICTED_NOTICE
from .benchmark import CONFIGS, SPLITS, Benchmark
from .card_examples import IMAGES, CardExamples
from .corpora import CorpusProtocol
from .general_med.pmc_vqa import ATTRIBUTION
from .hierarchy import LEVELS
from .options import command


TEMPLATE = Path(__file__).with_name("dataset_card.md")
VIEW_NOTES = {
    "projection": "Turned views are true projections of the deformed volume.",
    "geometric": "**Turned views are pictures turned in their plane**, not views of the patient from another side: an "
    "acquired radiograph has no depth, and no generative model was given.",
    "svdrr": "Turned views were imagined by SV-DRR, a generative model, from the one acquired image.",
}
LICENSES = {"cc-by-3.0": "[CC BY 3.0](https://creativecommons.org/licenses/by/3.0/)"}
TEMPLATE_NOTE = (
    "Questions come from fixed wordings. A cloze hides the clinically salient term that the rest of its sentence "
    "gives least away. Classification has one constant set of four options for each kind of section, so that options "
    "cannot identify a study."
)
LLM_NOTE = (
    "Questions, options and paraphrases were written by the language model `{model}` at `{endpoint}` and checked by "
    "rule: a cloze answer is a verbatim span of its section, no question contains its answer. Options differ from "
    "study to study, so that part of a classification score may come from recognising them."
)
ANATOMY_NOTE = "General-med rows ask anatomy on slices and projections of the embedded CT."


def render_card(
    benchmark: Benchmark,
    features: datasets.Features,
    splits: dict,
    descriptions: dict[str, str],
    examples: CardExamples,
) -> str:
    """Fill `dataset_card.md`.

    Args:
        benchmark ([`~medforget_dataset.benchmark.Benchmark`]): What was built.
        features (`datasets.Features`): The row schema.
        splits (`dict`): (configuration, split) to its `rows`, `bytes` in memory, `file_bytes` on disk
            and `sha256`.
        descriptions (`dict[str, str]`): One sentence for each configuration.
        examples ([`~medforget_dataset.card_examples.CardExamples`]): Rows and pictures to show.

    Returns:
        `str`: The README with its YAML head.
    """
    corpus, options = benchmark.corpus, benchmark.options
    license: dict[str, Any] = _license(corpus)
    data = DatasetCardData(
        language=["en"],
        **license,
        pretty_name="MedForget",
        size_categories=[_size_category(sum(split["rows"] for split in splits.values()))],
        task_categories=["visual-question-answering"],
        task_ids=["visual-question-answering"],
        **_origins(benchmark),
        configs=[_config_entry(name) for name in CONFIGS],
        dataset_info=_dataset_infos(corpus, features, splits, descriptions),
        tags=_tags(corpus),
    )
    sections = Counter(row["section"] for row in benchmark.rows if row["task"] == "generation")
    return str(
        DatasetCard.from_template(
            data,
            template_path=str(TEMPLATE),
            corpus=corpus,
            license_text=LICENSES.get(corpus.license) or _license_text(corpus),
            examples=examples,
            image_folder=IMAGES,
            options=options,
            counts=options.counts,
            command=command(options),
            view_method=benchmark.view_method,
            view_note=_view_note(benchmark),
            question_note=_question_note(benchmark),
            general_med_note=ANATOMY_NOTE if options.general_med == "anatomy" else ATTRIBUTION,
            log_counts=benchmark.log.skipped.most_common(),
            studies=len(benchmark.nodes),
            rows=len(benchmark.rows),
            forgotten={level: len(benchmark.forgotten(level)) for level in LEVELS},
            splits=[(config, split, info["rows"], descriptions[config]) for (config, split), info in splits.items()],
            sections=[(name, count, 100 * count / sections.total()) for name, count in sections.most_common()],
        )
    )


def _origins(benchmark: Benchmark) -> dict[str, Any]:
    """Who wrote texts and answers, in the Hub's words."""
    is_rendered = benchmark.corpus.name == "embedded"
    return {
        "annotations_creators": ["machine-generated"],
        "language_creators": ["machine-generated"] if is_rendered else ["found", "machine-generated"],
        "multilinguality": ["monolingual"],
        "source_datasets": ["original" if is_rendered else "extended"],
    }


def _license_text(corpus: CorpusProtocol) -> str:
    return corpus.license_name or corpus.license


def _config_entry(name: str) -> dict:
    files = [{"split": split, "path": f"{name}/{split}-*.parquet"} for split in SPLITS[name]]
    return {"config_name": name, "data_files": files} | ({"default": True} if name == "finetune" else {})


def _license(corpus: CorpusProtocol) -> dict[str, str]:
    names = {"license": corpus.license, "license_name": corpus.license_name, "license_link": corpus.license_link}
    return {name: value for name, value in names.items() if value}


def _tags(corpus: CorpusProtocol) -> list[str]:
    kind = ["synthetic"] if corpus.name == "embedded" else ["restricted"] if corpus.restricted else []
    subject = [] if corpus.name == "table" else ["radiology", "chest-x-ray"]
    return ["machine-unlearning", "medical", *subject, "benchmark", *kind]


def _view_note(benchmark: Benchmark) -> str:
    note = VIEW_NOTES[benchmark.view_method]
    if benchmark.svdrr is None:
        return note
    made = benchmark.svdrr.record()
    said = f"Checkpoint `{made['model']}`, {made['image_size']} pixels, {made['axis']}; flip_pose {made['flip_pose']}"
    return f"{note} {said}, positive angles: {made['positive']}."


def _question_note(benchmark: Benchmark) -> str:
    options = benchmark.options
    if options.questions == "templates":
        return TEMPLATE_NOTE
    notes = [LLM_NOTE.format(model=options.llm_model, endpoint=options.endpoint)]
    if fixed := benchmark.log.skipped["no usable reply"]:
        notes.append(f"For {fixed} rows it gave nothing usable, and they have fixed wordings.")
    if options.endpoint_complies:
        notes.append(f"That restricted text may go there was stated so: “{options.endpoint_complies}”.")
    return " ".join(notes)


def _dataset_infos(
    corpus: CorpusProtocol, features: datasets.Features, splits: dict, descriptions: dict[str, str]
) -> list[dict]:
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
        mark = f"{RESTRICTED_NOTICE} " if corpus.restricted else ""
        described = {"description": f"{mark}{descriptions[name]} Content {digests}.", "license": _license_text(corpus)}
        entries.append(info._to_yaml_dict() | described)
    return entries


def _size_category(rows: int) -> str:
    return "n<1K" if rows < 1000 else "1K<n<10K" if rows < 10_000 else "10K<n<100K" if rows < 100_000 else "100K<n<1M"
