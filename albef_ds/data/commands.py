"""The command line of data sets: python -m albef_ds data pack | check | show."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tqdm import tqdm


def add_commands(subparsers) -> None:
    """Adds pack, check and show to the subparsers of `data`; each sets `run`, which returns the exit status."""
    from albef_ds.data.packing import PackSettings

    default = PackSettings()
    pack = subparsers.add_parser("pack", help="pack images and captions into shards for training")
    pack.add_argument(
        "annotations", nargs="+", help="JSON of the reference, .jsonl, .tsv, .parquet, or a folder with .txt"
    )
    pack.add_argument("out", type=Path, help="a new folder; the same command again goes on after an interruption")
    pack.add_argument("--image-root", help="what relative paths are relative to (default: each list's folder)")
    pack.add_argument("--columns", default=",".join(default.columns), help="PATH,CAPTION of TSV and Parquet")
    pack.add_argument("--samples-per-shard", type=int, default=default.samples_per_shard)
    pack.add_argument("--shorter-side", type=int, metavar="PIXELS", help="reduce images whose shorter side is longer")
    pack.add_argument("--quality", type=int, default=default.quality, help="of images that are no baseline JPEG")
    pack.add_argument("--max-pixels", type=int, default=default.max_pixels, help="reject images that have more")
    pack.add_argument("--seed", type=int, default=default.seed, help="of the shuffling")
    pack.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: the cores)")
    pack.set_defaults(run=run_pack)

    check = subparsers.add_parser("check", help="verify the sizes and checksums of packed shards")
    check.add_argument("folder", type=Path)
    check.add_argument("--decode", action="store_true", help="also decode every image")
    check.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads (default: the cores)")
    check.set_defaults(run=run_check)

    show = subparsers.add_parser("show", help="write an HTML page of packed images with their captions")
    show.add_argument("folder", type=Path)
    show.add_argument("--out", type=Path, help="default: FOLDER.html, beside the folder")
    show.add_argument("--count", type=int, default=40)
    show.add_argument("--seed", type=int, default=0)
    show.set_defaults(run=run_show)

    refcoco = subparsers.add_parser("refcoco", help="make training and test files of RefCOCO, RefCOCO+ or RefCOCOg")
    refcoco.add_argument("folder", type=Path, help="one data set as it is distributed: refs(...).p and instances.json")
    refcoco.add_argument("out", type=Path)
    refcoco.add_argument("--split-by", default="unc", help="unc, umd or google")
    refcoco.add_argument("--detections", type=Path, help="dets.json, the proposals to choose from")
    refcoco.add_argument("--image-template", default="train2014/{file_name}", help="where images lie under image_root")
    refcoco.add_argument("--name", help="of the files (default: the folder's)")
    refcoco.set_defaults(run=run_refcoco)


def _user_errors() -> tuple[type[Exception], ...]:
    from albef_ds.data.annotations import AnnotationError
    from albef_ds.data.shard_format import ShardError

    return (AnnotationError, ShardError, FileExistsError, ValueError)


def run_refcoco(args: argparse.Namespace) -> int:
    from albef_ds.data.refcoco import convert_refcoco

    counts = convert_refcoco(args.folder, args.out, args.split_by, args.detections, args.image_template, args.name)
    for split, number in counts.entries.items():
        print(f"{split}: {number} phrases")
    print(f"left out without a text: {counts.blank}; without proposals: {counts.without_proposals}")
    return 0


def run_pack(args: argparse.Namespace) -> int:
    from albef_ds.data.packing import PackSettings, pack
    from albef_ds.data.shard_format import REJECTS

    try:
        path, comma, caption = args.columns.partition(",")
        if not comma or not path or not caption:
            raise ValueError(f"--columns {args.columns}: expected PATH,CAPTION")
        settings = PackSettings(
            samples_per_shard=args.samples_per_shard,
            shorter_side=args.shorter_side,
            quality=args.quality,
            max_pixels=args.max_pixels,
            seed=args.seed,
            image_root=args.image_root,
            columns=(path, caption),
        )
        with _bar("shards") as progress:
            manifest = pack(args.annotations, args.out, settings, args.workers, progress)
    except (*_user_errors(), RuntimeError) as error:
        return _fail(error)
    print(
        f"{manifest.samples:,} samples in {len(manifest.shards):,} shards, {manifest.bytes / 1e9:.3g} GB: {args.out}\n"
        f"{manifest.rejected:,} rejected: {args.out / REJECTS}"
    )
    return 0


def run_check(args: argparse.Namespace) -> int:
    from albef_ds.data.shard_check import check

    try:
        with _bar("shards") as progress:
            manifest, faults = check(args.folder, args.decode, args.workers, progress)
    except _user_errors() as error:
        return _fail(error)
    for fault in faults:
        print(fault)
    print(f"{manifest.samples:,} samples in {len(manifest.shards):,} shards: {len(faults) or 'no'} faults")
    return 1 if faults else 0


def run_show(args: argparse.Namespace) -> int:
    from albef_ds.data.shard_check import contact_sheet

    out = args.out or args.folder.parent / f"{args.folder.resolve().name}.html"
    try:
        print(contact_sheet(args.folder, out, args.count, args.seed))
    except _user_errors() as error:
        return _fail(error)
    return 0


def _fail(error: Exception) -> int:
    print(f"albef_ds: {error}", file=sys.stderr)
    return 2


class _bar:
    """A progress bar on a terminal, nothing elsewhere; called with (done, all)."""

    def __init__(self, unit: str):
        self._bar = tqdm(unit=f" {unit}", disable=not sys.stderr.isatty())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._bar.close()

    def __call__(self, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)
