"""What a rank sends and receives in one optimiser step under DeepSpeed, counted as several ranks of many see it.

    python -m benchmarks.collectives [--json] [--world 1 8 64 512] [--stage 1 2] [--deepspeed NAME ...] [--preset base]
                                     [--batch 64] [--ranks 2] [--scatter]

Every configuration of ds_configs, at the model's true size. The ranks and the tensors are made up
(benchmarks.fake_steps): what a step asks for is counted, what comes back is not looked at. Configurations for a GPU run
on one that is not there, those for a CPU on the CPU, whatever the machine has.

Counted is what is handed to the collectives and what they give back; what crosses a link follows from that by the
rules of benchmarks.rings. Ranks that ask in another order, or for something else, wait for ever under NCCL: then the
first difference is named, and the status is 1. Before the first step DeepSpeed sends the whole model from rank 0; that
is not counted here.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from benchmarks import PRESETS, ROOT
from benchmarks.fake_steps import PHASES, Order
from benchmarks.rings import RULES, Asked

CONFIGURATIONS = ROOT / "ds_configs"
WORLDS = (1, 8, 64, 512)
WORKER = (sys.executable, "-W", "ignore", "-m", "benchmarks.fake_steps")
FEW = 8  # steps that are not worth a second process
PURPOSES = ("gradients", "parameters", "features", "other", "hosts")


@dataclass(frozen=True)
class Configuration:
    """Files of ds_configs that say the same to DeepSpeed."""

    names: tuple[str, ...]
    given: dict
    on: str  # cuda or cpu


@dataclass(frozen=True)
class Case:
    """What one row tells of."""

    configuration: Configuration
    stage: int
    world: int
    ranks: tuple[int, ...]
    scatter: bool = False  # gradients go to the rank that keeps them alone

    def orders(self, preset: str, batch: int) -> list[Order]:
        zero = {**self.configuration.given["zero_optimization"], "stage": self.stage}
        if self.scatter:
            zero["use_multi_rank_bucket_allreduce"] = False
        given = {**self.configuration.given, "zero_optimization": zero}
        return [Order(given, self.world, rank, preset, batch) for rank in self.ranks]

    def __str__(self) -> str:
        return f"{', '.join(self.configuration.names)}, ZeRO-{self.stage}, {self.world} ranks"


def available() -> list[str]:
    return sorted(path.stem for path in CONFIGURATIONS.glob("*.json"))


def configurations(names: Iterable[str]) -> list[Configuration]:
    """Of ds_configs, those that say the same once."""
    found: list[Configuration] = []
    for name in names:
        given = json.loads((CONFIGURATIONS / f"{name}.json").read_text())
        given.pop("_comment", None)
        new = Configuration((name,), given, "cpu" if "cpu" in name.split("_") else "cuda")
        same = next((i for i, old in enumerate(found) if (old.given, old.on) == (new.given, new.on)), None)
        if same is None:
            found.append(new)
        else:
            found[same] = dataclasses.replace(found[same], names=(*found[same].names, name))
    return found


def spread(world: int, number: int) -> tuple[int, ...]:
    """So many ranks of `world`, evenly from the first to the last; all where there are no more."""
    if number >= world:
        return tuple(range(world))
    return (0,) if number == 1 else tuple(i * (world - 1) // (number - 1) for i in range(number))


def count(cases: Sequence[Case], preset: str, batch: int) -> list[dict]:
    """A row for every case, in order.

    Args:
        batch: samples a rank; whole eights.

    Raises:
        RuntimeError: a process that counts has ended early; with the end of what it said.
        ValueError: a collective that benchmarks.rings does not know.
    """
    wanted = [(case, case.orders(preset, batch)) for case in cases]
    answers = iter(_ask([(case.configuration.on, order) for case, orders in wanted for order in orders]))
    return [_row(case, [next(answers) for _ in orders]) for case, orders in wanted]


def _ask(orders: Sequence[tuple[str, Order]]) -> list[dict]:
    """Answers in the order of `orders`. At most three processes at once: two with a GPU, and one without."""
    places = {on: [i for i, (where, _) in enumerate(orders) if where == on] for on in ("cuda", "cpu")}
    half = len(places["cuda"]) // 2 if len(places["cuda"]) > FEW else 0
    shares = [("cuda", places["cuda"][:half]), ("cuda", places["cuda"][half:]), ("cpu", places["cpu"])]
    answers: dict[int, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        running: list[tuple[list[int], Path, subprocess.Popen]] = []
        try:
            for number, (on, share) in enumerate(shares):
                if share:
                    path = Path(folder, str(number))
                    running.append((share, path, _start(on, [orders[i][1] for i in share], path)))
            for share, path, process in running:
                if process.wait():
                    raise RuntimeError(f"counting failed:\n{path.with_suffix('.err').read_text()[-2000:]}")
                lines = path.with_suffix(".out").read_text().splitlines()
                answers |= zip(share, map(json.loads, lines), strict=True)
        finally:
            for _, _, process in running:
                process.kill()
    return [answers[i] for i in range(len(orders))]


def _start(on: str, orders: Sequence[Order], path: Path) -> subprocess.Popen:
    source, out, err = (path.with_suffix(suffix) for suffix in (".in", ".out", ".err"))
    source.write_text("".join(json.dumps(dataclasses.asdict(order)) + "\n" for order in orders))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with source.open() as stdin, out.open("w") as stdout, err.open("w") as stderr:
        pipes = {"stdin": stdin, "stdout": stdout, "stderr": stderr}
        return subprocess.Popen([*WORKER, on], cwd=ROOT, env=environment, **pipes)


def _row(case: Case, answers: Sequence[dict]) -> dict:
    """What the first rank asks for in a step, and whether the others ask alike."""
    first = answers[0]
    purposes = {name: {"collectives": 0, "sent": 0, "received": 0, "over link": 0.0} for name in PURPOSES}
    for phase in PHASES:
        for asked in (Asked(*fields) for fields in first[phase]):
            found = purposes[purpose(asked, phase, first["accelerator"])]
            found["collectives"] += 1
            found["sent"] += asked.sent
            found["received"] += asked.got_by(case.ranks[0])
            found["over link"] += asked.over_link(case.world)
    whole = {name: sum(found[name] for found in purposes.values()) for name in purposes["other"]}
    return {
        "configuration": ", ".join(case.configuration.names),
        "stage": case.stage,
        "world": case.world,
        "accelerator": first["accelerator"],
        "gradients by": "reduce" if case.scatter else "all-reduce",
        "ranks compared": list(case.ranks),
        "difference": first_difference(case, answers),
        "trained parameters": first["trained"],
        "collectives a step": whole["collectives"],
        "bytes a step": whole["sent"],
        "bytes received a step": whole["received"],
        "bytes over link a step": whole["over link"],
        "purposes": purposes,
    }


def purpose(asked: Asked, phase: str, accelerator: str) -> str:
    """One of PURPOSES. "other" are single numbers: the gradients' norm, and whether it is finite."""
    if accelerator != "cpu" and asked.device == "cpu":
        return "hosts"  # what they tell each other through gloo
    if phase == "backward":
        return "gradients"
    if phase == "optimizer":
        return "parameters" if asked.gathers else "other"
    return "features"


def first_difference(case: Case, answers: Sequence[dict]) -> str | None:
    """Where a rank parts from the first one, in words; None: all ask for the same in the same order."""
    for rank, answer in zip(case.ranks[1:], answers[1:], strict=True):
        for phase in PHASES:
            for place, pair in enumerate(zip_longest(answers[0][phase], answer[phase]), start=1):
                if pair[0] != pair[1]:
                    mine, theirs = (Asked(*fields) if fields else "nothing more" for fields in pair)
                    where = f"{case}: collective {place} of the phase {phase!r}"
                    who = f"rank {case.ranks[0]} asks for {mine}, rank {rank} for {theirs}"
                    return f"{where}: {who}. Under NCCL they would wait for ever"
    return None


def render(rows: Sequence[dict], preset: str, batch: int) -> str:
    from benchmarks import measure

    rules = [
        {"collective": rule.name, "each rank sends": rule.formula, "because": rule.because}
        for rule in dict.fromkeys(RULES.values())
    ]
    lines = [
        {
            "configuration": row["configuration"],
            "ZeRO": row["stage"],
            "ranks": row["world"],
            "collectives": row["collectives a step"],
            "handed in": row["bytes a step"] / 1e6,
            "got back": row["bytes received a step"] / 1e6,
            **{f"{name}, link": row["purposes"][name]["over link"] / 1e6 for name in PURPOSES[:3]},
            "other, link": sum(row["purposes"][name]["over link"] for name in PURPOSES[3:]) / 1e6,
            "alike": _alike(row),
        }
        for row in rows
    ]
    size = f"{preset}, {rows[0]['trained parameters']:,} trained parameters, {batch} samples a rank"
    head = (
        f"One step of {size}, gradients by {rows[0]['gradients by']}. MB (10^6 bytes) of the first rank. Counted: what "
        f"it hands to the collectives and gets back from them. Link: what a rank then sends in a ring of w ranks, and "
        f"receives; N is the whole:"
    )
    alike = "Alike: the ranks that were run, and that ask for the same in the same order."
    tables = [measure.table(some, list(some[0])) for some in (rules, lines)]
    return "\n\n".join([head, tables[0], tables[1], alike])


def _alike(row: dict) -> str | None:
    if row["difference"]:
        return "NO"
    ranks = row["ranks compared"]
    return ", ".join(map(str, ranks)) if len(ranks) >= min(2, row["world"]) else None


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON, on one line, in place of tables")
    parser.add_argument("--world", type=int, nargs="+", default=list(WORLDS), metavar="RANKS")
    parser.add_argument("--stage", type=int, nargs="+", choices=(1, 2), default=[1, 2], help="in place of the file's")
    parser.add_argument("--deepspeed", nargs="+", default=available(), metavar="NAME", help="of files in ds_configs")
    parser.add_argument("--preset", default="base", choices=PRESETS)
    parser.add_argument("--batch", type=int, default=64, help="samples a rank; whole eights")
    parser.add_argument("--ranks", type=int, default=2, help="how many are compared, from the first to the last")
    parser.add_argument("--scatter", action="store_true", help="use_multi_rank_bucket_allreduce: false")
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.deepspeed) - set(available())):
        parser.error(f"--deepspeed: ds_configs has no {', '.join(unknown)}; choose from {', '.join(available())}")
    if args.batch < 8 or args.batch % 8:
        parser.error(f"--batch is {args.batch}, and captions come in whole eights: give 8, 16, ...")
    if min(*args.world, args.ranks) < 1:
        parser.error("--world and --ranks must be at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """The command line in this file's head."""
    args = parse(argv)
    cases = [
        Case(configuration, stage, world, spread(world, args.ranks), args.scatter)
        for configuration in configurations(args.deepspeed)
        for stage in args.stage
        for world in args.world
    ]
    try:
        rows = count(cases, args.preset, args.batch)
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    found = {"preset": args.preset, "batch": args.batch, "rows": rows}
    print(json.dumps(found) if args.json else render(rows, args.preset, args.batch))
    differences = [row["difference"] for row in rows if row["difference"]]
    for difference in differences:
        print(difference, file=sys.stderr)
    return 1 if differences else 0


if __name__ == "__main__":
    raise SystemExit(main())
