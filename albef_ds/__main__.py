"""The command line: python -m albef_ds demo | data … | evaluate … | convert … | report …"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    from albef_ds.train import USER_ERRORS

    args = build_parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except (*USER_ERRORS, FileExistsError) as error:
        print(f"albef_ds: {error}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    from albef_ds.data.commands import add_commands

    parser = argparse.ArgumentParser(prog="python -m albef_ds", description="Train and use ALBEF.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="make data, train a small ALBEF, evaluate it")
    demo.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the recipe demo.yaml")
    demo.add_argument("--output", type=Path, default=Path("runs/demo"))
    demo.add_argument("--ranks", type=int, help="processes (default: the GPUs there are, or 2 on the CPU)")
    demo.set_defaults(run=run_demo)

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
    shapes.set_defaults(run=run_shapes)
    add_commands(data)

    evaluate = commands.add_parser("evaluate", help="retrieval by a trained model")
    evaluate.add_argument("recipe")
    evaluate.add_argument("weights", type=Path, help="a checkpoint in the reference's form, e.g. RUN/albef.pth")
    evaluate.add_argument("overrides", nargs="*", metavar="key.sub=value")
    evaluate.set_defaults(run=run_evaluate)

    convert = commands.add_parser("convert", help="a run's checkpoint to the reference's form")
    convert.add_argument("checkpoint", type=Path, help="RUN/checkpoints/step_…, or RUN for its newest")
    convert.add_argument("out", type=Path, help=".pth (the reference's form) or .safetensors")
    convert.add_argument("--without-teacher", action="store_true", help="leave out momentum copies and queues")
    convert.set_defaults(run=run_convert)

    report = commands.add_parser("report", help="write report.html of a run again")
    report.add_argument("output_dir", type=Path)
    report.set_defaults(run=run_report)
    return parser


def run_demo(args: argparse.Namespace) -> int:
    from albef_ds.demo import demo

    return demo(args.output, args.ranks, args.overrides)


def run_shapes(args: argparse.Namespace) -> None:
    from albef_ds.data.shapes_world import write_shapes_world

    world = write_shapes_world(
        args.out, args.images, args.test_images, seed=args.seed, noise=args.noise, size=args.size
    )
    print(f"train: {world.train}\ntest:  {world.test}\nvocab: {world.vocab}")


def run_evaluate(args: argparse.Namespace) -> None:
    import torch

    from albef_ds.config import load_config
    from albef_ds.data.tokenizer import load_tokenizer
    from albef_ds.evaluation.retrieval import evaluate_recipe
    from albef_ds.train import build_task, with_vocabulary

    config = load_config(args.recipe, [*args.overrides, f"model.weights={args.weights}"])
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.sep_token)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_task(with_vocabulary(config, tokenizer.vocab_size)).model.to(device)
    print(json.dumps(evaluate_recipe(model, config, tokenizer, device).metrics, indent=1))


def run_convert(args: argparse.Namespace) -> None:
    from albef_ds.training.export import export_checkpoint

    print(f"{export_checkpoint(args.checkpoint, args.out, with_teacher=not args.without_teacher)}")


def run_report(args: argparse.Namespace) -> None:
    from albef_ds.training.report import write_report

    print(write_report(args.output_dir))


if __name__ == "__main__":
    sys.exit(main())
