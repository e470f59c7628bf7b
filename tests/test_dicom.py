"""DICOM to the grey levels that its header asks for, whatever the encoding, and every fault by its name."""

import gzip
import io
import subprocess
import sys

import numpy as np
import pydicom
import pytest
from hospital_files import encoded, picture, write_dicom
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.pixels import convert_color_space
from pydicom.sequence import Sequence
from pydicom.uid import MPEG2MPML, JPEG2000Lossless, JPEGBaseline8Bit, JPEGLSLossless, RLELossless
from test_images import STORED, between_percentiles, grey, kind_of, levels

from medforget_dataset.build_log import BuildLog, SourceError
from medforget_dataset.errors import UserError
from medforget_dataset.images import read_dicom_header, read_radiograph


def lookup_table(entries: np.ndarray, first: int, bits: int) -> pydicom.Dataset:
    item = pydicom.Dataset()
    item.LUTDescriptor = [len(entries), first, bits]
    item.LUTData = entries.astype("<u2").tobytes()
    return item


# Windows by the formulas of PS3.3 C.11.2.1.2 and C.11.2.1.3, as shares of the display's range.
def linear(x, centre, width):
    return np.where(x <= centre - 0.5 - (width - 1) / 2, 0, (x - (centre - 0.5)) / (width - 1) + 0.5)


def linear_exact(x, centre, width):
    return (x - centre) / width + 0.5


def sigmoid(x, centre, width):
    return 1 / (1 + np.exp(-4 * (x - centre) / width))


WINDOWS = {
    "linear by default": (linear, {"WindowCenter": 2000, "WindowWidth": 900}),
    "linear": (linear, {"WindowCenter": 2000, "WindowWidth": 900, "VOILUTFunction": "LINEAR"}),
    "first of three": (linear, {"WindowCenter": [2000, 100, 3000], "WindowWidth": [900, 40, 10]}),
    "linear exact": (linear_exact, {"WindowCenter": 1500, "WindowWidth": 800, "VOILUTFunction": "LINEAR_EXACT"}),
    "sigmoid": (sigmoid, {"WindowCenter": 2200, "WindowWidth": 1500, "VOILUTFunction": "SIGMOID"}),
}


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize(("slope", "intercept"), [(None, None), (1, -1024), (2.5, 10), (-1, 4095)])
@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_is_applied_as_the_standard_says(tmp_path, name, slope, intercept, inverted):
    formula, window = WINDOWS[name]
    window = dict(window)
    values = STORED.astype(float)
    if slope is not None:
        values = values * slope + intercept
        window["WindowCenter"] = (np.array(window["WindowCenter"]) * slope + intercept).tolist()
    centre, width = (np.atleast_1d(window[key])[0] for key in ("WindowCenter", "WindowWidth"))
    photometric = "MONOCHROME1" if inverted else "MONOCHROME2"
    file = write_dicom(
        tmp_path / "w.dcm",
        STORED,
        RescaleSlope=slope,
        RescaleIntercept=intercept,
        PhotometricInterpretation=photometric,
        **window,
    )
    expected = levels(formula(values, centre, width))
    found = grey(file)
    assert np.abs(found - (255 - expected if inverted else expected)).max() <= 1
    assert len(np.unique(found)) > 30


def test_signed_pixels_are_windowed(tmp_path):
    signed = STORED.astype(np.int16) - 2048
    window = {"WindowCenter": -100, "WindowWidth": 1000}
    file = write_dicom(
        tmp_path / "s.dcm", STORED, PixelRepresentation=1, PixelData=signed.astype("<i2").tobytes(), **window
    )
    assert np.abs(grey(file) - levels(linear(signed.astype(float), -100, 1000))).max() <= 1


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_a_table_of_the_header_is_applied_before_any_window(tmp_path, bits):
    curve = np.round((2**bits - 1) * (np.arange(3000) / 2999) ** 2)
    table = Sequence([lookup_table(curve, 500, bits)])
    file = write_dicom(tmp_path / "t.dcm", STORED, VOILUTSequence=table, WindowCenter=10, WindowWidth=5)
    expected = curve[np.clip(STORED.astype(int) - 500, 0, 2999)] / (2**bits - 1)
    assert np.abs(grey(file) - levels(expected)).max() <= 1


def test_a_modality_table_comes_before_the_window(tmp_path):
    curve = np.round(65535 * np.sqrt(np.arange(4096) / 4095))
    table = Sequence([lookup_table(curve, 0, 16)])
    table[0].ModalityLUTType = "US"
    file = write_dicom(tmp_path / "m.dcm", STORED, ModalityLUTSequence=table, WindowCenter=40000, WindowWidth=20000)
    assert np.abs(grey(file) - levels(linear(curve[STORED], 40000, 20000))).max() <= 1


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_without_a_window_padding_does_not_set_the_range_and_is_black(tmp_path, photometric):
    pixels = STORED // 4 + 300
    pixels[:6], pixels[6:8] = 4000, 4090
    padding = {"PixelPaddingValue": 4000, "PixelPaddingRangeLimit": 4095}
    found = grey(write_dicom(tmp_path / "p.dcm", pixels, PhotometricInterpretation=photometric, **padding))
    expected = between_percentiles(pixels[8:].astype(float))
    assert (found[:8] == 0).all()
    assert np.array_equal(found[8:], 255 - expected if photometric == "MONOCHROME1" else expected)
    assert np.array_equal(grey(write_dicom(tmp_path / "n.dcm", pixels)), between_percentiles(pixels.astype(float)))
    everywhere = write_dicom(tmp_path / "e.dcm", np.full((4, 4), 7, np.uint16), PixelPaddingValue=7)
    assert not grey(everywhere).any()


@pytest.mark.parametrize(
    "window",
    [
        {"WindowWidth": 0, "WindowCenter": 5},
        {"WindowWidth": 50},
        {"WindowWidth": 9, "WindowCenter": 9, "VOILUTFunction": "LOG"},
    ],
)
def test_a_window_of_no_use_is_noticed_and_left_out(tmp_path, window):
    log = BuildLog()
    found = grey(write_dicom(tmp_path / "w.dcm", STORED, **window), log)
    assert np.array_equal(found, between_percentiles(STORED.astype(float)))
    assert log.noticed == {"DICOM window of no use": 1}


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
def test_pixels_compressed_without_loss_are_the_same(tmp_path, syntax):
    plain = write_dicom(tmp_path / "plain.dcm", STORED, WindowCenter=2000, WindowWidth=900)
    dataset = pydicom.dcmread(plain)
    dataset.compress(syntax)
    dataset.save_as(tmp_path / "packed.dcm")
    assert pydicom.dcmread(tmp_path / "packed.dcm").file_meta.TransferSyntaxUID == syntax
    assert np.array_equal(grey(tmp_path / "packed.dcm"), grey(plain))


def test_baseline_jpeg_in_dicom_is_what_pillow_decodes(tmp_path):
    jpeg = encoded(picture("jpeg"), "JPEG", quality=90)
    file = write_dicom(tmp_path / "j.dcm", np.zeros((60, 48), np.uint16), BitsAllocated=8, BitsStored=8, HighBit=7)
    dataset = pydicom.dcmread(file)
    dataset.PixelData = encapsulate([jpeg])
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    dataset.WindowCenter, dataset.WindowWidth = 128, 256
    dataset.save_as(file)
    decoded = np.asarray(Image.open(io.BytesIO(jpeg))).astype(int)
    assert decoded.std() > 20
    assert np.abs(grey(file) - decoded).max() <= 2


@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL", "PALETTE COLOR"])
def test_coloured_dicom_becomes_its_own_grey(tmp_path, photometric):
    colour = np.asarray(picture("colour").convert("RGB")).copy()
    colour[..., 0] //= 2
    eight = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "PhotometricInterpretation": photometric}
    if photometric == "PALETTE COLOR":
        indexes = colour[..., 1]
        eight["PixelData"] = indexes.tobytes()
        for number, name in enumerate(("Red", "Green", "Blue")):
            eight[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
            curve = (np.arange(256) // (number + 1)).astype("<u2") * 257
            eight[f"{name}PaletteColorLookupTableData"] = curve.tobytes()
        colour = np.stack([indexes, indexes // 2, indexes // 3], axis=-1)
    else:
        stored = colour if photometric == "RGB" else convert_color_space(colour, "RGB", "YBR_FULL")
        eight |= {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "PixelData": stored.tobytes()}
    file = write_dicom(tmp_path / "c.dcm", colour[..., 0], **eight)
    assert np.abs(grey(file) - np.asarray(Image.fromarray(colour).convert("L"))).max() <= 2


def test_dicom_is_told_by_its_content(tmp_path):
    plain = write_dicom(tmp_path / "a.dcm", STORED)
    expected = grey(plain)
    for name, content in (
        ("a.bin", plain.read_bytes()),
        ("a.jpg", plain.read_bytes()),
        ("a.dcm.gz", gzip.compress(plain.read_bytes())),
        ("packed.dcm", gzip.compress(plain.read_bytes())),
    ):
        (tmp_path / name).write_bytes(content)
        assert np.array_equal(grey(tmp_path / name), expected), name
        assert read_dicom_header(tmp_path / name).Rows == 64


def test_faults_of_dicom_have_their_names(tmp_path):
    good = write_dicom(tmp_path / "good.dcm", STORED).read_bytes()
    packed = gzip.compress(good)
    cut = {
        "not a DICOM file": encoded(picture(1)),
        "DICOM without pixels": good[:200],
        "truncated DICOM": good[:-20],
        "damaged DICOM file": packed[: len(packed) // 2],
    }
    for kind, content in cut.items():
        (tmp_path / "x.dcm").write_bytes(content)
        assert kind_of(tmp_path / "x.dcm") == kind
    elements = {
        "DICOM without pixels": {"PixelData": None},
        "DICOM of several frames": {"NumberOfFrames": 2, "PixelData": STORED.tobytes() * 2},
        "truncated DICOM": {"Rows": 65},
    }
    for kind, changed in elements.items():
        assert kind_of(write_dicom(tmp_path / "y.dcm", STORED, **changed)) == kind
    assert kind_of(write_dicom(tmp_path / "z.dcm", STORED, Rows=None)) == "truncated DICOM"
    assert kind_of(write_dicom(tmp_path / "z.dcm", STORED, PixelData=b"")) == "DICOM without pixels"


def test_a_syntax_nobody_decodes_is_named_with_the_package_that_might(tmp_path):
    file = write_dicom(tmp_path / "film.dcm", STORED)
    dataset = pydicom.dcmread(file)
    dataset.PixelData = encapsulate([b"\x00" * 64])
    dataset.file_meta.TransferSyntaxUID = MPEG2MPML
    dataset.save_as(file)
    assert kind_of(file) == "DICOM that cannot be decoded"
    with pytest.raises(SourceError, match=r"MPEG2 Main Profile.*medforget\[dicom\]"):
        read_radiograph(file)
    # A known syntax whose package is not installed: JPEG-LS, by an interpreter that has no pylibjpeg.
    dataset.file_meta.TransferSyntaxUID = JPEGLSLossless
    dataset.save_as(file)
    assert kind_of(file) == "truncated DICOM"  # the package is here, and these are not JPEG-LS' bytes
    program = (
        "import sys; sys.modules['pylibjpeg'] = sys.modules['libjpeg'] = sys.modules['jpeg_ls'] = None\n"
        "from pathlib import Path; from medforget_dataset.images import SourceError, read_radiograph\n"
        "try: read_radiograph(Path(sys.argv[1]))\n"
        "except SourceError as error: print(error.kind, '|', error)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, file], capture_output=True, text=True, check=True)
    assert ended.stdout.startswith("DICOM that cannot be decoded | ")
    assert "JPEG-LS" in ended.stdout and "medforget[dicom]" in ended.stdout


def test_dicom_without_pydicom_says_what_to_install(tmp_path, monkeypatch):
    file = write_dicom(tmp_path / "a.dcm", STORED)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UserError, match=r"a.dcm: DICOM needs pydicom; pip install 'medforget\[dicom\]'"):
        read_radiograph(file)
