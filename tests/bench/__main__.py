"""Measures what the project promises: ``make bench`` prints the table and keeps it in RESULTS.md (``--write``).

Times are compared within one run, the two sides in turn, by the median of the ratios of pairs: machines drift.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from tests.bench import capture, footprint, neurons, throughput
from tests.bench.table import Row, render

RESULTS = Path(__file__).parent / "RESULTS.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="keep the tables in RESULTS.md")
    parser.add_argument("--only", choices=["capture", "throughput", "footprint", "neurons"])
    args = parser.parse_args()
    parts: dict[str, Callable[[Path], list[Row]]] = {
        "capture": capture.measure,
        "throughput": throughput.measure,
        "footprint": footprint.measure,
        "neurons": neurons.measure,
    }
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, measure in parts.items():
            if args.only in (None, name):
                print(f"measuring {name} ...", file=sys.stderr, flush=True)
                rows += measure(Path(folder))
    text = f"{machine()}\n\n{render(rows)}\n"
    print(text)
    if args.write:
        intro = (
            "# Measurements\n\nMade by `make bench`; a ratio is the median of pairs measured in turn, in one run.\n\n"
        )
        RESULTS.write_text(intro + text)


def machine() -> str:
    cores = os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    processor = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout
    model = next(line.split(":", 1)[1].strip() for line in processor.splitlines() if line.startswith("Model name"))
    return (
        f"Machine: {model}, {cores} cores, {memory:.0f} GiB, no GPU; {platform.system()} {platform.release()}; "
        f"Python {platform.python_version()}, torch {version('torch')} on {torch.get_num_threads()} threads, "
        f"open_clip {version('open_clip_torch')}, zarr {version('zarr')}. {datetime.now(UTC):%Y-%m-%d}."
    )


if __name__ == "__main__":
    main()
