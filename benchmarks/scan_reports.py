"""How fast MIMIC-CXR's archive of reports is scanned, and in how much memory, at two sizes side by side.

    python benchmarks/scan_reports.py --reports 10000 50000

Reports are generated: the headings, lengths and oddities of real ones, and no words of theirs. The scan is the one of
`medforget build --corpus mimic-cxr`: sections of every report parsed, studies with the four standard ones kept.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from tqdm import tqdm


WORDS = (
    "the lungs are clear without focal consolidation there is a small right pleural effusion heart size normal "
    "mediastinal contours unremarkable interval change compared with prior radiograph left lower lobe opacity may "
    "reflect atelectasis or pneumonia no pneumothorax seen tube terminates above carina osseous structures intact"
).split()


def text(rng: random.Random, words: int) -> str:
    """Lines of at most 79 characters, each after a space, as MIMIC-CXR's are."""
    lines, line = [], ""
    for word in rng.choices(WORDS, k=words):
        if len(line) + len(word) > 75:
            lines.append(line)
            line = ""
        line += f" {word}"
    return "\n".join([*lines, line]).strip()


def report(rng: random.Random) -> str:
    """About two thousand characters; one report in ten lacks a standard section, one in fifty has no heading."""
    if rng.random() < 0.02:
        return f" {text(rng, 200)}\n"
    own = ["EXAMINATION", "INDICATION", "TECHNIQUE", "COMPARISON", "FINDINGS", "IMPRESSION"]
    lengths = dict(zip(own, (6, 14, 10, 4, 150, 60), strict=True))
    if rng.random() < 0.1:
        own.remove(rng.choice(own))
    body = "\n \n".join(f" {key}:  {text(rng, lengths[key])}" for key in own)
    addendum = f" ADDENDUM:  {text(rng, 20)}\n {'_' * 78}\n" if rng.random() < 0.02 else ""
    return f"{addendum}{'FINAL REPORT':>45}\n{body}\n"


def write_archive(root: Path, count: int) -> None:
    """`count` reports of four studies a patient, in the layout that MIMIC-CXR is published in."""
    rng = random.Random(0)
    with zipfile.ZipFile(root / "mimic-cxr-reports.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in tqdm(range(count), desc=f"writing {count} reports", unit="report"):
            patient, study = 10_000_000 + number // 4 * 37, 50_000_000 + number
            archive.writestr(f"files/p{str(patient)[:2]}/p{patient}/s{study}.txt", report(rng))


def scan(root: Path) -> dict[str, float]:
    """Scan in this process; its peak memory is that of the scan and of what it imports."""
    from medforget_dataset import BuildOptions
    from medforget_dataset.corpora.mimic_cxr import Corpus

    corpus = Corpus(BuildOptions(corpus="mimic-cxr", root=str(root)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    found = corpus._qualifying_reports()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"qualifying": len(found), "seconds": seconds, "before_mib": before / 1024, "peak_mib": peak / 1024}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=int, nargs="+", default=[10_000, 50_000], help="sizes of the archive")
    parser.add_argument("--scan", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.scan:
        sys.stdout.write(json.dumps(scan(args.scan)))
        return 0
    lines = ["| reports | per second | peak memory | of it before the scan |", "|---:|---:|---:|---:|"]
    for count in args.reports:
        with tempfile.TemporaryDirectory() as root:
            write_archive(Path(root), count)
            # A process of its own for each size: memory that one has used is not given back.
            done = subprocess.run([sys.executable, __file__, "--scan", root], check=True, stdout=subprocess.PIPE)
        result = json.loads(done.stdout)
        rate = count / result["seconds"]
        lines.append(f"| {count:,} | {rate:,.0f} | {result['peak_mib']:.0f} MiB | {result['before_mib']:.0f} MiB |")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
