"""The model card: what the Hub reads of it, that its numbers are the report's, that it names nobody and no place."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from report_runs import FinishedRun, undrawn

import unlearn.finetune
import unlearn.unlearning
from medforget_dataset import UserError
from unlearn.cli import main
from unlearn.config import resolve
from unlearn.measures.probe import FORMAT, KEY
from unlearn.model_card import EVAL_RESULTS, card_files, render_model_card
from unlearn.pipeline import write_run_report
from unlearn.training import fingerprint
from unlearn.unlearning import forget_and_retain, forgotten_counts


REPO, DATASET = "org/model", "org/medforget"
VERSIONS = {"torch": "2.15.0"}
VANILLA = {
    "stage": "finetune",
    "base": "tiny",
    "base files": None,
    "config": "finetune",
    "preset": "tiny",
    "arguments": {"seed": 3, "learning_rate": 0.003, "lr_scheduler_kwargs": {"min_lr_rate": 0.02}},
    "exact_match": {"right_image": {"all": 0.9, "cloze": 0.875}, "wrong_image": {"all": 0.1, "cloze": 0.0}},
}
NPO = {
    "stage": "unlearn",
    "level": "patient",
    "method": "npo",
    "method_arguments": {"beta": 0.5, "retain_weight": 2.0, "reference": "initial", "log_ratio": "sum"},
    "preset": "tiny-robust",
    "arguments": {"seed": 3, "learning_rate": 0.001, "num_train_epochs": 16, "use_peft": True},
    "images_per_step": [2, 4],
    "steps": 128,
    "forgotten": {"nodes": 4, "rows": 224, "of": 960},
    "exact_match": {"forget": {"cloze": 0.0}, "retain": {"cloze": 0.97}},
}
METRICS = {"generation": "gen_score", "classification": "acc", "cloze": "exact_match", "identity": "exact_match"}
SHARED = {"seed": 3, "max_pixels": None, "save_adapter": False, "restricted": False, "versions": VERSIONS}


def write_info(folder, info, data, base=None):
    """A checkpoint's record as training writes it, of a base that lies in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    places = {"data": str(data), "data files": fingerprint(data)}
    if base:
        places |= {"base": str(base), "base files": fingerprint(base)}
    (folder / "medforget.json").write_text(json.dumps(info | SHARED | places))
    return folder


@pytest.fixture(scope="module")
def run(data_dir, tmp_path_factory):
    """A finished run whose checkpoints say what made them."""
    made = FinishedRun(tmp_path_factory.mktemp("cards") / "run", data_dir, ("patient",), ("npo",), probed=True)
    vanilla = write_info(made.folder / "vanilla", VANILLA, data_dir)
    write_info(made.folder / "retrained-patient", VANILLA | {"config": "patient_retain"}, data_dir)
    write_info(made.folder / "npo-patient", NPO, data_dir, vanilla)
    with undrawn():
        write_run_report(made.folder)
    return made.folder


@pytest.fixture(scope="module")
def records(run):
    return json.loads((run / "report.json").read_text())["records"]


@pytest.fixture(scope="module")
def files(run):
    return card_files(run / "npo-patient", repo_id=REPO, dataset=DATASET, base="org/vanilla")


def section(text, title):
    after = re.split(rf"^##+ {title}$", text, flags=re.MULTILINE)[1]
    return re.split(r"^##", after, flags=re.MULTILINE)[0]


def table(text):
    """Cells of the first table of a text, without markup, by the first two columns."""
    lines = [line for line in text.splitlines() if line.startswith("| ")][2:]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {tuple(row[:2]): row[2:] for row in cells}


def shown(record, sign=""):
    """A record as a cell of the card shows it."""
    value, low, high = (f"{100 * record[k]:{sign if k == 'value' else ''}.1f}" for k in ("value", "low", "high"))
    return f"{value}<br><sub>{low} to {high}</sub>".replace("-", "−")


def test_the_head_is_what_the_hub_reads(files):
    head = ModelCard(files["README.md"]).data
    assert (head.license, head.library_name, head.pipeline_tag) == ("apache-2.0", "transformers", "image-text-to-text")
    assert (head.base_model, head.base_model_relation, head.datasets) == ("org/vanilla", "finetune", [DATASET])
    assert {"medforget", "machine-unlearning", "npo"} <= set(head.tags) and "restricted" not in head.tags
    assert head.model_name == "model"


def test_results_in_the_head_and_beside_it_are_the_reports(files, records):
    expected = {}
    for record in records:
        is_of_it = record["measure"] == "score" and record.get("checkpoint") == "npo-patient"
        if is_of_it and record["split"] != "attack":
            task = record["file"].rpartition("/")[2].removesuffix(".jsonl")
            expected[task, record["metric"]] = record
    entries = parse_eval_result_entries(yaml.safe_load(files[EVAL_RESULTS]))
    results = ModelCard(files["README.md"]).data.eval_results
    assert len(entries) == len(results) == 15
    metrics = {"Gen Score": "gen_score", "accuracy": "acc", "exact match": "exact_match"}
    for entry in entries:
        record = expected[entry.task_id, metrics[entry.notes.partition(",")[0]]]
        assert entry.dataset_id == DATASET and entry.value == round(100 * record["value"], 2)
        assert f"n {record['n']}, low {round(100 * record['low'], 2)}" in entry.notes
    values = {(result.dataset_config, result.metric_name.split(", ")[1]): result for result in results}
    matched = 0
    for (task, metric), record in expected.items():
        config = "general_med" if record["split"] == "general_med" else f"patient_{record['split']}"
        result = values.get((config.replace("_rephrase", "_forget_rephrase"), record["task"]))
        if result and result.metric_type == metric:
            assert result.metric_value == round(100 * record["value"], 2), task
            assert result.metric_args["n"] == record["n"]
            matched += 1
    assert matched == 15


def test_tables_show_the_reports_numbers(files, records):
    found = {
        (r["measure"], r["checkpoint"], r.get("split", ""), r.get("task", ""), r["metric"]): r
        for r in records
        if "checkpoint" in r
    }
    scores = table(section(files["README.md"], "Scores"))
    assert len(scores) == 15
    for (split, task), cells in scores.items():
        kind = task.partition(" ")[0]
        about = (split.replace("-", "_"), kind, METRICS[kind])
        own = found["score", "npo-patient", *about]
        assert cells[:2] == [str(own["n"]), shown(own)]
        if split != "general-med":
            assert cells[2] == shown(found["gap", "npo-patient", *about], sign="+")
        assert cells[3:] == [shown(found["score", name, *about]) for name in ("retrained-patient", "vanilla")]
    chosen = section(files["README.md"], "Selectivity")
    for kind, metric in METRICS.items():
        assert f"| {kind} | {shown(found['selectivity', 'npo-patient', '', kind, metric], '+')} |" in chosen


def test_every_form_of_the_attack_is_read(files, records):
    attack = section(files["README.md"], "Reconstruction attack")
    lines = [line for line in attack.splitlines() if line.startswith("| ")][2:]
    assert [line.rstrip(" |").rpartition(" | ")[2] for line in lines] == [*["beyond retrained"] * 3, "uninformative"]
    leaks = {r["task"]: r for r in records if r["measure"] == "leak" and r["metric"] == "gen_score"}
    for context, line in zip(("none", "study", "patient"), lines, strict=False):
        assert shown({**leaks[context]}, "+") in line and leaks[context]["low"] > 0


def test_it_says_how_much_was_forgotten_how_and_what_is_not_known(files):
    text = files["README.md"]
    assert "4 patients, a quarter of all (selection `stratified`), with everything beneath: 224 of 960 rows" in text
    for name, value in (NPO["method_arguments"] | NPO["arguments"]).items():
        assert f"| `{name}` | `{json.dumps(value).strip(chr(34))}` |" in text
    assert "| optimisation steps | 128 |" in text and "torch 2.15.0" in text
    assert "not a privacy guarantee" in text and "one seed" in text and "lexical" in text
    assert "medforget run --preset demo --methods npo" in text
    assert "Its tokenizer was trained on the texts of the dataset" in text


def test_it_says_what_else_was_measured_and_what_was_not(run, files, records, tmp_path):
    more = section(files["README.md"], "More measures")
    probability = next(
        r for r in records if r["id"] == "probe/npo-patient/patient/finetune/forget/all/answer_probability"
    )
    assert f"on forget rows: {100 * probability['value']:.1f} %" in more and "p = " in more
    assert "(a small p: told apart from the retrained model)" in more
    assert "taught the forgotten rows of 2 images again" in more
    assert "Not measured of this checkpoint" not in files["README.md"]
    report = json.loads((run / "report.json").read_text())
    report["records"] = [r for r in records if r["measure"] in ("score", "gap") and r.get("split") != "attack"]
    (tmp_path / "report.json").write_text(json.dumps(report))
    (tmp_path / "run.json").write_bytes((run / "run.json").read_bytes())
    folder = tmp_path / "npo-patient"
    folder.mkdir()
    (folder / "medforget.json").write_bytes((run / "npo-patient" / "medforget.json").read_bytes())
    text = card_files(folder, repo_id=REPO)["README.md"]
    missing = "the reconstruction attack, answer probabilities, membership, relearning"
    assert f"Not measured of this checkpoint: {missing}." in text
    assert "### Selectivity" not in text and "### Reconstruction attack" not in text


@pytest.mark.parametrize("knows", ["evaluation", "probe"])
def test_scores_of_a_checkpoint_that_was_written_over_are_not_its_own(knows, run, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(run, again)
    file = again / "npo-patient" / "medforget.json"
    info = json.loads(file.read_text())
    file.write_text(json.dumps(info | {"run": "first"}))
    if knows == "evaluation":
        (again / "evaluation" / "npo-patient" / "checkpoint.json").write_text('{"checkpoint_run": "first"}')
    else:
        probe = again / "probes" / "npo-patient.parquet"
        told = {KEY: json.dumps({"format": FORMAT, "checkpoint_run": "first"}).encode()}
        pq.write_table(pq.read_table(probe).replace_schema_metadata(told), probe)
    for named in (None, again):
        assert "model-index" in card_files(file.parent, repo_id=REPO, run=named)["README.md"]
    for other in ("second", None):
        file.write_text(json.dumps(info | {"run": other}))
        text = card_files(file.parent, repo_id=REPO)["README.md"]
        assert "has not been evaluated" in text and "model-index" not in text
        with pytest.raises(UserError, match="scores are not of the checkpoint that is now in npo-patient"):
            card_files(file.parent, repo_id=REPO, run=again)


def test_cards_name_nobody_and_no_place(run, data_dir, tmp_path):
    secret = {
        "reference": "/home/me/retrained",
        "deepspeed": "~/zero3.json",
        "hub_token": "hf_x",
        "run_name": "for Ann",
    }
    told = NPO | {"method_arguments": NPO["method_arguments"] | {"reference": secret["reference"]}}
    told |= {"arguments": NPO["arguments"] | {k: v for k, v in secret.items() if k != "reference"}}
    spied = write_info(tmp_path / "spied", told | {"stopped": "/home/me/x"}, data_dir, run / "vanilla")
    places = [*(run / name for name in ("vanilla", "retrained-patient", "npo-patient")), spied]
    texts = [text for place in places for text in card_files(place, repo_id=REPO, dataset=DATASET).values()]
    texts.append(render_model_card(json.loads((spied / "medforget.json").read_text())))
    rows = pq.read_table(next((data_dir / "finetune").glob("*.parquet")), columns=["institution", "patient", "study"])
    names = {name for column in rows.columns for name in column.to_pylist()}
    assert len(names) == 4 + 16 + 64
    for text in texts:
        assert not [name for name in names if name in text]
        assert not re.search(r"\b(inst|pat|study)\d{2,}", text)
        assert not re.search(r"(?<![\w:/.*)<])[~/][A-Za-z]", text), re.search(r".*(?<![\w:/.*)<])[~/][A-Za-z].*", text)
        assert not [value for value in secret.values() if value in text]
    assert "--reference REFERENCE" in texts[-1] and "deepspeed=DEEPSPEED" in texts[-1]
    assert "`BASE`, `DEEPSPEED`, `REFERENCE`: what this card does not name, such as a place" in texts[-1]


def test_the_commands_are_calls_that_do_the_same(files, monkeypatch):
    calls = []
    monkeypatch.setattr(unlearn.finetune, "finetune", lambda *args, **kwargs: calls.append((args, kwargs)) or {})
    monkeypatch.setattr(unlearn.unlearning, "unlearn", lambda *args, **kwargs: calls.append((args, kwargs)) or {})
    commands = re.search(r"```bash\n(medforget build.*?)```", files["README.md"], re.DOTALL)[1].splitlines()
    assert commands[0] == "medforget build --institutions 4 --patients 4 --image-size 56 --out medforget"
    for line in commands[1:]:
        assert main(shlex.split(line)[1:]) == 0
    (_, taught), (_, forgot) = calls
    assert (taught["config"], taught["preset"], taught["model"]) == ("finetune", "tiny", None)
    assert VANILLA["arguments"].items() <= taught.items()
    names = ("data", "model", "preset", "level", "method", "views", "workers")
    asked = {k: v for k, v in forgot.items() if k not in (*names, "resume", "overwrite", "save_adapter")}
    asked = {k: v for k, v in asked.items() if k not in ("model_preset", "max_pixels")}
    method, training = resolve("npo", forgot["preset"], **asked)
    assert (forgot["model"], forgot["level"], forgot["save_adapter"]) == ("vanilla", "patient", False)
    assert method.arguments() == NPO["method_arguments"] and training == NPO["arguments"]


def test_the_code_on_the_card_loads_and_answers(tiny_checkpoint, data_dir, monkeypatch):
    text = render_model_card({"stage": "pretrain"}).replace("ORG/NAME", str(tiny_checkpoint))
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].replace("max_new_tokens=64", "max_new_tokens=2")
    monkeypatch.chdir(data_dir.parent)
    names = {}
    exec(code.replace("processor.decode(", "said = processor.decode("), names)
    assert isinstance(names["said"], str) and names["answer"].shape == (2,)


def test_an_adapter_belongs_to_the_model_that_is_named(run, data_dir, tmp_path):
    folder = write_info(tmp_path / "adapter", NPO, data_dir, run / "vanilla")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(run / "vanilla")}))
    card = ModelCard(card_files(folder, repo_id=REPO, base="org/vanilla")["README.md"])
    head = card.data
    assert (head.library_name, head.base_model, head.base_model_relation) == ("peft", "org/vanilla", "adapter")
    assert 'from_pretrained("org/vanilla")' in card.text and f'PeftModel.from_pretrained(model, "{REPO}")' in card.text
    unnamed = ModelCard(card_files(folder, repo_id=REPO)["README.md"])
    assert "base_model" not in unnamed.data.to_dict() and 'from_pretrained("BASE")' in unnamed.text
    assert "`BASE`: what this card does not name" in unnamed.text


def test_an_adapter_of_an_adapter_is_put_on_the_merged_one(data_dir, tmp_path):
    root = "Qwen/Qwen2.5-VL-7B-Instruct"
    taught = write_info(tmp_path / "taught", VANILLA | {"base": root, "base files": root, "preset": None}, data_dir)
    places, base = [taught], taught
    for name in ("first", "second"):
        base = write_info(tmp_path / name, NPO, data_dir, base)
        places.append(base)
    for place in places:
        (place / "adapter_config.json").write_text("{}")
        file = place / "medforget.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"save_adapter": True}))
    for place, before in zip(places[1:], places[:-1], strict=True):
        file = place / "medforget.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base files": fingerprint(before)}))
    card = card_files(places[2], repo_id=REPO, base="org/first")["README.md"]
    loads = re.findall(r"^model = .*$", card, re.MULTILINE)
    assert loads == [
        f'model = AutoModelForImageTextToText.from_pretrained("{root}")',
        'model = PeftModel.from_pretrained(model, "ADAPTER_I").merge_and_unload()',
        'model = PeftModel.from_pretrained(model, "org/first").merge_and_unload()',
        f'model = PeftModel.from_pretrained(model, "{REPO}")',
    ]
    assert "Its base had been unlearned before, with NPO at patient level: 224 rows." in card
    made = re.findall(r"^medforget (?:finetune|unlearn).* --model (\S+) .*--out (\S+)$", card, re.MULTILINE)
    assert made == [(root, "vanilla"), ("vanilla", "npo-patient"), ("npo-patient", "npo-patient-2")]
    assert "`ADAPTER_I`: what this card does not name" in card and "must be loaded whole" not in card
    first = card_files(places[1], repo_id=REPO)["README.md"]
    assert 'PeftModel.from_pretrained(model, "BASE").merge_and_unload()' in first and "before, with" not in first
    (places[1] / "medforget.json").unlink()  # so that what it was cannot be told
    alone = card_files(places[2], repo_id=REPO, base="org/first")["README.md"]
    assert "The base must be loaded whole: if it is itself an adapter, merge it first" in alone
    assert "merge_and_unload()" not in alone


@pytest.mark.parametrize(
    ("base", "license"),
    [("lingshu-medical-mllm/Lingshu-7B", "mit"), ("Qwen/Qwen2.5-VL-7B-Instruct", "apache-2.0"), ("org/other", None)],
)
def test_a_base_model_of_the_hub_is_told_from_a_folder(base, license, data_dir, tmp_path):
    folder = write_info(tmp_path / "taught", VANILLA | {"base": base, "base files": base, "preset": None}, data_dir)
    forgot = write_info(tmp_path / "forgot", NPO, data_dir, folder)
    for place in (folder, forgot):
        head = ModelCard(card_files(place, repo_id=REPO)["README.md"]).data
        assert (head.base_model, head.base_model_relation, head.license) == (base, "finetune", license)
    (folder / "medforget.json").unlink()  # so that nobody can tell any more
    head = ModelCard(card_files(forgot, repo_id=REPO)["README.md"]).data.to_dict()
    assert not {"base_model", "base_model_relation", "license"} & head.keys()


def test_restricted_weights_have_no_free_licence(run, data_dir, tmp_path):
    folder = write_info(tmp_path / "restricted", NPO, data_dir, run / "vanilla")
    info = json.loads((folder / "medforget.json").read_text()) | {"restricted": True}
    (folder / "medforget.json").write_text(json.dumps(info))
    texts = [card_files(folder, repo_id=REPO)["README.md"], render_model_card(info)]
    # Nor have those that do not say.
    (folder / "medforget.json").write_text(json.dumps({k: v for k, v in info.items() if k != "restricted"}))
    for text in (*texts, card_files(folder, repo_id=REPO)["README.md"]):
        card = ModelCard(text)
        assert (card.data.license, card.data.license_name) == ("other", "data-use-agreement")
        assert "restricted" in card.data.tags and "must not be shared" in card.text and "Apache" not in card.text


def test_what_was_not_evaluated_says_so(data_dir, tmp_path):
    folder = write_info(tmp_path / "alone", NPO | {"forgotten": {"nodes": 1, "rows": 60, "of": 240}}, data_dir)
    (folder / "medforget.json").write_text(json.dumps(NPO | SHARED | {"data": "/gone", "data files": "x"}))
    files = card_files(folder, repo_id=REPO, dataset=DATASET)
    assert list(files) == ["README.md"] and "model-index" not in files["README.md"]
    assert "has not been evaluated" in files["README.md"]
    assert f"medforget eval --model_args pretrained={REPO} --tasks medforget_patient " in files["README.md"]
    assert "| rows to retain | 97.0 % |" in files["README.md"] and "224 of 960 rows" in files["README.md"]
    ModelCard(render_model_card({}))


def test_a_node_counts_as_forgotten_when_nothing_of_it_is_kept(data_dir):
    grouped, _ = forget_and_retain(data_dir, "patient")
    assert forgotten_counts(grouped, "patient") == {"nodes": 4, "rows": 224, "of": 960}
    # As many rows drawn without the hierarchy are of nobody as a whole.
    assert forgotten_counts(grouped, "institution")["nodes"] == 0


def test_a_card_does_not_depend_on_how_the_folder_is_named(run, monkeypatch):
    named = card_files(run / "npo-patient", repo_id=REPO)
    monkeypatch.chdir(run / "npo-patient")
    assert card_files(Path("."), repo_id=REPO) == named


def test_only_a_runs_report_is_read_and_one_of_another_version_says_so(run, data_dir, tmp_path):
    folder = write_info(tmp_path / "npo-patient", NPO, data_dir)
    (tmp_path / "report.json").write_text("[]")
    assert "has not been evaluated" in card_files(folder, repo_id=REPO)["README.md"]
    (tmp_path / "run.json").write_bytes((run / "run.json").read_bytes())
    (tmp_path / "report.json").write_text('{"format": -1}')
    with pytest.raises(UserError, match="written by another version"):
        card_files(folder, repo_id=REPO)


def test_mistakes_are_one_line(run, data_dir, tmp_path):
    other = write_info(tmp_path / "other", NPO, data_dir)
    listed = write_info(tmp_path / "listed", NPO | {"arguments": ["x"]}, data_dir)
    uncounted = write_info(tmp_path / "uncounted", NPO | {"forgotten": {"nodes": "x"}}, data_dir)
    damaged = write_info(tmp_path / "damaged", NPO | {"base": [1]}, data_dir)
    for call, words in (
        ({"checkpoint": other, "run": run}, f"--run {run}: {other} does not lie in it"),
        ({"checkpoint": run / "evaluation", "run": run}, "its report has no scores of evaluation"),
        ({"checkpoint": other, "run": tmp_path}, f"{tmp_path}/report.json: missing or damaged"),
        ({"checkpoint": damaged}, f"{damaged}/medforget.json: base cannot be [1]"),
        ({"checkpoint": listed}, f"{listed}/medforget.json: arguments cannot be ['x']"),
        ({"checkpoint": uncounted}, f"{uncounted}/medforget.json: forgotten cannot be {{'nodes': 'x'}}"),
        ({"checkpoint": other, "base": "vanilla"}, "--base vanilla: give ORG/NAME"),
        ({"checkpoint": other, "dataset": "/data/medforget"}, "--dataset /data/medforget: give ORG/NAME"),
    ):
        with pytest.raises(UserError, match=re.escape(words)) as caught:
            card_files(**{"repo_id": REPO} | call)
        assert "\n" not in str(caught.value)
