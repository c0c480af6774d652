"""All that is to be known of a machine, in one command and a limited time.

    python -m benchmarks.suite --out DIR [--minutes 9] [--device cpu]

Runs the tests that need a GPU and every benchmark there is, most valuable first, each in a process of its own with a
time limit. What fails, does not fit or is not there yet is named, and the rest goes on. DIR receives `suite.json`,
`suite.md` and one folder per lane with its output. On a CPU the lanes that mean something on a CPU are run. The exit
status is 1 if a lane failed or ran out of its time.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import measure


@dataclass(frozen=True)
class Lane:
    """One process: `command` after the Python interpreter, "{out}" being its folder; `minutes` it may take at most.

    `module` must exist for the lane to be there. `on` names the kinds of device it is for.
    """

    name: str
    command: tuple[str, ...]
    minutes: float
    module: str
    on: tuple[str, ...] = ("cuda", "cpu")


def lanes(kind: str) -> list[Lane]:
    """In order of worth on this kind of device."""
    core = ("--out", "{out}", "--batches", "64", "512", "--lengths", "65536", "--seconds", "0.5")
    found = [
        Lane("kernel tests", ("-m", "pytest", "tests/kernels", "-q"), 5, "tests.kernels", ("cuda",)),
        Lane("kernels, core", ("-m", "benchmarks.kernels", *core), 2, "benchmarks.kernels", ("cuda",)),
        Lane("step", ("-m", "benchmarks.step", "--json"), 4, "benchmarks.step"),
        Lane("flops", ("-m", "benchmarks.flops", "--json"), 2, "benchmarks.flops"),
        Lane("loader", ("-m", "benchmarks.loader", "--json"), 2, "benchmarks.loader"),
        Lane("regress", ("-m", "benchmarks.regress"), 2, "benchmarks.regress"),
        Lane("compile report", ("-m", "benchmarks.compile_report", "--quick"), 3, "benchmarks.compile_report"),
        Lane("kernels", ("-m", "benchmarks.kernels", "--out", "{out}", "--seconds", "0.3"), 6, "benchmarks.kernels"),
    ]
    return [lane for lane in found if kind in lane.on]


def run_lane(lane: Lane, folder: Path, seconds: float) -> dict:
    """Runs one lane for at most `seconds`; {"status": passed, failed, timed out or not there yet, ...}."""
    row = dict(lane=lane.name, status="not there yet", seconds=0.0, output="", json=None)
    if importlib.util.find_spec(lane.module) is None:
        return row
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *(part.replace("{out}", str(folder)) for part in lane.command)]
    row["command"] = " ".join(["python", *lane.command]).replace("{out}", folder.name)
    start = time.monotonic()
    with open(folder / "stdout.txt", "w+") as out, open(folder / "stderr.txt", "w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, start_new_session=True, cwd=measure.ROOT)
        try:
            row["status"] = "passed" if process.wait(timeout=seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the lane and what it started, nothing else
            process.wait()
            row["status"] = "timed out"
    row["seconds"] = round(time.monotonic() - start, 1)
    row["output"] = (folder / "stdout.txt").read_text(errors="replace")[-20_000:]
    if row["status"] != "passed":
        row["error"] = (folder / "stderr.txt").read_text(errors="replace")[-3_000:]
    row["json"] = _json(folder, row["output"])
    return row


def _json(folder: Path, output: str):
    for text in [*(path.read_text() for path in sorted(folder.glob("*.json"))), output]:
        try:
            return json.loads(text)
        except ValueError:
            continue
    return None


def run(chosen: list[Lane], out: Path, minutes: float, say=print) -> list[dict]:
    """Runs the lanes in order until the time is up; those left get a row that says so."""
    deadline, rows = time.monotonic() + 60 * minutes, []
    for lane in chosen:
        left = deadline - time.monotonic()
        if left < 10:
            rows.append(dict(lane=lane.name, status="no time left", seconds=0.0, output="", json=None))
        else:
            rows.append(
                run_lane(lane, out / lane.name.replace(" ", "-").replace(",", ""), min(left, 60 * lane.minutes))
            )
        say(f"{lane.name}: {rows[-1]['status']} ({rows[-1]['seconds']} s)")
    return rows


def markdown(environment: dict, rows: list[dict]) -> str:
    """The report: machine, one line a lane, then what each printed."""
    lines = [f"# Suite on {environment['device']}", ""]
    lines += [f"- {name}: {value}" for name, value in environment.items()]
    lines += ["", measure.table(rows, ["lane", "status", "seconds", "command"])]
    for row in rows:
        lines += ["", f"## {row['lane']}: {row['status']}", ""]
        text = row["output"].strip() or "No output."
        lines += [text] if text.startswith(("#", "|")) else ["```", text, "```"]
        lines += ["", "Standard error ends:", "", "```", row["error"].strip(), "```"] if row.get("error") else []
    return "\n".join(lines) + "\n"


def main(argv=None) -> int:
    """The command line in this file's head."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--device", help="cuda or cpu; default: the GPU if there is one")
    args = parser.parse_args(argv)
    device = measure.pick_device(args.device)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    environment = measure.environment(device)
    rows = run(lanes(device.type), out, args.minutes)
    (out / "suite.json").write_text(json.dumps(dict(environment=environment, lanes=rows), indent=1) + "\n")
    (out / "suite.md").write_text(markdown(environment, rows))
    print(f"written to {args.out}/suite.md and suite.json")
    return 1 if any(row["status"] in ("failed", "timed out") for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
