"""Run the benchmarks and write their report: `python bench/run.py [--short | --full]`.

The short form takes under 5 minutes on two quiet cores. Results go to bench/out/: the JSON of
pytest-benchmark, report.md, and plots.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import report

HERE = Path(__file__).parent
FILES = ("overhead", "contractions", "linear", "conv", "patterns", "nm", "scaling", "peers")  # peers last


def command(form: str, target: Path, files: list[str], pins: list[str]) -> list[str]:
    """The pytest call for these files."""
    paths = [str(HERE / f"bench_{name}.py") for name in files]
    options = ["--benchmark-enable", f"--form={form}", f"--benchmark-json={target}", "--benchmark-quiet"]
    return [sys.executable, "-m", "pytest", "-q", *paths, *options, *pins]


def main() -> int:
    """Returns the exit status of pytest, or of the report if that fails."""
    parser = argparse.ArgumentParser(description="Run the benchmarks and write their report.")
    form = parser.add_mutually_exclusive_group()
    for name in ("short", "full", "tiny"):
        form.add_argument(f"--{name}", dest="form", action="store_const", const=name)
    parser.set_defaults(form="short")
    parser.add_argument("--only", nargs="+", choices=FILES, default=list(FILES), help="run these only")
    parser.add_argument("--threads", type=int, help="threads to use (default: 2, or 1 on one core)")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: with --threads 1 only")
    parser.add_argument("--out", type=Path, default=HERE / "out", help="folder for the results")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    target = arguments.out.resolve() / f"{arguments.form}.json"
    start = time.perf_counter()
    pins = [f"--clock={arguments.clock}"]
    if arguments.threads is not None:
        pins.append(f"--threads={arguments.threads}")
    run = command(arguments.form, target, arguments.only, pins)
    status = subprocess.run(run, cwd=HERE.parent, env=os.environ).returncode
    if status:
        print("the benchmarks failed; no report is written", file=sys.stderr)
        return status
    told = report.main([str(target), str(arguments.out)])
    print(f"{time.perf_counter() - start:.0f} s; report in {arguments.out / 'report.md'}")
    return told


if __name__ == "__main__":
    sys.exit(main())
