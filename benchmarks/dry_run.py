"""`--dry-run` of pre-training at ALBEF's own size: one real step under DeepSpeed, its memory and its FLOPs.

    python -m benchmarks.dry_run [--batch 64] [--deepspeed zero2_h100] [--out DIR]

The words are made up: only how many there are matters to a step. The figures go into DIR/dry_run.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from albef_ds.data.files import write_atomically
from benchmarks import measure

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = 30522  # BERT's


def dry_run(batch: int, deepspeed: str, folder: Path) -> tuple[int, str]:
    """(exit status, what it printed) of a dry run on random weights."""
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join([*SPECIAL, *(f"w{i}" for i in range(WORDS - len(SPECIAL)))]) + "\n")
    settings = {
        "train.global_batch": batch,
        "train.micro_batch": batch,
        "train.deepspeed": deepspeed,
        "model.vision.weights": "null",
        "model.text.weights": "null",
        "data.tokenizer": vocabulary,
        "output_dir": folder / "run",
    }
    command = [sys.executable, "-m", "albef_ds.train", "pretrain_4m", "--dry-run"]
    command += [f"{key}={value}" for key, value in settings.items()]
    environment = dict(os.environ) if torch.cuda.is_available() else {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=measure.ROOT, env=environment)
    sys.stderr.write(done.stderr[-3000:])
    return done.returncode, done.stdout


def figures(text: str) -> dict[str, str]:
    """The lines `name: value` of a dry run's account."""
    pairs = (line.split(":", 1) for line in text.splitlines() if ":  " in line or ": " in line)
    return {name.strip(): value.strip() for name, value in pairs}


def main(argv=None) -> int:
    """The command line in this file's head."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=64)
    default = "zero2_h100" if torch.cuda.is_available() else "zero2_cpu"
    parser.add_argument("--deepspeed", default=default, help=f"a file of ds_configs; here {default}")
    parser.add_argument("--out", type=measure.folder)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        status, text = dry_run(args.batch, args.deepspeed, Path(folder))
    print(text)
    if args.out and status == 0:
        device = measure.pick_device()
        found = {"environment": measure.environment(device), "batch": args.batch, "figures": figures(text)}
        args.out.mkdir(parents=True, exist_ok=True)
        write_atomically(args.out / "dry_run.json", json.dumps(found, indent=1) + "\n")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
