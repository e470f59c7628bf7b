"""Draw the pictures of the documentation from a built dataset and a finished run: `make figures`."""

from __future__ import annotations

import shutil
import sys
import textwrap
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from medforget_dataset import TASKS, load


DOCS = Path(__file__).parent
COLUMNS, ROWS = 5, 2


def radiographs(data: Path) -> None:
    """A page of radiographs, each with the finding that its report names first, no two of a kind and place."""
    shown: dict[str, tuple] = {}
    for row in load("finetune", "train", data=data):
        if row["section"] == "findings" and row["task"] == TASKS.index("generation"):
            finding = row["answer"].split(". ")[0].removeprefix("There is ")
            shown.setdefault(" ".join(finding.split()[-2:]), (row["image"], finding))
    figure = Figure(figsize=(2.2 * COLUMNS, 2.6 * ROWS), layout="constrained")
    for number, (image, finding) in enumerate(list(shown.values())[: COLUMNS * ROWS]):
        axes = figure.add_subplot(ROWS, COLUMNS, number + 1)
        axes.imshow(image, cmap="gray", vmin=0, vmax=255)
        axes.set_title(textwrap.fill(finding, 26), fontsize=8)
        axes.axis("off")
    FigureCanvasAgg(figure)
    figure.savefig(DOCS / "radiographs.png", dpi=110)


if __name__ == "__main__":
    radiographs(Path(sys.argv[1]))
    for picture in ("scores", "forget-retain"):
        shutil.copyfile(Path(sys.argv[2]) / "figures" / f"{picture}.png", DOCS / f"demo-{picture}.png")
