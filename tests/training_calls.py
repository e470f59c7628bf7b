"""Training commands on a dataset and a checkpoint that are right, so that a test can spoil one thing."""

import hashlib
import json
from pathlib import Path

import pyarrow.parquet as pq
import yaml
from stand_in import make_model, make_rows

from medforget_dataset import FEATURES
from medforget_dataset.builder import VERSION
from medforget_dataset.writer import parquet_path
from unlearn.checkpoints import save_checkpoint
from unlearn.cli import main


STUDIES = ["inst00/pat000/study000", "inst00/pat000/study001", "inst00/pat001/study002"]
FORGOTTEN = "inst00/pat001"


def write_dataset(folder, **configs):
    """A dataset folder of whatever rows, with a card and a record that fit them."""
    files, infos = {}, []
    for config, rows in configs.items():
        file = folder / parquet_path(config, "train")
        file.parent.mkdir(parents=True)
        features = json.dumps({"info": {"features": FEATURES.to_dict()}})
        table = rows.with_format("arrow")[:] if len(rows) else FEATURES.arrow_schema.empty_table()
        pq.write_table(table.replace_schema_metadata({"huggingface": features}), file)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        files[parquet_path(config, "train")] = {"bytes": file.stat().st_size, "sha256": digest}
        infos.append({"config_name": config, "description": digest})
    paths = {c: [{"split": "train", "path": f"{c}/train-*.parquet"}] for c in configs}
    card = {
        "configs": [{"config_name": c, "data_files": files} for c, files in paths.items()],
        "dataset_info": infos,
    }
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
    content = (folder / "README.md").read_bytes()
    files["README.md"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    record = {"format": "medforget", "version": VERSION, "options": {}, "restricted": False, "files": files}
    (folder / "build.json").write_text(json.dumps(record))
    return folder


def sides(rows, is_forgotten=lambda row_id: row_id.startswith(FORGOTTEN)):
    flags = [is_forgotten(row_id) for row_id in rows["id"]]
    forget, retain = ([i for i, flag in enumerate(flags) if flag == kind] for kind in (True, False))
    return {"patient_forget": rows.select(forget), "patient_retain": rows.select(retain)}


def make_inputs(folder):
    """Rows, a dataset folder of them and a checkpoint that knows none."""
    rows = make_rows().select_columns(list(FEATURES)).cast(FEATURES)
    data = write_dataset(folder / "medforget", finetune=rows, **sides(rows))
    model, processor = make_model(rows)
    return rows, data, save_checkpoint(folder / "model", model, processor, {})


def caller(data, base, folder, capsys):
    """What runs a command on what is right, less what is given; returns its exit code, what it said, and OUT."""
    (folder / "place").mkdir()

    def call(command, *argv, data=data, model=base, method="npo", out=folder / "place" / "out"):
        given = ["--data", data, "--model", model, "--out", out]
        given += ["--method", method, "--level", "patient"] if command == "unlearn" else []
        given += [] if method == "manu" or "--max-steps" in argv else ["--max-steps", 1]
        capsys.readouterr()
        code = main([command, *map(str, given), *map(str, argv)])
        return code, capsys.readouterr().err, Path(out)

    return call


def assert_one_line(said, command, *, early=True):
    """Only a bar of progress may come before the line."""
    assert said.endswith("\n") and said.count(f"medforget {command}: ") == 1
    line = said.rpartition(f"medforget {command}: ")[2]
    assert line.count("\n") == 1 and "Traceback" not in said
    if early:
        assert said == f"medforget {command}: {line}"
    return line.strip()


def assert_refused(answer, command, *names, early=True):
    code, said, out = answer
    line = assert_one_line(said, command, early=early)
    assert code == 2, line
    assert all(name in line for name in names), line
    assert list(out.parent.iterdir()) == []
    return line
