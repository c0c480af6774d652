"""Trains with a checkpoint folder that is a small disk of its own, and makes that disk fail.

    unshare --mount python -m tests.reliability.mounted FOLDER FAULT ARGUMENTS of albef_ds.train

FOLDER becomes a file system in memory, seen by this process and its children alone. FAULT, once there is a checkpoint:
    readonly     from then on nothing can be written, as after an error of the disk
    full         a file takes all the room there is
    full_once    ... and goes when a save has failed
or before anything is started:
    never        nothing can be written at all
At the end all of FOLDER is copied to FOLDER_kept. The exit status is the training's.
"""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
import time
from pathlib import Path

FAILED = "attempt 1 of"  # what a run says of a save that failed
PATIENCE = 200  # seconds


def main() -> int:
    folder, fault, *arguments = Path(sys.argv[1]), *sys.argv[2:]
    folder.mkdir(parents=True)
    mount("-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder))
    if fault == "never":
        make_readonly(folder)
    output = folder.with_name("output.txt")
    with open(output, "w") as file:
        command = [sys.executable, "-m", "albef_ds.train", *arguments]
        training = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        if fault != "never":
            wait_until(training, lambda: any(folder.glob("step_*/manifest.json")))
            make_readonly(folder) if fault == "readonly" else fill(folder)
        if fault == "full_once":
            wait_until(training, lambda: FAILED in output.read_text())
            (folder / "ballast").unlink()
        return training.wait(PATIENCE)
    finally:
        training.kill()
        shutil.copytree(folder, f"{folder}_kept", ignore=shutil.ignore_patterns("ballast"))


def wait_until(training: subprocess.Popen, happened) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened() and training.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


def make_readonly(folder: Path) -> None:
    while mount("-o", "remount,ro", str(folder), check=False):  # refused while a file is being written
        time.sleep(0.002)


def mount(*arguments: str, check: bool = True) -> int:
    return subprocess.run(["mount", *arguments], check=check, stderr=subprocess.DEVNULL).returncode


def fill(folder: Path) -> None:
    with open(folder / "ballast", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


if __name__ == "__main__":
    sys.exit(main())
