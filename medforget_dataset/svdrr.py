"""Turned views by SV-DRR, a generative model that the user has installed (https://arxiv.org/abs/2507.05148).

Its script `test_svdrr_DiT.py` is run as a program of its own, in its own environment, on this machine. Checked against
its interface at commit 1d26ef7; nothing of it is part of this project. Images go to it in its `--dataset` mode, all of
one angle in one call, so that the model is loaded once an angle; what it has made is kept image by image, so that a
killed build goes on where it was.

Directions: the azimuths of the projections that SV-DRR was trained on run against ours. DiffDRR 0.6.1, with the
parameters those were rendered with, shows the CT of the embedded corpus from azimuth +30° as `radiographs.render` does
from −30° (correlation 0.98; 0.86 with the sign as it is), and `--flip_pose` turns the azimuth over.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from .atomic import sweep
from .errors import UserError


SCRIPT = "test_svdrr_DiT.py"
PYTHON = "MEDFORGET_SVDRR_PYTHON"
PIPELINE = "model_index.json"  # what a checkpoint of diffusers is told by
# The resolutions that the authors published, and the one of their examples.
SIZES = (256, 512, 1024)
DEFAULT_SIZE = 512
POSE = "turned"
_POLL_SECONDS = 0.2
_LAST_LINES = 3
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


class SvDrr:
    """An installation of SV-DRR with a checkpoint.

    Args:
        folder (`Path`): Where its repository lies.
        model (`Path`): A checkpoint folder, such as `models/DiT-fb-512`; looked for in `folder` too.

    Raises:
        UserError: The script, the checkpoint or the interpreter is not there.
    """

    def __init__(self, folder: Path, model: Path):
        self.folder = folder.expanduser().resolve()
        if not (self.folder / SCRIPT).is_file():
            raise UserError(f"--svdrr {folder}: no {SCRIPT} in it; name the folder of an SV-DRR installation")
        found = model.expanduser() if model.expanduser().is_dir() else self.folder / model.expanduser()
        self.model = found.resolve()
        if not self.model.is_dir():
            raise UserError(f"--svdrr-model {model}: no such checkpoint folder, here or in {self.folder}")
        if not (self.model / PIPELINE).is_file():
            raise UserError(f"--svdrr-model {model}: no {PIPELINE} in it; name a whole checkpoint")
        self.size = _size(self.model)
        self.python = _python(self.folder)

    def record(self) -> dict[str, str | int | bool]:
        """What the views depend on, for the build record."""
        return {
            "model": self.model.name,
            "image_size": self.size,
            "axis": "azimuth, about the patient's long axis",
            "positive": "the patient's right front towards the detector",
            "flip_pose": True,
            "script_sha256": self._script,
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
        inputs = {name: image.convert("L").resize((self.size, self.size)) for name, image in images.items()}
        kept = {name: self._kept(image, angles[name]) for name, image in inputs.items()}
        missing: dict[float, dict[Path, Image.Image]] = defaultdict(dict)
        for name, file in kept.items():
            if _open(file) is None:
                missing[angles[name]][file] = inputs[name]
        count = sum(map(len, missing.values()))
        with tqdm(total=len(inputs), initial=len(inputs) - count, desc="SV-DRR views", unit="view") as bar:
            for angle in sorted(missing):
                self._run(missing[angle], angle, bar)
        return {name: self._whole(file) for name, file in kept.items()}

    def _whole(self, file: Path) -> Image.Image:
        image = _open(file)
        if image is None:
            raise UserError(f"{file}: gone or damaged since SV-DRR made it; build again")
        return image.convert("L").resize((self.size, self.size))

    @property
    def _cache(self) -> Path:
        cache = Path(os.environ.get("MEDFORGET_CACHE", "~/.cache/medforget")).expanduser() / "svdrr"
        # Views of restricted images are restricted: for nobody else on this machine.
        try:
            cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{cache}: {error.strerror}; name another folder in $MEDFORGET_CACHE") from error
        return cache

    def _kept(self, image: Image.Image, angle: float) -> Path:
        """Where the view of this image from this angle is kept."""
        pixels = hashlib.sha256(image.tobytes()).hexdigest()
        content = json.dumps([pixels, self.size, angle, str(self.model), self._weights, self._script])
        return self._cache / f"{hashlib.sha256(content.encode()).hexdigest()}.png"

    @cached_property
    def _weights(self) -> list[tuple[str, int, int]]:
        """Names, sizes and times of the checkpoint's files: another checkpoint makes other views."""
        # Links are followed: the authors' checkpoints share their components by links.
        folders = os.walk(self.model, followlinks=True)
        files = sorted(Path(folder, name) for folder, _, names in folders for name in names)
        return [(str(f.relative_to(self.model)), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]

    @cached_property
    def _script(self) -> str:
        return hashlib.sha256((self.folder / SCRIPT).read_bytes()).hexdigest()

    def _run(self, images: Mapping[Path, Image.Image], angle: float, bar: tqdm) -> None:
        """Make the views of some images from one angle, by the files that keep them."""
        sweep(self._cache)  # what a killed build left behind
        work = self._cache / f".{POSE}.partial-{os.getpid()}"
        shutil.rmtree(work, ignore_errors=True)
        try:
            data, out, poses = work / "in", work / "out", work / "poses.json"
            expected = {}
            for file, image in images.items():
                (data / file.stem).mkdir(parents=True)
                image.save(data / file.stem / "0000.png")
                expected[out / file.stem / f"{POSE}.png"] = file
            (data / "patients.json").write_text(json.dumps({"thin": [file.stem for file in images]}))
            # Radians, polar and azimuth. Without --flip_pose the script negates the poses anew for every image.
            pose = {"id": POSE, "orientation": "PA", "coordinate": [0.0, math.radians(angle)]}
            poses.write_text(json.dumps([pose]))
            call = [self.python, SCRIPT, "--model_path", self.model, "--dataset", data, "--split", "all"]
            call += ["--poses", poses, "--log_dir", out, "--image_size", str(self.size), "--flip_pose"]
            self._wait([str(word) for word in call], work / "stderr", expected, bar)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _wait(self, call: list[str], log: Path, expected: dict[Path, Path], bar: tqdm) -> None:
        """Run the script to its end, and keep what it makes as soon as it is whole."""
        # It sees this machine's files alone, and its own packages.
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        environment.pop("PYTHONPATH", None)
        left = dict(expected)
        with log.open("wb") as errors:
            try:
                process = subprocess.Popen(
                    call,
                    cwd=self.folder,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    preexec_fn=_end_with_parent,
                )
            except OSError as error:
                raise UserError(f"--svdrr {self.folder}: {self.python} cannot be run: {error.strerror}") from error
            try:
                while process.poll() is None:
                    self._collect(left, bar)
                    time.sleep(_POLL_SECONDS)
            finally:
                process.kill()
                process.wait()
        self._collect(left, bar)
        said = _last_lines(log)
        if process.returncode:
            raise UserError(f"--svdrr {self.folder}: {SCRIPT} ended with status {process.returncode}: {said}")
        if left:
            made = f"made {len(expected) - len(left)} of {len(expected)} views that can be read"
            raise UserError(f"--svdrr {self.folder}: {SCRIPT} {made}{f': {said}' if said else ''}")

    def _collect(self, left: dict[Path, Path], bar: tqdm) -> None:
        for made, kept in list(left.items()):
            image = _open(made)
            if image is None:  # not there, or not whole yet
                continue
            low, high = image.convert("L").getextrema()
            if low == high:
                problem = "made a view without any contrast; half precision may overflow on this GPU"
                raise UserError(f"--svdrr-model {self.model}: {problem}")
            made.replace(kept)
            del left[made]
            bar.update()


def _size(model: Path) -> int:
    """The resolution that a checkpoint's name tells, or its folder's name; the last one it was trained at."""
    for name in (model.name, model.parent.name):
        if named := re.findall(rf"(?<!\d)({'|'.join(map(str, SIZES))})(?!\d)", name):
            return int(named[-1])
    return DEFAULT_SIZE


def _python(folder: Path) -> str:
    """The interpreter of the installation: its own environment's, or the one that is named, or this one."""
    for own in (folder / ".venv/bin/python", folder / "venv/bin/python"):
        if own.is_file():
            return str(own)
    named = os.environ.get(PYTHON, "")
    if named and shutil.which(named) is None:
        raise UserError(f"${PYTHON} is {named}: no such interpreter")
    return named or sys.executable


def _open(file: Path) -> Image.Image | None:
    """The image, or `None` unless all of it is there."""
    try:
        image = Image.open(io.BytesIO(file.read_bytes()))
        image.load()
    except (OSError, SyntaxError, ValueError):
        return None
    return image


def _last_lines(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return " | ".join([line for line in lines if line][-_LAST_LINES:])


def _end_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
