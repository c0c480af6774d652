"""Fuzzes a reader, or reads one input again:

    python -m tests.fuzz TARGET [--minutes 10] [--seed 0] [--json FILE] [--keep FOLDER]
    python -m tests.fuzz TARGET --replay FILE

TARGET: annotations, shards, checkpoints or configuration. Ends with status 1 at the first finding; the input that made
it lies in the folder of --keep, by default fuzz-TARGET in the system's folder for temporary files. Needs `.[fuzz]`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.measure import environment, package_version
from tests.fuzz.coverage import lines_reached
from tests.fuzz.seeds import seeds, words
from tests.fuzz.targets import TARGETS, run

ROOT = Path(__file__).parent.parent.parent
MOST_RSS_MB = 4096
ONE_INPUT_SECONDS = 30
LARGEST_INPUT = 16384  # bytes; the longest seed is shorter


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="fuzzes the readers of strangers' files")
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file that gets the figures, beside those of other targets")
    parser.add_argument("--keep", type=Path, help="folder of inputs found, used again by the next run")
    parser.add_argument("--replay", type=Path, help="reads this one input, without atheris")
    args = parser.parse_args()
    if args.replay:
        with tempfile.TemporaryDirectory() as scratch:
            print("read" if run(args.target, args.replay.read_bytes(), Path(scratch)) else "refused, as it should be")
        return 0
    keep = args.keep or Path(tempfile.gettempdir()) / f"fuzz-{args.target}"
    found = fuzz(args.target, args.minutes, args.seed, keep)
    print(json.dumps(found, indent=1))
    if args.json:
        write(args.json, args.target, found)
    return 1 if found["finding"] else 0


def fuzz(target: str, minutes: float, seed: int, keep: Path) -> dict:
    """Runs libFuzzer for so long, or to the first finding; what it did, in numbers."""
    corpus = keep / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(seeds(target)):
        (corpus / f"seed_{number:03d}").write_bytes(content)
    quoted = ("".join(f"\\x{byte:02x}" for byte in word) for word in words(target))
    (keep / "words").write_text("".join(f'"{word}"\n' for word in quoted))
    options = [
        *(f"-max_total_time={round(minutes * 60)}", f"-seed={seed + 1}", f"-dict={keep / 'words'}"),
        *(f"-rss_limit_mb={MOST_RSS_MB}", f"-timeout={ONE_INPUT_SECONDS}", f"-max_len={LARGEST_INPUT}"),
        *(f"-artifact_prefix={keep}/", "-print_final_stats=1", "-len_control=0", str(corpus)),
    ]
    with tempfile.TemporaryDirectory(dir=memory_folder()) as scratch, open(keep / "log.txt", "w+b") as log:
        command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz.driver", target, scratch, *options]
        start = time.monotonic()
        settings = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        status = subprocess.run(command, cwd=ROOT, env=settings, stdout=log, stderr=log).returncode
        seconds = time.monotonic() - start
        log.seek(0)
        said = log.read().decode("utf-8", "replace")
    numbers = re.findall(r"#(\d+)\s+(\w+)\s+cov: (\d+) ft: (\d+) corp: (\d+)/", said)
    if not numbers:
        raise SystemExit(f"libFuzzer did not start:\n{said[-3000:]}")
    last = {
        name: int(n) for name, n in zip(("executions", "edges", "features", "corpus"), _final(numbers), strict=True)
    }
    executed = re.search(r"number_of_executed_units: (\d+)", said)
    return {
        "minutes": round(seconds / 60, 2),
        **last,
        **({"executions": int(executed[1])} if executed else {}),
        "lines": lines_reached(target, sorted(corpus.iterdir())),
        "seed": seed,
        "finding": finding(said, status),
    }


def _final(numbers: list[tuple[str, ...]]) -> tuple[str, ...]:
    executions, _, edges, features, corpus = numbers[-1]
    return executions, edges, features, corpus


def finding(said: str, status: int) -> str | None:
    """What went wrong, in one line; None where nothing did."""
    if status == 0:
        return None
    python = re.search(r"=== Uncaught Python exception: ===\n(.*)", said)
    native = re.search(r"ERROR: (libFuzzer: .*)", said)
    artifact = re.search(r"Test unit written to (\S+)", said)
    what = python[1] if python else native[1] if native else f"status {status}: {said[-300:]}"
    return f"{what}{f' ({Path(artifact[1]).name})' if artifact else ''}"


def memory_folder() -> str | None:
    """Files that live for a millisecond need no disk."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def write(path: Path, target: str, found: dict) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    packages = {name: package_version(name) for name in ("atheris", "hypothesis", "torch", "deepspeed", "pyyaml")}
    content["environment"] = {**environment(torch.device("cpu")), "packages": packages}
    content.setdefault("targets", {})[target] = found
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
