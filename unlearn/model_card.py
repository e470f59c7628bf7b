"""The card of a checkpoint: what it is, what it was to forget, what was measured, and whether it may be shared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import yaml
from huggingface_hub import ModelCardData, eval_result_entries_to_yaml

from harness_tasks.adapters import ADAPTER_CONFIG
from medforget_dataset.agreement import says_it_is_free
from medforget_dataset.errors import UserError
from medforget_dataset.publishing import check_name

from . import card_texts as texts
from .card_commands import hub_base
from .stages import RUN_FILE


if TYPE_CHECKING:
    from .card_lineage import Lineage
    from .card_numbers import RunNumbers


TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
PLACEHOLDER = "ORG/NAME"
"""Stands for the repository as long as it is not known."""
EVAL_RESULTS = ".eval_results/medforget.yaml"
RESTRICTED = (
    "**This checkpoint is restricted.** It was trained on data under a data use agreement, may reproduce parts of it, "
    "and must not be shared."
)
LICENSES = {"lingshu-medical-mllm/Lingshu-7B": "mit", "Qwen/Qwen2.5-VL-7B-Instruct": "apache-2.0"}
"""Licences of the base models that have a preset, as their own cards say."""


def render_model_card(info: dict[str, Any]) -> str:
    """
    The README of a checkpoint as it is saved: nothing has been measured of it yet.

    Args:
        info (`dict[str, Any]`):
            What goes into `medforget.json`: `stage`, `restricted`, and what the stage has.

    Returns:
        `str`: YAML head and text. Names of patients or institutions, and places on this machine, are never in it.
    """
    base = hub_base(info)
    is_tiny = info.get("stage") == "pretrain" or bool(info.get("base") and info["base"] == info.get("preset"))
    restricted = not says_it_is_free(info)
    return _render(info, (info,), PLACEHOLDER, restricted=restricted, is_tiny=is_tiny, base=base, root=base)


def card_files(
    checkpoint: Path,
    *,
    repo_id: str,
    run: Path | None = None,
    base: str | None = None,
    dataset: str | None = None,
) -> dict[str, str]:
    """
    The card of a checkpoint as it is published, with the numbers of the run that evaluated it.

    Args:
        checkpoint (`Path`):
            Its folder.
        repo_id (`str`):
            `ORG/NAME` on the Hub.
        run (`Path`, *optional*):
            Folder of a `medforget run`, in which the checkpoint lies. By default the checkpoint's parent, if that has
            a report that knows it as it is now.
        base (`str`, *optional*):
            Hub id of the model that it was made from; by default what `medforget.json` says, if that is a Hub id.
        dataset (`str`, *optional*):
            Hub id of the dataset; by default likewise.

    Returns:
        `dict[str, str]`: Paths in the repository to their text: `README.md`, and `.eval_results/medforget.yaml` where
        there are results and the dataset is on the Hub.

    Raises:
        UserError: The run has no report that knows the checkpoint as it is now, or a name is not a Hub id.
    """
    # Both need checkpoints, which write this module's cards.
    from .card_lineage import trace

    for flag, name in (("", repo_id), ("--base", base), ("--dataset", dataset)):
        if name is not None:
            check_name(name, flag)
    lineage, numbers = trace(checkpoint), _numbers(checkpoint, run)
    info, dataset = lineage.stages[-1], dataset or lineage.dataset
    is_adapter = (checkpoint / ADAPTER_CONFIG).is_file()
    text = _render(
        info,
        lineage.stages,
        repo_id,
        restricted=not says_it_is_free(info),
        is_tiny=lineage.is_tiny,
        is_adapter=is_adapter,
        base=base or _own_base(lineage, is_adapter),
        root=lineage.base,
        dataset=dataset,
        record=(numbers.report.get("data") if numbers else None) or lineage.record,
        numbers=numbers,
    )
    files = {"README.md": text}
    if numbers and dataset:
        entries = eval_result_entries_to_yaml(numbers.eval_entries(dataset))
        files[EVAL_RESULTS] = yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)
    return files


def _measured(numbers: RunNumbers | None) -> dict[str, Any]:
    if numbers is None:
        return {"lead": "", "tables": [], "points": []}
    from .card_tables import card_tables, lead, more_measures

    return {"lead": lead(numbers), "tables": card_tables(numbers), "points": list(more_measures(numbers))}


def _numbers(checkpoint: Path, run: Path | None) -> RunNumbers | None:
    from .card_numbers import REPORT, RunNumbers

    folder, name = checkpoint.resolve().parent, checkpoint.resolve().name
    if run is None:
        if not (folder / REPORT).is_file() or not (folder / RUN_FILE).is_file():
            return None
        numbers = RunNumbers(folder, name)
        return numbers if numbers.method and numbers.is_of_checkpoint else None
    if run.resolve() != folder:
        raise UserError(f"--run {run}: {checkpoint} does not lie in it; give the run that made it, or leave it out")
    numbers = RunNumbers(run, name)
    if not numbers.method:
        raise UserError(f"--run {run}: its report has no scores of {name}; run `medforget run` again, or leave it out")
    if not numbers.is_of_checkpoint:
        raise UserError(f"--run {run}: its scores are not of the checkpoint that is now in {name}; leave it out")
    return numbers


def _own_base(lineage: Lineage, is_adapter: bool) -> str | None:
    """An adapter belongs to the very model it was trained on, a whole model also to that model's base."""
    return lineage.base if len(lineage.stages) == 1 or not is_adapter else None


def _render(
    info: dict[str, Any],
    stages: tuple[dict[str, Any], ...],
    repo_id: str,
    *,
    restricted: bool,
    is_tiny: bool,
    is_adapter: bool | None = None,
    base: str | None = None,
    root: str | None = None,
    dataset: str | None = None,
    record: dict[str, Any] | None = None,
    numbers: RunNumbers | None = None,
) -> str:
    is_adapter = bool(info.get("save_adapter")) if is_adapter is None else is_adapter
    license = "apache-2.0" if is_tiny else LICENSES.get(root or base or "")
    head = ModelCardData(
        language="en",
        license="other" if restricted else license,
        license_name="data-use-agreement" if restricted else None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="image-text-to-text",
        base_model=base,
        base_model_relation=("adapter" if is_adapter else "finetune") if base else None,
        datasets=[dataset] if dataset else None,
        tags=texts.tags(info, is_adapter=is_adapter, restricted=restricted),
        model_name=repo_id.rpartition("/")[2] if numbers else None,
        eval_results=numbers.eval_results(dataset) if numbers else None,
    )
    made_again = texts.commands(stages, base=root or base, is_tiny=is_tiny, record=record)
    whole, merged = texts.adapted(stages, base, root) if is_adapter else (repo_id, [])
    unnamed = [f" {name}" for name in (whole, *merged) if name.isupper() and "/" not in name]
    context = {
        "head": head,
        "title": texts.title(info),
        "what": texts.what(info),
        "restricted": RESTRICTED if restricted else "",
        "corpus": numbers.report["corpus"] if numbers else "",
        "forgotten": texts.forgotten(info, record),
        "forgotten_title": "What was to be forgotten" if info.get("stage") == "unlearn" else "What it never saw",
        **_measured(numbers),
        "evaluation": texts.evaluation(info, repo_id),
        "exact": texts.exact_table(info),
        "arguments": list(texts.arguments(info)),
        "details": list(texts.details(info)),
        "loading": texts.loading(repo_id, whole, merged, dataset, is_adapter=is_adapter),
        # Of a base outside these folders nobody can tell what it is, except of those that have a preset.
        "asks_whole": is_adapter and len(stages) == 1 and base not in LICENSES,
        "before": list(texts.unlearned_before(stages, record)),
        "run_command": texts.run_command(numbers.report["run"], numbers.name) if numbers else "",
        "commands": made_again,
        "placeholders": texts.placeholders([*made_again, *unnamed]),
        "limits": list(texts.limits(info, is_tiny=is_tiny, numbers=numbers)),
        "license": texts.license_sentence(license, restricted=restricted),
    }
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(context)
