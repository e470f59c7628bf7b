"""Write the folder of a Hub Space that shows a dataset of the Hub and, if there is one, a run's report."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path

from medforget_dataset.atomic import replacing
from medforget_dataset.errors import UserError
from medforget_dataset.loading import find_data

from . import app
from .exposure import check_exposure
from .run import NUMBERS, REPORT
from .sources import find_restricted, open_data, open_run


README = Path(__file__).parent / "space_readme.md"


def write_space(folder: Path, data: str | None, run: Path | None) -> Path:
    """
    Write a Space: `app.py`, `requirements.txt`, `README.md` with the Space's settings, `space.json` and the report.

    Args:
        folder (`Path`):
            The folder to write; a Space of ours there is replaced.
        data (`str`, *optional*):
            Hub id ORG/NAME of the dataset, which is downloaded to see that it can be shown.
        run (`Path`, *optional*):
            Folder of a run with a report; its checkpoints stay where they are.

    Raises:
        UserError: The dataset is not named by its Hub id or cannot be read, the run has no report, something is
            restricted, or `folder` holds something else.
    """
    source = find_data(data)
    if isinstance(source, Path):
        raise UserError(
            f"{source}: a Space reads its dataset from the Hub; `medforget push dataset {source} ORG/NAME` puts it "
            "there, then give ORG/NAME in its place"
        )
    if folder.exists() and not (folder.is_dir() and ((folder / app.SPACE_SETTINGS).is_file() or _is_empty(folder))):
        raise UserError(f"--space {folder}: holds something that is not a Space of MedForget; choose another folder")
    catalogue, reported = open_data(source), open_run(run)
    if reported is not None and not reported.sections:
        raise UserError(f"{run}: has no report; `{reported.how_to_report}` writes it")
    # Its checkpoints stay here, but what derives from them does not.
    check_exposure(find_restricted(catalogue, reported), host="", share=False, on_space=True)
    with replacing(folder) as partial:
        partial.mkdir()
        shutil.copyfile(str(app.__file__), partial / "app.py")
        version = importlib.metadata.version("medforget")
        (partial / "requirements.txt").write_text(f"medforget[app]=={version}\n", encoding="utf-8")
        (partial / app.SPACE_SETTINGS).write_text(json.dumps({"data": source}, indent=2) + "\n", encoding="utf-8")
        (partial / "README.md").write_text(_readme(source), encoding="utf-8")
        if run is not None:
            (partial / app.SPACE_REPORT).mkdir()
            for name in (REPORT, NUMBERS):
                shutil.copyfile(run / name, partial / app.SPACE_REPORT / name)
    return folder


def _is_empty(folder: Path) -> bool:
    return not any(folder.iterdir())


def _readme(source: str) -> str:
    text = README.read_text(encoding="utf-8")
    return text.replace("{data}", source).replace("{gradio}", importlib.metadata.version("gradio"))
