"""Radiographs of every kind come out grey, upright and with bones bright, or are named as what is wrong with them."""

import gzip
import struct

import numpy as np
import pytest
from hospital_files import encoded, picture, write_dicom
from PIL import Image

from medforget_dataset.build_log import BuildLog, SourceError
from medforget_dataset.images import fit_square, read_dicom_header, read_radiograph


PIXELS = (np.arange(40 * 30, dtype=np.uint16).reshape(40, 30) * 3) % 4096  # 12 bits, 40 rows of 30


def read(file, content=None):
    log = BuildLog()
    if content is not None:
        file.write_bytes(content)
    return np.asarray(read_radiograph(file, log)), log


def close(found, expected, tolerance=1):
    return np.abs(found.astype(int) - np.asarray(expected).astype(int)).max() <= tolerance


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_grey_pictures_are_read_as_they_are(kind, tmp_path):
    image = picture(1)
    found, log = read(tmp_path / "image", encoded(image, kind))
    assert np.array_equal(found, np.asarray(image)) and not log.noticed


def test_sixteen_bits_are_stretched_and_not_cut_off(tmp_path):
    values = np.linspace(1000, 60000, 64 * 64).reshape(64, 64).astype(np.uint16)
    found, log = read(tmp_path / "image.png", encoded(Image.fromarray(values), "PNG"))
    low, high = np.percentile(values, [0.5, 99.5])
    assert close(found, np.clip((values - low) / (high - low), 0, 1) * 255)
    assert log.noticed == {"16-bit image": 1}


def test_colours_and_transparency_become_grey(tmp_path):
    image = picture(2)
    for mode, kind in (("RGB", "PNG"), ("P", "PNG"), ("LA", "PNG"), ("RGBA", "PNG"), ("1", "PNG")):
        found, _ = read(tmp_path / "image", encoded(image.convert(mode), kind))
        assert close(found, np.asarray(image.convert("1").convert("L") if mode == "1" else image), 3), mode
    transparent = Image.new("RGBA", (10, 10), (255, 255, 255, 0))
    assert read(tmp_path / "image", encoded(transparent, "PNG"))[0].max() == 0


def test_cmyk_is_converted_and_not_inverted(tmp_path):
    image = picture(3).convert("RGB").convert("CMYK")
    found, log = read(tmp_path / "image.jpg", encoded(image, "JPEG", quality=95))
    assert close(found, picture(3), 12) and log.noticed == {"CMYK image": 1}


@pytest.mark.parametrize(("orientation", "turns"), [(3, 2), (6, 3), (8, 1)])
def test_exif_rotation_is_undone(orientation, turns, tmp_path):
    upright = picture(4)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.rot90(np.asarray(upright), -turns))
    found, log = read(tmp_path / "image.png", encoded(stored, "PNG", exif=exif))
    assert np.array_equal(found, np.asarray(upright)) and log.noticed == {"EXIF-rotated image": 1}


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "empty image file"),
        (b"not an image at all", "not an image"),
        (encoded(picture(5), "JPEG")[:400], "truncated image"),
        (encoded(picture(5, (300, 300)), "PNG")[:-2000], "truncated image"),
        (b"<html>404</html>", "not an image"),
    ],
)
def test_what_is_no_whole_image_is_named(content, kind, tmp_path):
    file = tmp_path / "image.png"
    file.write_bytes(content)
    with pytest.raises(SourceError, match=str(file)) as caught:
        read_radiograph(file)
    assert caught.value.kind == kind


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for file in (tmp_path / "nowhere.png", tmp_path):
        with pytest.raises(SourceError, match=str(file)) as caught:
            read_radiograph(file)
        assert caught.value.kind == "missing image"


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    (tmp_path / "image.png").write_bytes(encoded(picture(6), "PNG"))
    with pytest.raises(SourceError, match="damaged"):
        read_radiograph(tmp_path / "image.png")


def linear_window(values, center, width):
    """DICOM PS3.3 C.11.2.1.2.1, to 8 bits."""
    return np.clip(((values - (center - 0.5)) / (width - 1) + 0.5), 0, 1) * 255


def test_a_window_is_applied_as_the_standard_says(tmp_path):
    file = write_dicom(tmp_path / "a.dcm", PIXELS, WindowCenter=[2000, 1], WindowWidth=[1500, 2])
    assert close(read(file)[0], linear_window(PIXELS.astype(float), 2000, 1500))


def test_rescaling_comes_before_the_window(tmp_path):
    rescaled = {"RescaleSlope": 2, "RescaleIntercept": -1000, "RescaleType": "US"}
    file = write_dicom(tmp_path / "a.dcm", PIXELS, WindowCenter=1000, WindowWidth=3000, **rescaled)
    assert close(read(file)[0], linear_window(PIXELS * 2.0 - 1000, 1000, 3000))


@pytest.mark.parametrize("function", ["LINEAR_EXACT", "SIGMOID"])
def test_other_window_functions(function, tmp_path):
    elements = {"WindowCenter": 2000, "WindowWidth": 1500, "VOILUTFunction": function}
    found, _ = read(write_dicom(tmp_path / "a.dcm", PIXELS, **elements))
    values = (PIXELS - 2000.0) / 1500
    expected = np.clip(values + 0.5, 0, 1) if function == "LINEAR_EXACT" else 1 / (1 + np.exp(-4 * values))
    assert close(found, expected * 255)


@pytest.mark.parametrize("elements", [{}, {"WindowCenter": 100, "WindowWidth": 0}])
def test_without_a_valid_window_the_percentiles_decide(elements, tmp_path):
    low, high = np.percentile(PIXELS, [0.5, 99.5])
    expected = np.clip((PIXELS - low) / (high - low), 0, 1) * 255
    assert close(read(write_dicom(tmp_path / "a.dcm", PIXELS, **elements))[0], expected)


def test_monochrome1_is_inverted(tmp_path):
    window = {"WindowCenter": 2000, "WindowWidth": 3000}
    plain, _ = read(write_dicom(tmp_path / "a.dcm", PIXELS, **window))
    inverted, _ = read(write_dicom(tmp_path / "b.dcm", PIXELS, PhotometricInterpretation="MONOCHROME1", **window))
    assert close(inverted, 255 - plain)


def test_padding_is_black_and_sets_no_range(tmp_path):
    padded = PIXELS.clip(500, 1500)
    padded[:5] = 4095
    for kind in ("MONOCHROME1", "MONOCHROME2"):
        elements = {"PixelPaddingValue": 4095, "PhotometricInterpretation": kind}
        found, _ = read(write_dicom(tmp_path / "a.dcm", padded, **elements))
        assert found[:5].max() == 0 and found[5:].min() == 0 and found[5:].max() == 255


def test_signed_pixels(tmp_path):
    signed = PIXELS.astype(np.int16) - 2048
    elements = {"PixelRepresentation": 1, "WindowCenter": 0, "WindowWidth": 2000, "PixelData": signed.tobytes()}
    assert close(
        read(write_dicom(tmp_path / "a.dcm", PIXELS, **elements))[0], linear_window(signed.astype(float), 0, 2000)
    )


def test_a_gzipped_file_and_one_of_another_name_are_read(tmp_path):
    file = write_dicom(tmp_path / "a.dcm", PIXELS, ViewPosition="PA")
    packed = tmp_path / "b.dcm.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    renamed = tmp_path / "c.img"
    renamed.write_bytes(file.read_bytes())
    assert np.array_equal(read(packed)[0], read(file)[0]) and np.array_equal(read(renamed)[0], read(file)[0])
    assert read_dicom_header(packed).ViewPosition == "PA"


@pytest.mark.parametrize("syntax", ["RLELossless", "JPEG2000Lossless"])
def test_losslessly_compressed_pixels_are_decoded(syntax, tmp_path):
    import pydicom

    file = write_dicom(tmp_path / "a.dcm", np.tile(PIXELS, (4, 5)), WindowCenter=2000, WindowWidth=3000)
    expected, _ = read(file)
    dataset = pydicom.dcmread(file)
    dataset.compress(getattr(pydicom.uid, syntax), generate_instance_uid=False)
    dataset.save_as(tmp_path / "b.dcm")
    assert dataset.file_meta.TransferSyntaxUID.is_compressed
    assert np.array_equal(read(tmp_path / "b.dcm")[0], expected)


def test_jpeg_compressed_pixels_are_decoded(tmp_path):
    import pydicom
    from pydicom.encaps import encapsulate

    image = picture(7)
    eight_bits = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "WindowCenter": 128, "WindowWidth": 256}
    dataset = pydicom.dcmread(write_dicom(tmp_path / "a.dcm", np.asarray(image), **eight_bits))
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
    dataset.PixelData = encapsulate([encoded(image, "JPEG", quality=95)])
    dataset["PixelData"].VR = "OB"
    dataset.save_as(tmp_path / "b.dcm")
    assert close(read(tmp_path / "b.dcm")[0], image, 8)


def test_pixels_that_nothing_decodes_name_their_syntax(tmp_path):
    import pydicom
    from pydicom.encaps import encapsulate

    file = write_dicom(tmp_path / "a.dcm", PIXELS)
    dataset = pydicom.dcmread(file)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.MPEG2MPML
    dataset.PixelData = encapsulate([b"\x00" * 100])
    dataset["PixelData"].VR = "OB"
    dataset.save_as(file)
    with pytest.raises(SourceError, match=r"pixels in MPEG2 .*cannot be decoded.*medforget\[dicom\]"):
        read_radiograph(file)


def test_dicom_without_whole_pixels_is_named(tmp_path):
    cases = {
        "DICOM without pixels": {"PixelData": None},
        "truncated DICOM": {"PixelData": PIXELS.tobytes()[:500]},
        "DICOM of several frames": {"NumberOfFrames": 2, "PixelData": PIXELS.tobytes() * 2},
    }
    for kind, elements in cases.items():
        file = write_dicom(tmp_path / "a.dcm", PIXELS, **elements)
        with pytest.raises(SourceError, match=str(file)) as caught:
            read_radiograph(file)
        assert caught.value.kind == kind


def test_a_dicom_file_cut_short_anywhere_is_named(tmp_path):
    whole = write_dicom(tmp_path / "a.dcm", PIXELS).read_bytes()
    file = tmp_path / "b.dcm"
    for end in (100, 133, 200, 400, len(whole) // 2, len(whole) - 10):
        file.write_bytes(whole[:end])
        with pytest.raises(SourceError, match=str(file)):
            read_radiograph(file)
    file.write_bytes(gzip.compress(whole)[:300])
    with pytest.raises(SourceError, match=str(file)):
        read_radiograph(file)


def test_text_that_is_called_dicom_is_named(tmp_path):
    file = tmp_path / "a.dcm"
    file.write_bytes(b"hello" + struct.pack("<200x"))
    with pytest.raises(SourceError, match="no DICOM header"):
        read_radiograph(file)


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (1, 500), (500, 1), (1, 1), (64, 64)])
def test_a_square_holds_the_whole_image_in_its_proportions(shape):
    square = np.asarray(fit_square(Image.new("L", shape, 200), 64))
    assert square.shape == (64, 64)
    width, height = (square.max(axis=axis) > 100 for axis in (0, 1))
    longest = max(shape)
    assert width.sum() == max(1, round(64 * shape[0] / longest))
    assert height.sum() == max(1, round(64 * shape[1] / longest))
