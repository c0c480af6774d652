"""Trains what a recipe describes; started by the deepspeed launcher, one process a GPU.

    deepspeed --module albef_ds.train RECIPE.yaml [key.sub=value ...] [--dry-run] [--resume auto|none|FOLDER]
              [--deepspeed_config FILE]

RECIPE is a file or the name of one in albef_ds/configs. `--dry-run` builds everything, does one step on made-up data
and prints the batch arithmetic and the memory. Without the launcher it runs as a single process.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import sys
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from albef_ds.build import build_task, with_vocabulary
from albef_ds.config import BatchPlan, Config, ConfigError, find_named, load_config, plan_batches
from albef_ds.data.annotations import AnnotationError
from albef_ds.data.files import write_atomically
from albef_ds.data.shard_format import ShardError
from albef_ds.data.tokenizer import TokenizerError
from albef_ds.data.torch_loader import UnreadableImagesError
from albef_ds.data.worker_processes import WorkerLostError
from albef_ds.evaluation.ahead import EvaluationError
from albef_ds.folder_lock import FolderError
from albef_ds.model.weight_files import WeightsError
from albef_ds.training.bad_steps import BadStepsError
from albef_ds.training.checkpoint import CheckpointError
from albef_ds.training.ds_config import DeepSpeedConfigError, load_deepspeed_config
from albef_ds.training.ending import last_resort
from albef_ds.training.spikes import SpikeError
from albef_ds.training.stop import EXIT_REQUEUE, Stopped, StopSignals
from albef_ds.training.watchdog import EXIT_RANK_LOST

log = logging.getLogger("albef_ds")

# What is wrong with what the user gave, told without a traceback.
USER_ERRORS = (
    ConfigError,
    DeepSpeedConfigError,
    AnnotationError,
    ShardError,
    TokenizerError,
    WeightsError,
    CheckpointError,
    FolderError,
    EvaluationError,
    UnreadableImagesError,
    BadStepsError,
    SpikeError,
)


def main(argv: list[str] | None = None) -> int:
    from albef_ds.training.engine import leave_distributed

    args = parse(argv)
    logging.basicConfig(
        level=logging.INFO if int(os.environ.get("RANK", 0)) == 0 else logging.ERROR,
        format="%(asctime)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with last_resort(whole_process=argv is None) as known:
        code, run = outcome(args)
        known(code)
        if run is not None and run.engine is not None:
            run.engine.destroy()
        del run  # the engine's groups end with the last reference to them
        leave_distributed(together=code in (0, EXIT_REQUEUE))
    return code


def outcome(args: argparse.Namespace) -> tuple[int, Run | None]:
    """The exit code of what was asked for. Errors that are not the user's pass through, and end the process."""
    run = None
    try:
        with StopSignals() as signals:
            config = load_config(args.recipe, args.overrides)
            run = Run(config, args.deepspeed_config)
            code = run.dry() if args.dry_run else run.train(args.resume or config.checkpoint.resume, signals)
    except Stopped as stopped:
        print(f"albef_ds: {stopped}", file=sys.stderr)
        code = EXIT_REQUEUE
    except WorkerLostError as error:
        print(f"albef_ds: rank {os.environ.get('RANK', 0)} ends: {error}", file=sys.stderr)
        code = EXIT_RANK_LOST
    except USER_ERRORS as error:
        tell(error)
        code = 2
    return code, run


def tell(error: Exception) -> None:
    """One line for a user's error; one rank's is enough where all have met the same."""
    if os.environ.get("RANK", "0") == "0" or not getattr(error, "told_by_rank_0", False):
        print(f"albef_ds: {error}", file=sys.stderr)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="albef_ds.train", description="Trains what a recipe describes.")
    parser.add_argument("recipe", help="a YAML file, or the name of a recipe in albef_ds/configs")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the recipe")
    parser.add_argument("--dry-run", action="store_true", help="build all, do one synthetic step, print sizes")
    parser.add_argument(
        "--resume", help="auto, none, or a checkpoint's folder (default: the recipe's checkpoint.resume)"
    )
    parser.add_argument("--deepspeed_config", help="a DeepSpeed JSON, or the name of one in ds_configs")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher passes it
    return parser.parse_intermixed_args(argv)  # overrides may stand before and after options


class Run:
    """Everything of one run, built in the order in which a mistake is cheapest to find.

    Args:
        config: the recipe.
        deepspeed_config: what --deepspeed_config says; None: the recipe's.
    """

    def __init__(self, config: Config, deepspeed_config: str | None = None):
        from albef_ds.data.tokenizer import load_tokenizer
        from albef_ds.training.determinism import make_deterministic
        from albef_ds.training.engine import engine_config, init_distributed

        self.engine = None
        ds_file = find_named(deepspeed_config or config.train.deepspeed, deepspeed_folder(), ".json")
        ds_json = load_deepspeed_config(ds_file)
        tokenizer = load_tokenizer(config.data.tokenizer, config.data.sep_token)
        self.config = config = with_vocabulary(config, tokenizer.vocab_size)
        self.tokenizer = tokenizer
        if config.train.deterministic:
            make_deterministic()
        self.rank, self.world_size, self.device = init_distributed()
        self.batch_plan: BatchPlan = plan_batches(config, self.world_size)
        self.ds_config = engine_config(ds_json, self.batch_plan, config.train.clip)
        log.info("DeepSpeed configuration: %s", ds_file)

    def build(self) -> None:
        """Model and engine, with the weights that the recipe names."""
        from albef_ds.training.engine import build_engine

        config = self.config
        seed_all(config.train.seed)  # equal on all ranks: they must build the same weights and queues
        task = build_task(config).to(self.device)
        if config.model.compile == "auto" and self.device.type == "cuda":
            from albef_ds.training.compile import compile_regions

            compile_regions(task)
        self.engine = build_engine(task, config.optimizer, self.ds_config)
        seed_all(config.train.seed + 1 + self.rank)  # different: dropout and negatives are each rank's own
        log.info("%s; %s", self.batch_plan, self.device)

    # -- training ----------------------------------------------------------------------------------------------------

    def train(self, resume: str | None, signals: StopSignals) -> int:
        from albef_ds.training.agreement import hold
        from albef_ds.training.resume_point import resume_point
        from albef_ds.training.watchdog import Watchdog

        config, out = self.config, Path(self.config.output_dir)
        with ExitStack() as held:  # to the end, when the watchdog, too, has had its time
            with Watchdog(config.faults.dead_seconds, config.faults.timeout_minutes) as watchdog:
                hold(out, held)
                start = resume_point(out, config.checkpoint, resume)
                self.build()
                watchdog.limit_groups()
                self.watched(start, signals, watchdog)
                dist.barrier()  # rank 0 writes the report: nobody takes the process group down before
        return 0

    def watched(self, start_from: Path | None, signals: StopSignals, watchdog) -> None:
        from albef_ds.data.loader import build_loader
        from albef_ds.data.prefetch import on_device
        from albef_ds.training.attempts import Attempts
        from albef_ds.training.checkpoint import Checkpoints
        from albef_ds.training.loop import Plan
        from albef_ds.training.monitor import Monitor
        from albef_ds.training.peak_flops import peak_flops_of, peak_flops_source
        from albef_ds.training.retention import set_summary_aside
        from albef_ds.training.schedule import alpha_ramp

        config, out = self.config, Path(self.config.output_dir)
        loader = build_loader(config, self.tokenizer, self.batch_plan, self.rank, self.world_size, self.device)
        total = config.train.max_steps or config.train.epochs * loader.steps_per_epoch
        identity, whole = self.identity(loader.order.num_samples), config.model_dump(mode="json")
        checkpoints = Checkpoints(out / "checkpoints", config.checkpoint, identity, whole, verified=start_from)
        start = 0
        if start_from is not None:
            start = checkpoints.load(self.engine, start_from)
            log.info("resumed from %s, after step %d", start_from, start)
        learning_rate = self.learning_rate(loader.steps_per_epoch, total)

        def batches(start_step: int):
            with closing(loader.batches(start_step)) as loaded:
                yield from on_device(loaded, self.device)

        def monitor(start_step: int) -> Monitor:
            monitor = Monitor(
                out,
                rank=self.rank,
                total_steps=total,
                start_step=start_step,
                samples_per_step=self.batch_plan.global_batch,
                peak_flops=peak_flops_of(self.device, self.arithmetic),
                log_every=config.log.every,
            )
            monitor.rejected(loader.rejected if self.rank == 0 else ())
            if self.rank == 0:
                write_atomically(out / "config.yaml", config.to_yaml())
            return monitor

        attempts = Attempts(self.engine, batches, monitor, checkpoints, out)
        # From here on the run's folder changes: what refuses a run has done so before, or does in the next line.
        validation = self.validation(start)
        if start == 0 and self.rank == 0:
            set_summary_aside(out)
        ramp = (loader.steps_per_epoch, config.train.alpha, config.train.alpha_ramp_epochs)
        plan = Plan(
            start_step=start,
            total_steps=total,
            accumulation=self.batch_plan.accumulation,
            learning_rate=learning_rate,
            alpha=lambda step: alpha_ramp(step, *ramp),
            checkpoint_every=config.checkpoint.every,
            log_every=config.log.every,
            log_keys=config.log.keys,
            validate=validation and validation.after_step,
            validate_every=config.evaluation.every and config.evaluation.every * loader.steps_per_epoch,
        )
        log.info("%d steps, %d an epoch, from step %d", total, loader.steps_per_epoch, start)
        summary = attempts.run(plan, config.faults, signals, watchdog)
        summary["mfu_of"] = peak_flops_source(self.device, self.arithmetic)
        written = out / "summary.json"
        if start >= total and written.exists():  # trained already: evaluated anew, its speed and losses are still true
            summary |= json.loads(written.read_text(encoding="utf-8"))
        self.finish(summary)

    @property
    def arithmetic(self) -> torch.dtype:
        return torch.bfloat16 if self.ds_config.get("torch_autocast", {}).get("enabled") else torch.float32

    def validation(self, start_step: int):
        """What evaluates on data.val between epochs; None where the recipe wants none."""
        from albef_ds.evaluation.recipe import evaluate_recipe
        from albef_ds.training.validation import Validation

        config = self.config
        if not config.evaluation.every:
            return None
        if not config.data.val:
            raise ConfigError("evaluation.every is set, but data.val is empty: name the annotation file to validate on")

        def evaluate():
            return evaluate_recipe(self.engine.module.model, config, self.tokenizer, self.device, config.data.val)

        return Validation(Path(config.output_dir), self.rank, evaluate, self.weights, start_step)

    def weights(self) -> dict:
        """The trained weights in the reference's form, with momentum copies and queues."""
        from albef_ds.model.reference_weights import to_reference

        task = self.engine.module
        return to_reference(task.model, task.teacher, getattr(task, "queue", None))

    def learning_rate(self, steps_per_epoch: int, total_steps: int):
        from albef_ds.training.schedule import build_schedule

        schedule = self.config.schedule
        warmup = {"reference": 2000, "paper": 1000, "linear": 1000, "constant": 0}[schedule.name]
        try:
            return build_schedule(
                schedule.name,
                lr=self.config.optimizer.lr,
                min_lr=schedule.min_lr,
                warmup_lr=schedule.warmup_lr,
                warmup_steps=warmup if schedule.warmup_steps is None else schedule.warmup_steps,
                steps_per_epoch=steps_per_epoch,
                total_steps=total_steps,
                epochs=self.config.train.epochs,
            )
        except ValueError as error:
            raise ConfigError(f"schedule: {error}") from error

    def identity(self, samples: int) -> dict:
        """What a resumed run must share with the one it continues."""
        config = self.config.model_dump(mode="json")
        sections = {key: config[key] for key in ("task", "model", "optimizer")}
        sections["train"] = {key: config["train"][key] for key in ("global_batch", "seed")}
        # With others the order of samples would change under the run: some seen twice, some never.
        sections["data"] = {key: config["data"][key] for key in ("weights", "shuffle_buffer")} | {"samples": samples}
        return sections

    def finish(self, summary: dict) -> None:
        """Evaluates, and writes summary.json, the reference-form weights and the report."""
        out = Path(self.config.output_dir)
        examples = None
        if self.rank == 0:
            torch.save({"model": self.weights()}, out / "albef.pth")
        if self.config.data.test and self.config.task != "text_assignment":
            from albef_ds.evaluation.recipe import evaluate_recipe
            from albef_ds.training.validation import take_best

            if self.config.evaluation.every:
                summary["validation"] = take_best(out, self.engine.module.model)
            result = evaluate_recipe(self.engine.module.model, self.config, self.tokenizer, self.device, out=out)
            summary[result.name], examples = result.metrics, result.examples
        if self.rank != 0:
            return
        write_atomically(out / "summary.json", json.dumps(summary, indent=1))
        if self.config.log.report:
            from albef_ds.training.report import write_report

            print(f"report:     {write_report(out, samples=examples)}")
        print(f"weights:    {out / 'albef.pth'}")
        print(f"checkpoint: {out / 'checkpoints'}")

    # -- dry run -----------------------------------------------------------------------------------------------------

    def dry(self) -> int:
        from albef_ds.training.dry_run import describe
        from albef_ds.training.watchdog import Watchdog

        with Watchdog(self.config.faults.dead_seconds, self.config.faults.timeout_minutes):
            self.build()
            text = describe(self.engine, self.config, self.batch_plan, self.tokenizer, self.device)
        if self.rank == 0:
            print(text)
        return 0


def deepspeed_folder() -> Path:
    """ds_configs/: inside the package where it is installed, beside it in a checkout."""
    inside = Path(__file__).parent / "ds_configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "ds_configs"


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (ours use Generators; a library may not)
    torch.manual_seed(seed)  # the GPU's generator too


if __name__ == "__main__":
    sys.exit(main())
