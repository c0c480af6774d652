"""Evaluates trained weights on the test set of a recipe, in one process or under the deepspeed launcher.

    python -m albef_ds evaluate RECIPE.yaml WEIGHTS.pth [key.sub=value ...] [--out FOLDER]
    deepspeed --module albef_ds.evaluate RECIPE.yaml WEIGHTS.pth [key.sub=value ...] [--out FOLDER]

WEIGHTS is a checkpoint in the reference's form, such as RUN/albef.pth. The numbers are the same on any number of ranks.
FOLDER gets summary.json, what the model said of each sample (results.json), and report.html; it may not be the folder
of a run that is training.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, redirect_stdout
from pathlib import Path

import torch.distributed as dist

from albef_ds.build import build_task, with_vocabulary
from albef_ds.config import load_config
from albef_ds.data.files import write_atomically
from albef_ds.train import USER_ERRORS, tell
from albef_ds.training.ending import last_resort
from albef_ds.training.stop import StopSignals


def main(argv: Sequence[str] | None = None) -> int:
    whole_process = argv is None
    parser = argparse.ArgumentParser(prog="albef_ds.evaluate", description="Evaluates trained weights.")
    add_arguments(parser)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher passes it
    return run(parser.parse_intermixed_args(argv), whole_process)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a YAML file, or the name of a recipe in albef_ds/configs")
    parser.add_argument("weights", type=Path, help="a checkpoint in the reference's form, e.g. RUN/albef.pth")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--out", type=Path, help="folder for the numbers, the answers and the report")


def run(args: argparse.Namespace, whole_process: bool = False) -> int:
    """Exit status. whole_process: this process has nothing else to do afterwards."""
    from albef_ds.training.engine import leave_distributed

    with last_resort(whole_process) as known:
        try:
            with StopSignals() if whole_process else nullcontext():
                evaluate(args)
            code = 0
        except USER_ERRORS as error:
            tell(error)
            code = 2
        known(code)
        leave_distributed(together=code == 0)
    return code


def evaluate(args: argparse.Namespace) -> None:
    from albef_ds.data.tokenizer import load_tokenizer
    from albef_ds.evaluation.recipe import evaluate_recipe
    from albef_ds.training.agreement import hold
    from albef_ds.training.engine import init_distributed
    from albef_ds.training.watchdog import Watchdog

    config = load_config(args.recipe, [*args.overrides, f"model.weights={args.weights}"])
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.sep_token)
    config = with_vocabulary(config, tokenizer.vocab_size)
    with redirect_stdout(sys.stderr):  # DeepSpeed prints here what it builds; who reads the numbers wants JSON alone
        rank, _, device = init_distributed()
    faults = config.faults
    with ExitStack() as held, Watchdog(faults.dead_seconds, faults.timeout_minutes):
        if args.out is not None:
            hold(args.out, held)
        model = build_task(config).model.to(device)
        if args.out is not None and rank == 0:
            write_atomically(args.out / "config.yaml", config.to_yaml())
        result = evaluate_recipe(model, config, tokenizer, device, out=args.out)
        if rank == 0:
            print(json.dumps(result.metrics, indent=1))
            if args.out is not None:
                from albef_ds.training.report import write_report

                write_atomically(args.out / "summary.json", json.dumps({result.name: result.metrics}, indent=1))
                print(f"report: {write_report(args.out, samples=result.examples)}")
        dist.barrier()  # nobody takes the process group down before rank 0 has written


if __name__ == "__main__":
    sys.exit(main())
