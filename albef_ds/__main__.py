"""The command line: python -m albef_ds demo | downstream | doctor | data | evaluate | checkpoint | convert | …"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    from albef_ds.train import USER_ERRORS

    args = build_parser().parse_args(argv)
    args.whole_process = argv is None  # which ends with this function
    try:
        return args.run(args) or 0
    except (*USER_ERRORS, FileExistsError) as error:
        print(f"albef_ds: {error}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    from albef_ds.data.commands import add_commands
    from albef_ds.doctor.command import add_doctor_command
    from albef_ds.evaluate import add_arguments as add_evaluate_arguments
    from albef_ds.inference.commands import add_inference_commands
    from albef_ds.training.checkpoint_commands import add_checkpoint_commands

    parser = argparse.ArgumentParser(prog="python -m albef_ds", description="Train and use ALBEF.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="make data, train a small ALBEF, evaluate it")
    demo.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the recipe demo.yaml")
    demo.add_argument("--output", type=Path, default=Path("runs/demo"))
    demo.add_argument("--ranks", type=int, help="processes (default: the GPUs there are, or 2 on the CPU)")
    demo.set_defaults(run=run_demo)

    downstream = commands.add_parser("downstream", help="fine-tune the demo's model for every task and compare")
    downstream.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to all of its recipes")
    downstream.add_argument("--demo", type=Path, default=Path("runs/demo"), help="a finished demo's folder")
    downstream.add_argument("--output", type=Path, default=Path("runs/downstream"))
    downstream.add_argument("--tasks", default="all", help="separated by commas (default: all)")
    downstream.add_argument("--no-scratch", action="store_true", help="leave out the runs without pre-training")
    downstream.add_argument("--split", choices=("test", "val"), default="test", help="val: to choose settings by")
    downstream.set_defaults(run=run_downstream)

    data = commands.add_parser("data", help="make and inspect data sets").add_subparsers(required=True, metavar="WHAT")
    shapes = data.add_parser(
        "shapes", help="write Shapes World: JPEG files and annotations, the same for the same seed"
    )
    shapes.add_argument("out", type=Path)
    shapes.add_argument("--images", type=int, default=8000)
    shapes.add_argument("--test-images", type=int, default=256)
    shapes.add_argument("--seed", type=int, default=0)
    shapes.add_argument("--noise", type=float, default=0.1, help="share of wrong or partial training captions")
    shapes.add_argument("--size", type=int, default=96, help="pixels")
    shapes.add_argument("--tasks", type=Path, metavar="FOLDER", help="also write the data of the fine-tuning tasks")
    shapes.set_defaults(run=run_shapes)
    add_commands(data)

    evaluate = commands.add_parser("evaluate", help="the numbers of a trained model on a recipe's test set")
    add_evaluate_arguments(evaluate)
    evaluate.set_defaults(run=run_evaluate)

    add_inference_commands(commands)
    add_checkpoint_commands(commands)
    add_doctor_command(commands)

    report = commands.add_parser("report", help="write report.html of a run again")
    report.add_argument("output_dir", type=Path)
    report.set_defaults(run=run_report)
    return parser


def run_demo(args: argparse.Namespace) -> int:
    from albef_ds.demo import demo

    return demo(args.output, args.ranks, args.overrides)


def run_downstream(args: argparse.Namespace) -> int:
    from albef_ds.downstream import downstream, tasks_named

    return downstream(args.demo, args.output, tasks_named(args.tasks), not args.no_scratch, args.overrides, args.split)


def run_shapes(args: argparse.Namespace) -> None:
    from albef_ds.data.shapes_world import write_shapes_world

    world = write_shapes_world(
        args.out, args.images, args.test_images, seed=args.seed, noise=args.noise, size=args.size
    )
    print(f"train: {world.train}\ntest:  {world.test}\nvocab: {world.vocab}")
    if args.tasks is not None:
        from albef_ds.data.shapes_tasks import write_shapes_tasks

        print(f"tasks: {write_shapes_tasks(args.tasks, world).root}")


def run_evaluate(args: argparse.Namespace) -> int:
    from albef_ds.evaluate import run

    return run(args, args.whole_process)


def run_report(args: argparse.Namespace) -> None:
    from albef_ds.training.report import write_report

    print(write_report(args.output_dir))


if __name__ == "__main__":
    sys.exit(main())
