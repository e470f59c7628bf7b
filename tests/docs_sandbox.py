"""Where the commands of the documentation are run: a copy of the repository's code, small data, no network."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import small_corpora
import small_pmc_vqa
from docs_blocks import PYTHON, ROOT, Block
from hub_server import Hub
from judging import good_mark
from mimic_tree import MimicTree
from openai_server import OpenAIServer, good_fields
from report_runs import FinishedRun


# What is added to a command, so that a page takes seconds. A flag that is given twice holds as it was given last.
SMALLER = {
    "medforget build": "--institutions 4 --patients 4 --image-size 56",
    "medforget finetune": "--model untrained --max-steps 2",
    "medforget unlearn": "--max-steps 2",
    "medforget eval": "--limit 1",
    "lm_eval --model": "--limit 1",
}
# What is put in place of a text: sizes of files, and the address of a language model.
INSTEAD = {
    "tasks, batch_size=64)": "tasks, limit=1)",
    "benchmarks.scan_reports 10000 50000": "benchmarks.scan_reports 20",
    "http://127.0.0.1:8000/v1": "ENDPOINT",
}
# The same in docs/sweep-example.yaml: three cells of a step, and one that has none.
SMALLER_SWEEP = {
    r"levels: .*": "levels: [patient]",
    r"(grad_diff|kl_min|npo):\n    preset: paper": r"\1:\n    preset: paper\n    max_steps: 1",
}
# Commands that other tests run, and which.
BY = {
    "make setup": ".ci/run",
    "make test": ".ci/run",
    "make quality": ".ci/run",
    "make figures": "tests/test_docs_commands.py::test_the_pictures_are_drawn",
    "make demo": "tests/test_pipeline.py::test_report_holds_every_method_split_and_task",
    "make reproduce": "tests/test_pipeline.py::test_the_reproduction_has_the_papers_experiment_and_more",
    "make bench": "tests/test_benchmarks.py::test_the_training_benchmark_runs_on_a_tiny_model",
    "python -m build": "tests/test_wheel.py::test_the_wheel_holds_every_tracked_file_of_the_packages",
    "medforget browse": "tests/test_browse_page.py::test_the_hierarchy_is_walked_by_clicking",
    "medforget run --preset demo": "tests/test_pipeline.py::test_report_holds_every_method_split_and_task",
    "python -m benchmarks.training": "tests/test_benchmarks.py::test_the_training_benchmark_runs_on_a_tiny_model",
    "python -m benchmarks.gpu": "tests/test_benchmarks.py::test_the_gpu_benchmark_runs_as_a_command_and_goes_on_where"
    "_it_stopped",
    "python -m benchmarks.evaluation": "tests/test_benchmarks.py::test_the_evaluation_benchmark_asks_both_the_same_"
    "and_gets_the_same",
}
# What a page's commands find in their folder, of `Sandbox.prepare`.
PREPARED = {
    "docs/attack.md": ("medforget", "runs/npo"),
    "docs/corpora.md": ("physionet.org/files", "chexpert-plus", "NLMCXR", "hospitals"),
    "docs/extending.md": ("medforget", "runs/vanilla", "our-hospital"),
    "docs/gen-score.md": ("medforget", "runs/npo"),
    "docs/general-med.md": ("PMC-VQA",),
    "docs/hub.md": ("hub", "medforget", "runs/vanilla"),
    "docs/metrics.md": ("runs/demo/medforget", "runs/demo/npo-patient", "runs/demo/retrained-patient"),
    "docs/mimic-cxr.md": ("physionet.org/files",),
    "docs/own-method.md": ("medforget", "runs/vanilla", "runs/retrained"),
    "docs/report.md": ("runs/demo",),
    "docs/sweeps.md": ("medforget", "runs/vanilla"),
    "docs/training.md": ("medforget",),
    "harness_tasks/README.md": ("CHECKPOINT",),
}


def smaller(text: str) -> str:
    """A shell block with what is added, and without what other tests run."""
    lines = []
    for line in text.replace("\\\n", " ").splitlines():
        command = re.sub(r"(^|\s+)#\s.*$", "", line)
        bare = re.sub(r"^([A-Z_]+=\S+ )+", "", command.strip())
        if any(bare.startswith(name) for name in BY):
            continue
        added = [more for name, more in SMALLER.items() if bare.startswith(name) and "--help" not in bare]
        lines.append(" ".join([command, *added]))
    return "\n".join(lines) + "\n"


def _answer(body):
    """What a language model answers: fields of a question, or a judge's mark."""
    return good_fields(body, {}) if "text" in json.loads(body["messages"][1]["content"]) else good_mark(body)


class Sandbox:
    """
    A folder with the code, in which a page's blocks are run one after the other.

    Args:
        folder (`Path`): An empty folder.
        data (`Path`): A small dataset.
        checkpoint (`Path`): An untrained tiny model of it.
        prepared (`tuple[str, ...]`): What is there before the first block.
    """

    def __init__(self, folder, data, checkpoint, prepared):
        self.folder, self.data, self.checkpoint = folder, data, checkpoint
        self.server = OpenAIServer(good=_answer)
        self.hub = Hub(folder / "hub", {"hf_alice": "alice"}, members={"ORG": {"alice"}})
        self.is_online = "hub" in prepared
        ignored = shutil.ignore_patterns("__pycache__", "reproduce", "*.png")
        for name in ("medforget_dataset", "harness_tasks", "unlearn", "benchmarks", "docs", "tests"):
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, folder)
        sweep = folder / "docs" / "sweep-example.yaml"
        for old, new in SMALLER_SWEEP.items():
            sweep.write_text(re.sub(old, new, sweep.read_text()))
        (folder / "untrained").symlink_to(checkpoint)
        self._tools()
        for what in prepared:
            self.prepare(what)

    def __enter__(self):
        self.server.__enter__()
        self.hub.__enter__()
        return self

    def __exit__(self, *exc):
        self.hub.__exit__(*exc)
        self.server.__exit__(*exc)

    def _tools(self):
        """Commands as `make setup` installs them, run from the copy."""
        tools = self.folder / ".venv" / "bin"
        tools.mkdir(parents=True)
        (tools / "activate").touch()
        (self.folder / ".venv" / ".installed").touch()
        for name, module in (("medforget", "unlearn.cli"), ("lm_eval", "lm_eval"), ("python", "")):
            script = f'#!/bin/sh\nexec {sys.executable} {f"-m {module}" if module else ""} "$@"\n'
            (tools / name).write_text(script)
            (tools / name).chmod(0o755)
        # The recipe is the repository's, with the commands of this folder and smaller sizes.
        recipe = self.folder / "Makefile"
        recipe.write_text(
            re.sub(
                r"(\$\(BIN\)/)(medforget \w+.*)",
                lambda found: found[1] + smaller(found[2]).rstrip(),
                recipe.read_text(),
            )
        )

    def prepare(self, what):
        """Make a dataset, a checkpoint, a run or files of a hospital under the name that a page has for it."""
        place = self.folder / what
        place.parent.mkdir(parents=True, exist_ok=True)
        if what in ("medforget", "runs/demo/medforget"):
            place.symlink_to(self.data)
        elif what == "hub":
            (self.folder / "home").mkdir()
        elif what == "runs/demo":
            FinishedRun(place, self.data, ("patient",), ("npo",), probed=False)
        elif what == "physionet.org/files":
            # The two parts in the folders that PhysioNet's download makes.
            reports, images = place / "mimic-cxr" / "2.1.0", place / "mimic-cxr-jpg" / "2.1.0"
            images.mkdir(parents=True)
            MimicTree(images, traps=False)
            reports.mkdir(parents=True)
            (images / "mimic-cxr-reports.zip").rename(reports / "mimic-cxr-reports.zip")
        elif what == "chexpert-plus":
            small_corpora.write_chexpert_plus(place)
        elif what == "NLMCXR":
            small_corpora.write_open_i(place)
        elif what == "hospitals":
            small_corpora.write_table(place)
        elif what == "our-hospital":
            self._write_json_lines(small_corpora.write_chexpert_plus(place))
        elif what == "PMC-VQA":
            few = small_pmc_vqa.facts
            small_pmc_vqa.write(place, train=few(200, 1000), test=few(450))
        else:
            shutil.copytree(self.checkpoint, place, dirs_exist_ok=True)

    def _write_json_lines(self, folder):
        """Studies of four sections as the example of a corpus has them."""
        table = small_corpora.read_csv(folder / small_corpora.CHEXPERT_CSV)
        sections = {
            "indication": "narrative",
            "technique": "comparison",
            "findings": "findings",
            "impression": "impression",
        }
        studies = {}
        for row in table:
            study = Path(row["path_to_image"]).parent.as_posix()
            studies.setdefault(study, row)
        lines = [
            {
                "patient": row["deid_patient_id"],
                "study": study,
                "date": row["patient_report_date_order"],
                "image": f"PNG/PNG/{Path(row['path_to_image']).with_suffix('.png')}",
                "sections": {name: " ".join(row[f"section_{column}"].split()) for name, column in sections.items()},
            }
            for study, row in studies.items()
        ]
        (folder / "studies.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")

    def write(self, file, text):
        """A file whose content a page gives."""
        (self.folder / file).write_text(text, encoding="utf-8")

    def run(self, block: Block):
        """Run a block; its last words are shown if it fails."""
        text = block.text if block.language in PYTHON else smaller(block.text)
        for old, new in INSTEAD.items():
            text = text.replace(old, self.server.url if new == "ENDPOINT" else new)
        environment = os.environ | {
            "PATH": f"{self.folder / '.venv' / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": f"{self.folder}:{os.environ['PYTHONPATH']}",
        }
        if self.is_online:
            environment |= {"HF_ENDPOINT": self.hub.url, "HF_TOKEN": "hf_alice", "HF_HOME": str(self.folder / "home")}
            environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c"] if block.language in PYTHON else ["bash", "-euo", "pipefail", "-c"]
        done = subprocess.run([*command, text], cwd=self.folder, env=environment, capture_output=True, text=True)
        said = f"{block.name}\n{text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        assert done.returncode == 0, said
        return done.stdout
