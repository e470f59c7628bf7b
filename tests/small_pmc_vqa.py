"""PMC-VQA in small: its files as they are published, with figures that nobody owns."""

import csv
import io
import random
import zipfile

import numpy as np
from PIL import Image


V1 = ("train.csv", "test.csv", "images.zip", "images")
V2 = ("train_2.csv", "test_2.csv", "images_2.zip", "figures")
HEADERS = {
    "v1": "Figure_path,Question,Answer,Choice A,Choice B,Choice C,Choice D,Answer_label".split(","),
    "v2": "index,Figure_path,Caption,Question,Choice A,Choice B,Choice C,Choice D,Answer,split".split(","),
    "loader": "Figure_path,Caption,Question,Anwser,Choice A,Choice B,Choice C,Choice D".split(","),
}
FINDINGS = ("Focal", "Diffuse", "Patchy", "Absent", "Nodular", "Linear", "Mixed", "Mottled")


def facts(count, first=0, panels=2):
    """Questions about `count` figures, `panels` of them from each article; every fourth figure has two questions."""
    rows = []
    for number in range(first, first + count):
        figure = f"PMC{1000 + number // panels}_Fig{number % panels + 1}_{number}.jpg"
        for part in range(2 if number % 4 == 0 else 1):
            options = random.Random(number + part).sample(FINDINGS, 4)
            rows.append(
                {
                    "Figure_path": figure,
                    "Question": f" What is uptake pattern {number} in organ {part}? ",
                    "options": [f"{x} uptake pattern" for x in options],
                    "letter": "ABCD"[(number + part) % 4],
                }
            )
    return rows


def table(rows, layout):
    """The rows as a CSV file with the header and the habits of a layout."""
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, HEADERS[layout])
    writer.writeheader()
    for number, row in enumerate(rows):
        prefix = {"v1": "{}:", "v2": " {}: ", "loader": ""}[layout]
        choices = {f"Choice {x}": prefix.format(x) + text for x, text in zip("ABCD", row["options"], strict=True)}
        right = row["options"]["ABCD".index(row["letter"])] if row["letter"] in tuple("ABCD") else row["letter"]
        cells = choices | {
            "index": number, "Figure_path": row["Figure_path"], "Caption": "a caption,\nof two lines",
            "Question": row["Question"], "Answer": row["letter"] if layout == "v2" else right,
            "Anwser": f" {row['letter']}: {right}", "Answer_label": row["letter"], "split": "x",
        }  # fmt: skip
        writer.writerow({name: cells[name] for name in HEADERS[layout]})
    return out.getvalue().encode()


def picture(name):
    """A small coloured JPEG that no other name has."""
    pixels = np.frombuffer(random.Random(name).randbytes(4 * 6 * 3), dtype=np.uint8).reshape(4, 6, 3)
    out = io.BytesIO()
    Image.fromarray(pixels).resize((24, 16)).save(out, "JPEG", quality=90)
    return out.getvalue()


def write(folder, generation=V2, layout="v2", train=None, test=None, pictures=None, zipped=True, compress=False):
    """A folder of PMC-VQA; `pictures` replaces or (with `None`) leaves out figures."""
    train, test = facts(12, 100) if train is None else train, facts(10) if test is None else test
    folder.mkdir(exist_ok=True)
    (folder / generation[0]).write_bytes(train if isinstance(train, bytes) else table(train, layout))
    (folder / generation[1]).write_bytes(test if isinstance(test, bytes) else table(test, layout))
    names = {row["Figure_path"] for rows in (train, test) if not isinstance(rows, bytes) for row in rows}
    content = {f"{generation[3]}/{name}": picture(name) for name in names if "/" not in name} | (pictures or {})
    content = {name: data for name, data in content.items() if data is not None}
    if not zipped:
        for name, data in content.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
        return folder
    with zipfile.ZipFile(
        folder / generation[2], "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    ) as file:
        for name, data in content.items():
            file.writestr(name, data)
    return folder
