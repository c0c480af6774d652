"""python -m albef_ds doctor [RECIPE] [key=value ...] [--deepspeed_config FILE] [--hostfile FILE] [--gpus N] [--json]

Started by a launcher as several ranks it also measures what lies between them; every host looks at itself:

    deepspeed --hostfile hostfile --no_local_rank --module albef_ds doctor RECIPE

Exit status: 0, or 1 where something would not work.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from albef_ds.config import ConfigError, load_config
from albef_ds.doctor import hardware, network, recipe, sizes, software
from albef_ds.doctor.finding import Finding, status
from albef_ds.quiet import only_errors


def add_doctor_command(commands) -> None:
    """Adds the command to `commands` (of add_subparsers)."""
    doctor = commands.add_parser("doctor", help="check this machine, its network and a recipe; say what to change")
    doctor.add_argument("recipe", nargs="?", help="a YAML file, or the name of a recipe in albef_ds/configs")
    doctor.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the recipe")
    doctor.add_argument("--deepspeed_config", help="a DeepSpeed JSON, or the name of one in ds_configs")
    doctor.add_argument("--hostfile", type=Path, help="look up and connect to its hosts")
    doctor.add_argument("--gpus", type=int, metavar="N", help="ranks of the run (default: the hostfile's, or here)")
    doctor.add_argument("--gpu_gib", type=float, metavar="G", help="memory of a GPU, where none is here to ask")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON, on one line, the last")
    doctor.set_defaults(run=run_doctor)


def run_doctor(args: argparse.Namespace) -> int:
    with only_errors(logging.getLogger("albef_ds")):  # what the package would log are findings here
        findings = examine(args) if _first_of_host() else []
    if network.launched():
        findings = between_ranks(findings, _output_dir(args))
    if int(os.environ.get("RANK", 0)) == 0:
        print(as_json(findings) if args.json else as_text(findings))
    return status(findings)


@dataclass(frozen=True)
class Where:
    """Ranks of the run, those on this machine, and what GPUs it has."""

    world_size: int
    local_ranks: int
    gpus: tuple[hardware.Gpu, ...]


def examine(args: argparse.Namespace) -> list[Finding]:
    """All that one host can tell by itself."""
    hosts, findings = network.check_hostfile(args.hostfile) if args.hostfile else ({}, [])
    read, of_recipe = recipe.Read(), []
    if args.recipe:
        read, of_recipe = recipe.read_recipe(args.recipe, args.overrides, args.deepspeed_config)
    offload = sizes.offloads(read.deepspeed or {})
    gpus = tuple(hardware.found_gpus())
    where = place(args.gpus, hosts, gpus)
    driver = hardware.driver_cuda()
    found = list(software.check_software(offload))
    found.append(hardware.check_driver(torch.version.cuda, driver, torch.cuda.is_available(), not read.on_cpu))
    found += hardware.check_gpus(gpus, torch.cuda.get_arch_list())
    if gpus:
        found.append(hardware.check_nccl())
    found += of_recipe
    if read.config is not None:
        found += examine_run(read, where, args)
    else:
        found += hardware.check_host(where.local_ranks, 0, 1, 256)
    return found + findings


def place(wanted: int | None, hosts: dict[str, int], gpus: Sequence[hardware.Gpu]) -> Where:
    """How many ranks there will be: as asked for, as launched, as the hostfile says, or one a GPU."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    world = wanted or (launched if launched > 1 else 0) or sum(hosts.values()) or len(gpus) or 1
    local = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", 0)))  # DeepSpeed's, torchrun's
    return Where(world, local or min(world, max(hosts.values(), default=0) or len(gpus) or world), tuple(gpus))


def examine_run(read: recipe.Read, where: Where, args: argparse.Namespace) -> list[Finding]:
    """What this run would meet here."""
    config = read.config
    plan, finding = recipe.check_batches(config, read.deepspeed, where.world_size)
    findings = [finding]
    micro_batch = plan.micro_batch if plan else config.train.micro_batch or 1
    workers = config.data.workers
    findings += hardware.check_host(where.local_ranks, workers, micro_batch, config.model.vision.image_size)
    findings.append(recipe.check_loader(config))
    total_steps = config.train.max_steps
    if read.tokenizer is not None:
        samples, found = recipe.check_data(config, read.tokenizer)
        findings += found
        total_steps = total_steps or config.train.epochs * (samples // config.train.global_batch) or None
    if config.model.text.vocab_size is None:  # the tokeniser that would say it cannot be read
        return findings
    needed, available = sizes.sizes_of(config), sizes.available_memory()
    if plan is not None and read.deepspeed is not None:
        room = min((gpu.memory for gpu in where.gpus), default=None)
        if read.on_cpu:
            room = available // where.local_ranks
        elif args.gpu_gib is not None:
            room = int(args.gpu_gib * sizes.GIB)
        findings.append(sizes.check_memory(config, read.deepspeed, plan, needed, room, read.on_cpu))
    findings.append(sizes.check_host_memory(needed, available, where.local_ranks, where.world_size))
    if int(os.environ.get("RANK", 0)) == 0:
        findings += sizes.check_disk(Path(config.output_dir), config, needed, total_steps)
    return findings


# -- several ranks -----------------------------------------------------------------------------------------------------


def between_ranks(mine: list[Finding], output: Path | None) -> list[Finding]:
    """Collective. Rank 0's findings, what other hosts found wrong, and what lies between the ranks; alike on all."""
    import torch.distributed as dist

    from albef_ds.training.engine import init_distributed, leave_distributed
    from albef_ds.training.extension_lock import build_cpu_collectives

    build_cpu_collectives()  # takes a minute the first time; only then does rank 0 open the port that is waited for
    unreachable = network.reach_master()
    if unreachable is not None:
        print(unreachable, flush=True)  # rank 0 will not hear of it
        return [unreachable]
    rank, world, device = init_distributed()
    between = network.check_between(rank, device, output)
    gathered: list = [None] * world
    dist.all_gather_object(gathered, (socket.gethostname(), mine))
    answer = [merged(gathered) + between]
    dist.broadcast_object_list(answer, src=0)
    leave_distributed()
    return answer[0]


def merged(gathered: list[tuple[str, list[Finding]]]) -> list[Finding]:
    """All of rank 0's, and of the other hosts what is not ok, under their names."""
    findings = list(gathered[0][1])
    for host, theirs in gathered[1:]:
        findings += [replace(f, text=f"on {host}: {f.text}") for f in theirs if f.state != "ok"]
    return findings


def _first_of_host() -> bool:
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def _output_dir(args: argparse.Namespace) -> Path | None:
    if not args.recipe:
        return None
    try:
        return Path(load_config(args.recipe, args.overrides).output_dir)
    except ConfigError:  # a finding says so
        return None


# -- telling -----------------------------------------------------------------------------------------------------------


def as_text(findings: Sequence[Finding]) -> str:
    counts = {state: sum(f.state == state for f in findings) for state in ("problem", "warning")}
    shown = ", ".join(f"{n} {state}{'s' * (n != 1)}" for state, n in counts.items())
    return "\n".join([*map(str, findings), "", shown])


def as_json(findings: Sequence[Finding]) -> str:
    return json.dumps({"status": status(findings), "findings": [asdict(f) for f in findings]})
