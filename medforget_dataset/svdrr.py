"""Turned views by SV-DRR, a generative model that the user has installed (https://arxiv.org/abs/2507.05148).

Its script `test_svdrr_DiT.py` is run as a program of its own, in its own environment, on this machine. Checked against
its interface at commit 713a254; nothing of it is part of this project. Images go to it in batches of one angle, in its
`--dataset` mode, so that the model is loaded once a batch; what it made is kept, so that a killed build goes on.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from .atomic import replacing
from .errors import UserError


SCRIPT = "test_svdrr_DiT.py"
PYTHON = "MEDFORGET_SVDRR_PYTHON"
BATCH = 32
# The resolutions that the authors published; the smallest that is no smaller than our images would do.
SIZES = (256, 512, 1024)
DEFAULT_SIZE = 512
POSE = "turned"
_POLL_SECONDS = 0.5


class SvDrr:
    """An installation of SV-DRR with a checkpoint.

    Args:
        folder (`Path`): Where its repository lies.
        model (`Path`): A checkpoint folder, such as `models/svdrr-dit-fb-512`.

    Raises:
        UserError: The script or the checkpoint is not there.
    """

    def __init__(self, folder: Path, model: Path):
        self.folder, self.model = folder.expanduser().resolve(), model.expanduser().resolve()
        if not (self.folder / SCRIPT).is_file():
            raise UserError(f"--svdrr {folder}: no {SCRIPT} in it; name the folder of an SV-DRR installation")
        if not self.model.is_dir():
            raise UserError(f"--svdrr-model {model}: no such checkpoint folder")
        named = re.search("|".join(map(str, reversed(SIZES))), self.model.name)
        self.size = int(named[0]) if named else DEFAULT_SIZE

    def record(self) -> dict[str, str | int | bool]:
        """What the views depend on, for the build record."""
        return {
            "model": self.model.name,
            "image_size": self.size,
            "axis": "azimuth, about the patient's long axis",
            "flip_pose": True,
        }

    def turn(self, images: Mapping[str, Image.Image], angles: Mapping[str, float]) -> dict[str, Image.Image]:
        """Views of some images, each from its angle.

        Args:
            images (`Mapping[str, PIL.Image.Image]`): Frontal images by name.
            angles (`Mapping[str, float]`): Degrees by name.

        Returns:
            `dict[str, PIL.Image.Image]`: Mode `"L"`, `size` × `size` pixels.

        Raises:
            UserError: The script failed, or made something else than it was asked for.
        """
        encoded = {name: _encode(image.resize((self.size, self.size)).convert("L")) for name, image in images.items()}
        kept = {name: self._kept(encoded[name], angles[name]) for name in images}
        missing = [name for name in images if not kept[name].is_file()]
        with tqdm(total=len(images), initial=len(images) - len(missing), desc="SV-DRR views", unit="view") as bar:
            for angle in sorted({angles[name] for name in missing}):
                group = [name for name in missing if angles[name] == angle]
                for start in range(0, len(group), BATCH):
                    batch = [(encoded[name], kept[name]) for name in group[start : start + BATCH]]
                    self._run(batch, angle, bar)
        return {name: _open(kept[name]) for name in images}

    def _kept(self, image: bytes, angle: float) -> Path:
        """Where the view of this image from this angle is kept."""
        cache = Path(os.environ.get("MEDFORGET_CACHE", "~/.cache/medforget")).expanduser() / "svdrr"
        content = json.dumps([str(self.model), self._weights, self.size, angle, hashlib.sha256(image).hexdigest()])
        return cache / f"{hashlib.sha256(content.encode()).hexdigest()}.png"

    @cached_property
    def _weights(self) -> list[tuple[str, int, int]]:
        """Names, sizes and times of the checkpoint's files: another checkpoint makes other views."""
        return [
            (str(file.relative_to(self.model)), file.stat().st_size, file.stat().st_mtime_ns)
            for file in sorted(self.model.rglob("*"))
            if file.is_file()
        ]

    def _run(self, batch: list[tuple[bytes, Path]], angle: float, bar: tqdm) -> None:
        with tempfile.TemporaryDirectory(prefix="medforget-svdrr-") as scratch:
            data, out, poses = Path(scratch, "in"), Path(scratch, "out"), Path(scratch, "poses.json")
            names = [f"view{number:04d}" for number in range(len(batch))]
            for name, (image, _) in zip(names, batch, strict=True):
                (data / name).mkdir(parents=True)
                (data / name / "0000.png").write_bytes(image)
            (data / "patients.json").write_text(json.dumps({"thin": names}))
            # Radians, polar and azimuth. --flip_pose, or the script negates the pose anew for every image of a batch.
            pose = {"id": POSE, "orientation": "PA", "coordinate": [0.0, math.radians(angle)]}
            poses.write_text(json.dumps([pose]))
            call = [_python(self.folder), SCRIPT, "--model_path", self.model, "--dataset", data, "--split", "all"]
            call += ["--poses", poses, "--log_dir", out, "--image_size", str(self.size), "--flip_pose"]
            self._wait(call, out, names, bar)
            for name, (_, kept) in zip(names, batch, strict=True):
                view = _open(out / name / f"{POSE}.png").convert("L")
                with replacing(kept) as partial:
                    view.resize((self.size, self.size)).save(partial, "PNG")

    def _wait(self, call: list, out: Path, names: list[str], bar: tqdm) -> None:
        """Run the script to its end, and show what it has made meanwhile."""
        done = 0
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(call, cwd=self.folder, stdout=log, stderr=subprocess.STDOUT)
            try:
                while (status := process.poll()) is None:
                    time.sleep(_POLL_SECONDS)
                    made = sum((out / name / f"{POSE}.png").is_file() for name in names)
                    bar.update(made - done)
                    done = made
            finally:
                process.kill()
            bar.update(len(names) - done)
            if status:
                log.seek(0)
                said = " | ".join(log.read().decode(errors="replace").strip().splitlines()[-3:])
                raise UserError(f"--svdrr {self.folder}: {SCRIPT} ended with status {status}: {said}")


def _python(folder: Path) -> str:
    """The interpreter of the installation: its own environment's, or the one that is named, or this one."""
    for own in (folder / ".venv/bin/python", folder / "venv/bin/python"):
        if own.is_file():
            return str(own)
    return os.environ.get(PYTHON) or sys.executable


def _encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _open(file: Path) -> Image.Image:
    try:
        with Image.open(file) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{file}: SV-DRR made no such image, or half of it ({error})") from error
