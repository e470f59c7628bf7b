"""How fast MIMIC-CXR's reports are scanned from their archive, and in how much memory.

Writes archives in the published layout, with reports of the length and the headings of real ones and one in ten odd
in some way, and reads each in a process of its own. The studies that qualify are found, their texts are not kept.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import subprocess
import sys
import tempfile
import textwrap
import time
import zipfile
from pathlib import Path


SENTENCES = (
    "The lungs are clear without focal consolidation, effusion, or edema.",
    "Cardiac size is top normal, and the aorta is tortuous and calcified as before.",
    "Small bilateral pleural effusions have increased since ___, with adjacent atelectasis.",
    "There is a new opacity in the right lower lobe, which may reflect pneumonia in the proper clinical setting.",
    "The right internal jugular central venous catheter terminates in the mid SVC.",
    "Moderate pulmonary edema has slightly improved compared to the prior study of ___ at 10:20.",
    "Median sternotomy wires and mediastinal clips are again noted, intact and aligned.",
    "Lung volumes are low, which accentuates the bronchovascular markings.",
    "Endotracheal tube tip is 4.5 cm above the carina, and the nasogastric tube courses below the diaphragm.",
    "No acute osseous abnormality is identified; there are multiple healed left rib fractures.",
)
REASONS = ("cough and fever // pneumonia?", "shortness of breath // edema", "chest pain, rule out pneumothorax")
DIVIDER = "_" * 78


def write_archive(file: Path, count: int) -> None:
    """Write `count` reports, four of every patient; the same for the same count."""
    rng = random.Random(count)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for number in range(count):
            patient, study = 10_000_000 + number // 4 * 89 % 9_999_991, 50_000_000 + number * 7919 % 9_999_991
            archive.writestr(f"files/p{str(patient)[:2]}/p{patient}/s{study}.txt", _report(rng))


def _report(rng: random.Random) -> str:
    findings = " ".join(rng.choices(SENTENCES, k=rng.randint(8, 20)))
    sections = {
        "EXAMINATION": "CHEST (PA AND LAT)",
        "INDICATION": f"___ year old woman with {rng.choice(REASONS)}",
        "TECHNIQUE": "Chest PA and lateral",
        "COMPARISON": rng.choice(("___", "Chest radiograph from ___.", "None.")),
        "FINDINGS": f"\n{findings}",
        "IMPRESSION": f"\n{' '.join(rng.choices(SENTENCES, k=3))}",
    }
    oddity = rng.randrange(60)
    if oddity == 0:
        sections = {"CHEST, 2 VIEWS": sections["FINDINGS"]}
    elif oddity == 1:
        sections["TECHNIQUE"] = ""
    elif oddity == 2:
        sections |= {"FINDINGS AND IMPRESSION": sections.pop("FINDINGS")}
    lines = [f"{'FINAL REPORT':>45}"]
    for heading, text in sections.items():
        lines += textwrap.wrap(f"{heading}:  {text}", 78, initial_indent=" ", subsequent_indent=" ") + [" "]
    report = "\n".join(lines) + "\n"
    if oddity == 3:
        return f" ADDENDUM:  Discussed by telephone.\n {DIVIDER}\n{report}"
    if oddity == 4:
        return report.replace("\n", "\r\n")
    return report.replace(":  ", " ", 9) if oddity == 5 else report


def scan(root: Path) -> None:
    """Scan the archive in `root` and print reports, qualifying studies, seconds, megabytes before and at the peak."""
    from medforget_dataset.build_log import BuildLog
    from medforget_dataset.corpora.mimic_cxr import Corpus
    from medforget_dataset.options import BuildOptions

    corpus = Corpus(BuildOptions(corpus="mimic-cxr", root=str(root)), BuildLog("stop", root / "build-log.jsonl"))
    before, start = _peak_megabytes(), time.perf_counter()
    entries = sum(1 for _ in corpus.scan())
    seconds = time.perf_counter() - start
    sys.stdout.write(f"{entries} {seconds} {before} {_peak_megabytes()}\n")


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Print one line for each number of reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", nargs="*", type=int, default=[10_000, 50_000], help="reports in each archive")
    parser.add_argument("--scan", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.scan:
        scan(args.scan)
        return
    line = "{:>9} {:>10} {:>9} {:>11} {:>15} {:>9} {:>10}\n"
    names = ("reports", "bytes each", "qualify", "reports / s", "MB after import", "MB peak", "MB by scan")
    sys.stdout.write(line.format(*names))
    for count in args.counts:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            write_archive(root / "mimic-cxr-reports.zip", count)
            with zipfile.ZipFile(root / "mimic-cxr-reports.zip") as archive:
                size = sum(info.file_size for info in archive.infolist()) // count
            # One file is enough for the images to be found as DICOM, whose headers a scan does not read.
            study = root / "files" / "p10" / "p10000000" / "s50000000"
            study.mkdir(parents=True)
            (study / "image.dcm").touch()
            command = [sys.executable, "-m", "benchmarks.scan_reports", "--scan", folder]
            done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=True)
        entries, seconds, before, peak = map(float, done.stdout.split())
        figures = f"{count / seconds:,.0f}", f"{before:,.0f}", f"{peak:,.0f}", f"{peak - before:,.0f}"
        sys.stdout.write(line.format(f"{count:,}", f"{size:,}", f"{entries:,.0f}", *figures))


if __name__ == "__main__":
    main()
