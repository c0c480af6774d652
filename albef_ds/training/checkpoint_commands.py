"""The command line of checkpoints: python -m albef_ds checkpoint list | verify | export | prune."""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from pathlib import Path

from albef_ds.folder_lock import FolderLock
from albef_ds.training.checkpoint_files import remove_folder
from albef_ds.training.checkpoint_manifest import MANIFEST, CheckpointError, check_size, read_manifest, verify
from albef_ds.training.retention import ASIDE, complete_folders, prune, step_folders


def add_checkpoint_commands(subparsers) -> None:
    """Adds `checkpoint` with list, verify, export and prune; each sets `run`, which returns the exit status."""
    group = subparsers.add_parser("checkpoint", help="list, verify, export and prune a run's checkpoints")
    commands = group.add_subparsers(required=True, metavar="WHAT")
    where = {"type": Path, "help": "a run's folder, its checkpoints/, or one step_…"}

    show = commands.add_parser("list", help="what there is, and whether sizes are as they should be")
    show.add_argument("folder", **where)
    show.set_defaults(run=run_list)

    check = commands.add_parser("verify", help="compare every file with its size and checksum")
    check.add_argument("folder", **where)
    check.set_defaults(run=run_verify)

    export = commands.add_parser("export", help="weights in fp32, in the reference's form; needs no GPU")
    export.add_argument("folder", **where)
    export.add_argument("out", type=Path, help=".pth or .safetensors")
    export.add_argument("--without-teacher", action="store_true", help="leave out momentum copies and queues")
    export.set_defaults(run=run_export)

    clean = commands.add_parser("prune", help="remove all but the newest, incomplete ones, and those set aside")
    clean.add_argument("folder", **where)
    clean.add_argument("--keep", type=int, default=1, help="how many of the newest stay (default: 1)")
    clean.add_argument("--keep-every", type=int, metavar="STEPS", help="also those of every so many steps")
    clean.add_argument("--yes", action="store_true", help="remove; without it, what would go is listed")
    clean.set_defaults(run=run_prune)


def run_list(args: argparse.Namespace) -> int:
    folders = _folders(args.folder)
    print(f"{'step':>10}  {'GB':>8}  {'ranks':>5}  {'written':16}  state")
    for folder in folders:
        try:
            manifest = read_manifest(folder)
            for name, entry in manifest.files.items():
                check_size(folder / name, entry)
            state = "complete"
        except CheckpointError as error:
            print(f"{folder.name.removeprefix('step_').lstrip('0') or '0':>10}  {'':8}  {'':5}  {'':16}  {error}")
            continue
        written = time.strftime("%Y-%m-%d %H:%M", time.localtime((folder / MANIFEST).stat().st_mtime))
        size = f"{manifest.total_bytes / 1e9:.3f}"
        print(f"{manifest.step:>10}  {size:>8}  {manifest.world_size:>5}  {written:16}  {state}")
    return 0


def run_verify(args: argparse.Namespace) -> int:
    faults = 0
    for folder in _folders(args.folder):
        try:
            manifest = verify(folder)
            print(f"{folder}: {len(manifest.files)} files, {manifest.total_bytes / 1e9:.3f} GB, as written")
        except CheckpointError as error:
            faults += 1
            print(error)
    return 1 if faults else 0


def run_export(args: argparse.Namespace) -> int:
    from albef_ds.training.export import export_checkpoint

    print(export_checkpoint(args.folder, args.out, with_teacher=not args.without_teacher))
    return 0


def run_prune(args: argparse.Namespace) -> int:
    """Nothing goes unless the newest that stays is undamaged, and while the run trains, which prunes by itself.

    Raises CheckpointError and FolderError.
    """
    if args.keep < 1:
        raise CheckpointError(f"--keep {args.keep}: at least one checkpoint stays")
    folder = _parent(args.folder)
    with ExitStack() as held:
        if args.yes and folder.absolute().name == "checkpoints":  # else it is no run's
            held.enter_context(FolderLock(folder.absolute().parent))
        complete = complete_folders(folder)
        if not complete:
            raise CheckpointError(f"{folder}: no complete checkpoint")
        verify(complete[0])
        return _prune(folder, args)


def _prune(folder: Path, args: argparse.Namespace) -> int:
    aside = sorted(p for p in folder.glob(f"{ASIDE}step_*") if p.is_dir() and not p.is_symlink())
    gone = [*prune(folder, args.keep, args.keep_every, remove=args.yes), *aside]
    for path in gone:
        print(f"{'removed' if args.yes else 'would be removed'}: {path}")
    if args.yes:
        for path in aside:
            remove_folder(path, first=MANIFEST)
    elif gone:
        print("nothing has been removed; add --yes")
    return 0


def _folders(path: Path) -> list[Path]:
    """Oldest first."""
    if (path / MANIFEST).exists():
        return [path]
    folders = step_folders(_parent(path))
    if not folders:
        raise CheckpointError(f"{path}: neither a checkpoint nor a run that has one")
    return folders[::-1]


def _parent(path: Path) -> Path:
    inside = path / "checkpoints"
    return inside if inside.is_dir() else path
