"""A program with the command line, pose file and output layout of SV-DRR's script, which shifts pictures sideways.

A degree of azimuth is a pixel, to the right in the coordinates of its training data. It appends a line a call and a
line a view to `calls.txt` beside it. Files beside it make it misbehave: `fail`, `omit` and `half` from the view on
that they number, `blank`, `noise` (other pictures in its output), `slow` (seconds a view).
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image


parser = argparse.ArgumentParser()
parser.add_argument("--model_path", required=True)
images = parser.add_mutually_exclusive_group(required=True)
images.add_argument("--image_path")
images.add_argument("--dataset")
parser.add_argument("--log_dir", required=True)
parser.add_argument("--poses")
parser.add_argument("--image_size", type=int, default=256)
parser.add_argument("--simple_pose", action="store_true")
parser.add_argument("--flip_pose", action="store_true")
parser.add_argument("--split", default="val")
args = parser.parse_args()

here = Path(__file__).parent
faults = {name: int((here / name).read_text() or 0) for name in ("fail", "omit", "half") if (here / name).exists()}
assert (Path.cwd() / Path(sys.argv[0]).name).samefile(__file__)
assert Path(args.model_path, "model_index.json").is_file()
assert os.environ["HF_HUB_OFFLINE"] == "1" and "PYTHONPATH" not in os.environ
patients = json.loads(Path(args.dataset, "patients.json").read_text())["thin"]
patients = {"val": patients[-16:], "train": patients[:-16]}.get(args.split, patients[::-1])
poses = json.loads(Path(args.poses).read_text())
targets = [np.rad2deg(np.array([*pose["coordinate"], 0.0])) for pose in poses]


def note(line: str) -> None:
    with (here / "calls.txt").open("a") as file:
        file.write(line + "\n")


note(f"call {len(patients)} {args.image_size} {os.getpid()}")
sys.stdout.write("loading the model\n" * 10_000)
done = 0
for patient in patients:
    if not args.flip_pose:  # as the script does: again for every image, so that the sign changes from one to the next
        targets = [-target for target in targets]
    source = Image.open(Path(args.dataset, patient, "0000.png"))
    source = source.resize((args.image_size, args.image_size)).convert("L")
    folder = Path(args.log_dir, patient)
    folder.mkdir(parents=True, exist_ok=True)
    source.save(folder / "0000.png")
    if (here / "noise").exists():
        source.save(folder / "0001.png")
    for pose, (polar, azimuth, _) in zip(poses, targets, strict=True):
        assert abs(polar) < 1e-9
        if done >= faults.get("fail", math.inf):
            sys.stderr.write("Traceback (most recent call last):\n\nRuntimeError: CUDA out of memory\n")
            sys.exit(3)
        if (here / "slow").exists():
            time.sleep(float((here / "slow").read_text()))
        # What the model is given is condition minus target: the view lies at minus that in its data's coordinates.
        made = np.roll(np.asarray(source), round(-azimuth), axis=1)
        view = Image.fromarray(np.zeros_like(made) if (here / "blank").exists() else made).convert("RGB")
        file = folder / f"{pose['id']}.png"
        if done < faults.get("omit", math.inf):
            view.save(file)
        if done >= faults.get("half", math.inf):
            file.write_bytes(file.read_bytes()[:-2000])
        note(f"view {file} {done}")
        done += 1
