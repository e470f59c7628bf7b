"""The parts of a checkpoint's card that come from `medforget.json`."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from medforget_dataset.hierarchy import FORGET_FRACTION, LEVELS, Counts

from .card_commands import portable, shown_arguments, stage_commands
from .methods import METHODS, method_arguments
from .plans import PLANS, make_plan


if TYPE_CHECKING:
    from .card_numbers import RunNumbers


SIDES = {
    "forget": "rows to forget",
    "retain": "rows to retain",
    "right_image": "rows learned",
    "wrong_image": "the same, shown another patient's image",
    "train": "`general_med`, rows learned",
    "test": "`general_med`, other rows",
}
_PLURALS = {"institution": "institutions", "patient": "patients", "study": "studies", "section": "sections"}
LICENSE_SENTENCES = {
    "apache-2.0": "The weights: Apache-2.0.",
    "mit": "The weights: MIT, the licence of the base model.",
}


def tags(info: dict[str, Any], *, is_adapter: bool, restricted: bool) -> list[str]:
    """Tags by which the Hub finds it."""
    of_method = [str(info["method"]).replace("_", "-")] if info.get("method") else []
    marks = (["lora"] if is_adapter else []) + (["restricted"] if restricted else [])
    return ["medforget", "machine-unlearning", "medical", *of_method, *marks]


def title(info: dict[str, Any]) -> str:
    """The heading."""
    config = str(info.get("config", ""))
    if info.get("stage") == "unlearn":
        return f"MedForget: {method_title(info)} at {info.get('level')} level"
    if info.get("stage") == "finetune" and config != "finetune":
        return f"MedForget: retrained without what the {config.removesuffix('_retain')} level forgets"
    return {
        "finetune": "MedForget: taught every row (vanilla)",
        "pretrain": "MedForget: the tiny model before it is taught",
    }.get(info.get("stage", ""), "MedForget checkpoint")


def method_title(info: dict[str, Any]) -> str:
    """The method as people write it."""
    name = str(info.get("method", ""))
    return METHODS[name].title if name in METHODS else name


def what(info: dict[str, Any]) -> str:
    """What kind of checkpoint it is, in a sentence or two."""
    config, level = str(info.get("config", "")), info.get("level")
    if info.get("stage") == "unlearn":
        return (
            f"This is a model that was taught everything and then made to forget the rows of `{level}_forget` with "
            f"the method {method_title(info)}, keeping the rows of `{level}_retain`."
        )
    if info.get("stage") == "finetune" and config != "finetune":
        return (
            f"This is a model that learned the rows of `{config}` and never saw the others: what a model that was "
            "made to forget them is compared with."
        )
    return {
        "finetune": "This is a model that learned every row of MedForget: what is then made to forget.",
        "pretrain": "This is a tiny Qwen2.5-VL that was made from nothing and learned general medical questions.",
    }.get(info.get("stage", ""), "This is a model of MedForget.")


def level_of(info: dict[str, Any]) -> str:
    """The level whose rows a checkpoint was made to forget, or never saw; empty if it is about none."""
    level = str(info.get("level") or str(info.get("config", "")).removesuffix("_retain"))
    return level if level in LEVELS else ""


def forgotten(info: dict[str, Any], record: dict[str, Any] | None) -> str:
    """How much was to be forgotten, or was left out, by level and count; nothing where nothing was."""
    level = level_of(info)
    if not level:
        return ""
    counts, selection = _counts(level, record), (record or {}).get("options", {}).get("selection", "")
    counts |= dict(info.get("forgotten") or {})
    if not counts.get("rows"):
        return (
            f"A quarter of the {_PLURALS[level]} of the dataset, chosen when it was built; how many was not recorded."
        )
    rows = f"{counts['rows']} of {counts['of']} rows"
    if selection == "flat" or not counts["nodes"]:
        return f"{rows}, drawn without regard to the hierarchy: as many as the {level} level has."
    nodes = f"{counts['nodes']} {_PLURALS[level] if counts['nodes'] > 1 else level}, a quarter of all"
    chosen = f" (selection `{selection}`)" if selection else ""
    return f"{nodes}{chosen}, with everything beneath: {rows}. Which they are is in the dataset, and is not told here."


def _counts(level: str, record: dict[str, Any] | None) -> dict[str, int]:
    """The same counts as `medforget.json` has them, from what was built."""
    if not record or not record.get("forgotten_rows"):
        return {}
    names = [field.name for field in dataclasses.fields(Counts)]
    sizes = [record["options"][name] for name in names]
    nodes = math.prod(sizes[: LEVELS.index(level) + 1]) // FORGET_FRACTION
    return {"nodes": nodes, "rows": record["forgotten_rows"][level], "of": Counts(*sizes).rows}


def evaluation(info: dict[str, Any], repo_id: str) -> str:
    """The command that evaluates it."""
    level = level_of(info)
    tasks = f"medforget_{level}" if level else "medforget" if info.get("config") else "medforget_general_med"
    return f"MEDFORGET_DIR=medforget medforget eval --model_args pretrained={repo_id} --tasks {tasks} --batch_size 64"


def exact_table(info: dict[str, Any]) -> str:
    """The shares of rows answered exactly that were taken when it was written, as Markdown."""
    scores = {side: tasks for side, tasks in (info.get("exact_match") or {}).items() if isinstance(tasks, dict)}
    if not scores:
        return ""
    kinds = sorted({task for side in scores.values() for task in side} - {"all"})
    lines = [f"| | {' | '.join(kinds)} |", f"|---|{'---:|' * len(kinds)}"]
    for side, tasks in scores.items():
        cells = [f"{100 * tasks[kind]:.1f} %" if kind in tasks else "–" for kind in kinds]
        lines.append(f"| {SIDES.get(side, side)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def arguments(info: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Name, value and meaning of every argument that the weights depend on."""
    method = str(info.get("method", ""))
    if method:
        yield "method", method_title(info), f"`{method}`"
    known = method_arguments(method) if method in METHODS else {}
    for name, value in (info.get("method_arguments") or {}).items():
        help = known[name].metadata["help"] if name in known else ""
        yield f"`{name}`", _value(name, value), help
    if info.get("preset"):
        yield "preset", f"`{info['preset']}`", "named arguments, of which the values are these"
    for name, value in shown_arguments(info).items():
        yield f"`{name}`", _value(name, value), ""
    if "seed" in info and "seed" not in (info.get("arguments") or {}):
        yield "`seed`", str(info["seed"]), ""
    if info.get("max_pixels"):
        yield "`max_pixels`", str(info["max_pixels"]), "most pixels of an image"
    if images := info.get("images_per_step"):
        words = "to forget from and to retain" if info.get("stage") == "unlearn" else "taught, and rehearsed"
        shown = " and ".join(map(str, images)) if isinstance(images, list | tuple) else str(images)
        yield "images a step", shown, words if isinstance(images, list | tuple) else ""
    if info.get("steps"):
        yield "optimisation steps", str(info["steps"]), ""


def _value(name: str, value: Any) -> str:
    return f"`{portable(name, value)}`".replace("|", "\\|")


def details(info: dict[str, Any]) -> Iterator[str]:
    """What else was recorded of how it was made."""
    if info.get("kept_step"):
        yield f"The weights are those of step {info['kept_step']}, which separated best."
    if info.get("stopped"):
        yield "Training was stopped before its time, since too little was retained or the loss was no number."
    if edit := info.get("edit"):
        parts = ", ".join(f"{part} {count}" for part, count in edit.get("by_part", {}).items())
        yield f"{edit.get('zeroed')} of {edit.get('total')} channels of its MLPs were set to zero ({parts})."
    if versions := info.get("versions"):
        yield f"Made with {', '.join(f'{name} {version}' for name, version in versions.items())}."


def unlearned_before(stages: Sequence[dict[str, Any]], record: dict[str, Any] | None) -> Iterator[str]:
    """What the stages before its own made it forget, a sentence each."""
    for info in stages[:-1]:
        if info.get("stage") == "unlearn":
            rows = (_counts(level_of(info), record) | dict(info.get("forgotten") or {})).get("rows")
            count = f"{rows} rows" if rows else "how many rows was not recorded"
            how = f"{method_title(info)} at {info.get('level')} level"
            yield f"Its base had been unlearned before, with {how}: {count}."


def adapted(stages: Sequence[dict[str, Any]], base: str | None, root: str | None) -> tuple[str, list[str]]:
    """
    The whole model that an adapter leads to, and the adapters between, the innermost first.

    A name that is not known is a word in capitals.
    """
    merged: list[str] = []
    for info in reversed(stages[:-1]):
        if not info.get("save_adapter"):
            break
        merged.insert(0, (base or "BASE") if not merged else f"ADAPTER_{'I' * len(merged)}")
    if not merged:
        return base or "BASE", []
    return (root if root and len(merged) == len(stages) - 1 else None) or "WHOLE_MODEL", merged


def loading(repo_id: str, whole: str, merged: Sequence[str], dataset: str | None, *, is_adapter: bool) -> str:
    """Code that loads it and asks a question; a base that is an adapter is merged before the next is put on it."""
    imports = ["from datasets import load_dataset", *(["from peft import PeftModel"] if is_adapter else [])]
    imports.append("from transformers import AutoModelForImageTextToText, AutoProcessor")
    lines = [f'model = AutoModelForImageTextToText.from_pretrained("{whole if is_adapter else repo_id}")']
    lines += [f'model = PeftModel.from_pretrained(model, "{name}").merge_and_unload()' for name in merged]
    lines += [f'model = PeftModel.from_pretrained(model, "{repo_id}")'] if is_adapter else []
    lines += [
        f'processor = AutoProcessor.from_pretrained("{repo_id}")',
        "",
        f'row = load_dataset("{dataset or "medforget"}", split="train")[0]',
        'content = [{"type": "image"}, {"type": "text", "text": row["question"]}]',
        'prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)',
        'inputs = processor(images=row["image"].convert("RGB"), text=prompt, return_tensors="pt")',
        "answer = model.generate(**inputs, max_new_tokens=64)[0, inputs.input_ids.shape[1] :]",
        "processor.decode(answer, skip_special_tokens=True)",
    ]
    return "\n".join([*imports, "", *lines])


def commands(
    stages: Sequence[dict[str, Any]], *, base: str | None, is_tiny: bool, record: dict[str, Any] | None
) -> list[str]:
    """The commands that make it again, stage by stage."""
    made = list(stage_commands(stages, base=base, is_tiny=is_tiny, record=record))
    return made if record else ["medforget build --out medforget  # with the options of the dataset's own card", *made]


def placeholders(lines: Sequence[str]) -> str:
    """What the words in capitals stand for."""
    found = sorted(
        {word for line in lines for word in re.findall(r"(?<=[ =])[A-Z][A-Z_]+\b(?!/)", line.split("#")[0])}
    )
    if not found:
        return ""
    shown = ", ".join(f"`{word}`" for word in found)
    return (
        f"{shown}: what this card does not name, such as a place on the machine where it was made, an address or a "
        "person."
    )


def run_command(settings: dict[str, Any], name: str) -> str:
    """The call of `medforget run` that made a run; nothing where no call makes the same."""
    plan, preset = settings.get("plan") or {}, settings.get("preset")
    if preset not in PLANS or any(key not in plan for key in ("seed", "levels", "methods")):
        return ""
    default = make_plan(preset)
    words = ["medforget", "run", "--preset", preset]
    words += ["--seed", str(plan["seed"])] if plan["seed"] != default.seed else []
    for key in ("levels", "methods"):
        words += [f"--{key}", *plan[key]] if tuple(plan[key]) != getattr(default, key) else []
    return " ".join(words)


def limits(info: dict[str, Any], *, is_tiny: bool, numbers: RunNumbers | None) -> Iterator[str]:
    """What must not be concluded from it."""
    yield (
        "Unlearning is not a privacy guarantee. A question that is no longer answered may be answered in other words, "
        "under another attack, or after a little more training."
    )
    if numbers is None:
        yield "Nothing about forgetting has been measured but what is above."
    else:
        if numbers.unmeasured:
            yield f"Not measured of this checkpoint: {', '.join(numbers.unmeasured)}."
        yield "One run with one seed: another seed of training can move a number by more than its interval."
        if "lexical" in numbers.judges:
            yield (
                "The judge of generated text is lexical: it compares the clinical findings that are named, a proxy "
                "for what a reader would say."
            )
        if info.get("stage") == "unlearn":
            yield "Forgetting was tested for one level and one choice of nodes."
    if is_tiny:
        yield (
            "A tiny model, trained from nothing on one dataset: it answers the questions of this dataset and "
            "nothing else, and what a method does to it need not hold for a large model."
        )
        yield (
            "Its tokenizer was trained on the texts of the dataset and holds words of names that occur there, also of "
            "what is forgotten: unlearning changes weights, and not the tokenizer."
        )


def license_sentence(license: str | None, *, restricted: bool) -> str:
    """The licence in words."""
    if restricted:
        return "The weights may not be shared: they derive from data under a data use agreement."
    return LICENSE_SENTENCES.get(license or "", "The weights: the licence of the base model holds.")
