"""A program with the command line, pose file and output layout of SV-DRR's script, which turns pictures in the plane.

It appends to `calls.txt` beside it, fails if there is a file `fail`, and forgets its last output if there is `omit`.
"""

import argparse
import json
import math
import sys
from pathlib import Path

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
if (here / "fail").exists():
    sys.exit("CUDA out of memory")
patients = json.loads(Path(args.dataset, "patients.json").read_text())["thin"]
patients = patients[-16:] if args.split == "val" else patients[::-1]
poses = json.loads(Path(args.poses).read_text())
azimuths = [math.degrees(pose["coordinate"][1]) for pose in poses]
with (here / "calls.txt").open("a") as log:
    log.write(f"{len(patients)} {args.image_size} {azimuths}\n")
for number, patient in enumerate(patients):
    if not args.flip_pose:  # as the script does: once for every image, so that the sign changes from one to the next
        azimuths = [-azimuth for azimuth in azimuths]
    image = Image.open(Path(args.dataset, patient, "0000.png")).resize((args.image_size, args.image_size)).convert("L")
    folder = Path(args.log_dir, patient)
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / "0000.png")
    if not (here / "omit").exists() or number < len(patients) - 1:
        for pose, azimuth in zip(poses, azimuths, strict=True):
            image.rotate(-azimuth).save(folder / f"{pose['id']}.png")
