"""Radiographs from files: every encoding to the same grey levels, and every fault by its name."""

import json
import random
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hospital_files import encoded, picture, write_dicom
from PIL import Image, ImageOps
from pydicom.uid import JPEG2000Lossless

from medforget_dataset.build_log import BuildLog, SourceError
from medforget_dataset.images import fit_square, read_radiograph, read_rgb


STORED = np.random.default_rng(0).integers(0, 4096, (64, 80), dtype=np.uint16)


def grey(file, log=None) -> np.ndarray:
    image = read_radiograph(file, log)
    assert image.mode == "L"
    return np.asarray(image).astype(int)


def kind_of(file) -> str:
    with pytest.raises(SourceError) as caught:
        read_radiograph(file)
    assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)
    return caught.value.kind


def levels(shares: np.ndarray) -> np.ndarray:
    return np.floor(np.clip(shares, 0, 1) * 255 + 0.5)


def between_percentiles(values: np.ndarray, within: np.ndarray | None = None) -> np.ndarray:
    low, high = np.percentile(values if within is None else within, (0.5, 99.5))
    return levels((values - low) / (high - low))


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_never_end_the_program(tmp_path):
    rng = random.Random(0)
    dataset = pydicom.dcmread(write_dicom(tmp_path / "a.dcm", STORED, WindowCenter=2000, WindowWidth=900))
    dataset.compress(JPEG2000Lossless)
    dataset.save_as(tmp_path / "b.dcm")
    sources = [encoded(picture(0), kind) for kind in ("PNG", "JPEG", "TIFF")]
    sources += [(tmp_path / name).read_bytes() for name in ("a.dcm", "b.dcm")]
    sources.append(encoded(picture(0), "JPEG", exif=_exif(6)))
    refused = 0
    for number in range(240):
        content = bytearray(sources[number % len(sources)])
        for _ in range(rng.choice([1, 3, 20])):
            content[rng.randrange(len(content))] = rng.randrange(256)
        file = tmp_path / "damaged"
        file.write_bytes(bytes(content[: rng.randrange(1, len(content) + 1)] if number % 2 else content))
        try:
            read_radiograph(file)
        except SourceError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 100


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_use_the_range_they_have(tmp_path, form):
    values = 20000 + STORED  # by their upper eight bits there would be 17 levels
    file = tmp_path / f"a.{form.lower()}"
    Image.fromarray(values.astype(np.uint16)).save(file)
    log = BuildLog()
    found = grey(file, log)
    assert np.abs(found - between_percentiles(values.astype(np.float32))).max() <= 1
    assert log.noticed == {"16-bit image": 1}
    assert np.array_equal(np.asarray(read_rgb(file, "a"))[..., 1], found)


def test_sixteen_bits_with_white_for_zero_are_turned_over(tmp_path):
    Image.fromarray(STORED).save(tmp_path / "black.tiff")
    Image.fromarray(0xFFFF - STORED).save(tmp_path / "white.tiff", tiffinfo={0x0106: 0})
    assert np.abs(grey(tmp_path / "white.tiff") - grey(tmp_path / "black.tiff")).max() <= 1


def test_a_16_bit_image_of_one_value_is_black(tmp_path):
    Image.fromarray(np.full((8, 8), 900, np.uint16)).save(tmp_path / "flat.png")
    assert not grey(tmp_path / "flat.png").any()


@pytest.mark.parametrize("form", ["Adobe JPEG", "plain JPEG", "TIFF"])
def test_inks_become_the_grey_they_print(tmp_path, form):
    original = picture("inks")
    nothing = Image.new("L", original.size)
    inks = Image.merge("CMYK", (nothing, nothing, nothing, ImageOps.invert(original)))
    content = encoded(inks, form.split()[-1], **({} if form == "TIFF" else {"quality": 95}))
    adobe = content.find(b"\xff\xee")
    if form == "plain JPEG":  # the same inks, not inverted, and nothing that says so
        inverted = Image.merge("CMYK", [ImageOps.invert(channel) for channel in inks.split()])
        content = encoded(inverted, "JPEG", quality=95)
        adobe = content.find(b"\xff\xee")
        length = int.from_bytes(content[adobe + 2 : adobe + 4], "big")
        content = content[:adobe] + content[adobe + 2 + length :]
        assert b"Adobe" not in content
    elif form == "Adobe JPEG":
        assert adobe > 0
    file = tmp_path / "inks"
    file.write_bytes(content)
    log = BuildLog()
    assert np.abs(grey(file, log) - np.asarray(original).astype(int)).mean() < 2
    assert log.noticed == {"CMYK image": 1}


def test_colours_palettes_and_alpha_become_grey(tmp_path):
    original = picture("grey").convert("RGB")
    expected = np.asarray(original.convert("L")).astype(int)
    alpha = Image.new("L", original.size, 255)
    alpha.paste(0, (0, 0, 10, 10))
    transparent = original.copy()
    transparent.putalpha(alpha)
    for image, tolerance in (
        (original, 0),
        (original.quantize(256), 3),
        (original.convert("L"), 0),
        (transparent, 0),
        (transparent.convert("LA"), 0),
        (original.convert("1"), 255),
    ):
        image.save(tmp_path / "a.png")
        log = BuildLog()
        found = grey(tmp_path / "a.png", log)
        assert not log.noticed
        assert np.abs(found[12:] - expected[12:]).max() <= tolerance, image.mode
        if image.mode in ("RGBA", "LA"):
            assert not found[:10, :10].any() and found[:10, 12:].any()


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_images_are_turned_as_their_tag_says(tmp_path, form, orientation):
    upright = np.arange(6 * 4, dtype=np.uint8).reshape(6, 4).repeat(16, 0).repeat(16, 1) * 10
    # What a camera stored, by the meaning of the tag: which edge of the picture its first row and column are.
    stored = {
        2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: np.transpose,
        6: np.rot90, 7: lambda x: np.rot90(x, 2).T, 8: lambda x: np.rot90(x, -1),
    }.get(orientation, np.asarray)(upright)  # fmt: skip
    file = tmp_path / "a"
    extra = {"tiffinfo": {0x0112: orientation}} if form == "TIFF" else {"exif": _exif(orientation)}
    file.write_bytes(encoded(Image.fromarray(np.ascontiguousarray(stored)), form, **extra))
    log = BuildLog()
    found = grey(file, log)
    assert found.shape == upright.shape
    assert np.abs(found - upright.astype(int)).mean() < 4
    assert log.noticed == ({"EXIF-rotated image": 1} if 2 <= orientation <= 8 else {})


def test_faults_of_pictures_have_their_names(tmp_path, monkeypatch):
    jpeg, png = (encoded(picture(0, (200, 200)), kind) for kind in ("JPEG", "PNG"))
    contents = {
        "empty image file": b"",
        "not an image": b"<html>Not found</html>",
        "truncated image": jpeg[: len(jpeg) // 2],
    }
    for kind, content in contents.items():
        (tmp_path / "a.jpg").write_bytes(content)
        assert kind_of(tmp_path / "a.jpg") == kind
    for content in (png[: len(png) // 2], jpeg[:-200], encoded(picture(0), "TIFF")[:1500]):
        (tmp_path / "b").write_bytes(content)
        assert kind_of(tmp_path / "b") == "truncated image"
    damaged = bytearray(png)
    damaged[len(png) // 2] ^= 0xFF
    (tmp_path / "c.png").write_bytes(damaged)
    assert kind_of(tmp_path / "c.png") == "truncated image"
    without_width = png[:16] + bytes(4) + png[20:]
    (tmp_path / "d.png").write_bytes(without_width)
    assert kind_of(tmp_path / "d.png") in ("not an image", "truncated image")
    assert kind_of(tmp_path / "nowhere.png") == "missing image"
    assert kind_of(tmp_path) == "missing image"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    (tmp_path / "bomb.png").write_bytes(png)
    assert kind_of(tmp_path / "bomb.png") == "image of too many pixels"


def test_a_fault_is_written_to_the_log_by_its_kind(tmp_path):
    (tmp_path / "a.png").touch()
    log = BuildLog("skip", tmp_path / "build-log.jsonl")
    with pytest.raises(SourceError) as caught:
        read_radiograph(tmp_path / "a.png", log)
    log.fault(caught.value)
    (line,) = map(json.loads, (tmp_path / "build-log.jsonl").read_text().splitlines())
    assert (line["action"], line["kind"], line["file"]) == ("skipped", "empty image file", str(tmp_path / "a.png"))


def test_the_log_names_no_folder_of_this_machine(tmp_path, monkeypatch):
    (tmp_path / "joe" / "pmc").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "joe")
    folders = [Path("."), Path("pmc"), Path("../joe/pmc"), Path("/")]
    log = BuildLog("skip", tmp_path / "build-log.jsonl", folders)
    for file in (tmp_path / "joe" / "pmc" / "a.png", Path("../joe/pmc/a.png"), Path("pmc/a.png"), "inst01.pat02"):
        log.notice("odd", file, f"see {file}.")
    lines = [json.loads(line) for line in (tmp_path / "build-log.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == ["pmc/a.png"] * 3 + ["inst01.pat02"]
    assert [line["message"] for line in lines] == ["see pmc/a.png."] * 3 + ["see inst01.pat02."]


@pytest.mark.parametrize("shape", [(1, 1), (3000, 1), (1, 3000), (40, 20), (20, 40), (56, 56), (5, 4)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_square_holds_the_whole_image_in_its_proportions(shape, mode):
    square = fit_square(Image.new(mode, shape, "white"), 56)
    assert square.size == (56, 56) and square.mode == mode
    bright = np.asarray(square.convert("L")) > 127
    columns, rows = (int(bright.any(axis).sum()) for axis in (0, 1))
    scale = 56 / max(shape)
    assert (columns, rows) == tuple(max(1, round(side * scale)) for side in shape)
    # In the middle, and nothing of the border is bright.
    assert bright.sum() == columns * rows
    centre = [float(np.flatnonzero(bright.any(axis)).mean()) for axis in (0, 1)]
    assert all(abs(place - 27.5) <= 0.5 for place in centre)
