"""All that is to be known of a machine, in parts of ten minutes; safe to stop anywhere.

    python -m benchmarks.suite --out DIR [--part 1 2 3 4 5] [--minutes 50] [--device cpu] [--wheels FOLDER]

A part is a list of lanes (benchmarks/lanes.py), most valuable first, each a process of its own with a time limit: 1
does it run; 2 how fast; 3 a real run; 4 where the time goes; 5 decoding. What fails, does not fit or is not there is
named, and the rest goes on. DIR receives one folder a lane, in which its rows stand as soon as they are measured, and
`suite.json` and `suite.md`, written again after every lane; a later call with other parts adds to them. On a machine
without a package registry --wheels names a folder of what is missing there. On a CPU the lanes that mean something on
a CPU are run, on smaller models. The exit status is 1 if a lane failed, was stopped or ran out of time, 2 if nothing
can start.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from albef_ds import optional
from albef_ds.data.files import write_atomically
from benchmarks import measure, predictions, wheels
from benchmarks.lanes import PARTS, Lane, lanes

FAILED, NOT_RUN = ("failed", "timed out", "stopped"), ("no time left", "not installed")
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LEAST = 10  # seconds that a lane is worth starting for
GRACE = 3  # seconds between asking a lane to end and ending it
SHOWN = 20_000  # characters of a lane's output that the report holds


def run_lane(lane: Lane, folder: Path, seconds: float, variables: dict[str, str]) -> dict:
    """Runs one lane for at most `seconds`.

    Returns:
        {"status": passed, failed, timed out, stopped or no baseline; "seconds", "rows", "output", ...}
    """
    row: dict = {}
    shutil.rmtree(folder, ignore_errors=True)  # an earlier call's
    folder.mkdir(parents=True)
    command = [part.replace("{out}", str(folder)) for part in on_processes(lane.command, variables)]
    row["command"] = " ".join(["python", *lane.command]).replace("{out}", folder.name)
    start = time.monotonic()
    with open(folder / "stdout.txt", "w+") as out, open(folder / "stderr.txt", "w+") as err:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=out, stderr=err, start_new_session=True, cwd=measure.ROOT, env=variables
        )
        try:
            code = process.wait(timeout=seconds)
            row["status"] = {0: "passed", lane.no_baseline: "no baseline"}.get(code, "failed")
        except subprocess.TimeoutExpired:
            row["status"] = "timed out"
        except Stopped:
            row["status"] = "stopped"
        finally:
            end(process)
    row["seconds"] = round(time.monotonic() - start, 1)
    row["output"] = (folder / "stdout.txt").read_text(errors="replace")[-SHOWN:]
    if row["status"] != "passed":
        row["error"] = (folder / "stderr.txt").read_text(errors="replace")[-3_000:]
    row["rows"] = rows_of(folder)
    return row


def on_processes(command: tuple[str, ...], variables: dict[str, str]) -> list[str]:
    """The command, its tests in one process where pytest-xdist is not there to divide them."""
    if "-n" not in command or not wheels.not_importable(("xdist",), variables):
        return list(command)
    at = command.index("-n")
    return [*command[:at], *command[at + 2 :]]


def end(process: subprocess.Popen) -> None:
    """The lane and all that it started, and nothing else; they may write their last words first."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            deadline = time.monotonic() + GRACE
            while time.monotonic() < deadline:
                process.poll()
                os.killpg(process.pid, 0)  # until nobody of the group is left
                time.sleep(0.05)
        except ProcessLookupError:
            break
    process.wait()


def rows_of(folder: Path) -> list[dict]:
    """What a lane has measured so far: the rows that it wrote one by one, or its results as a whole."""
    if lines := sorted(folder.glob("*.jsonl")):
        return [row for path in lines for row in measure.read_rows(path)]
    found = []
    for path in [*sorted(folder.glob("*.json")), folder / "stdout.txt"]:
        try:
            whole = json.loads(path.read_text(errors="replace"))  # a killed lane may have cut a character
        except ValueError:
            continue
        found += whole if isinstance(whole, list) else [whole]
    return found


def folder_of(lane: Lane) -> str:
    """A folder's name that sorts by part."""
    return f"{lane.part}-{re.sub(r'[^a-z0-9]+', '-', lane.name.lower()).strip('-')}"


class Stopped(BaseException):
    """Somebody asks the suite to end; the lane that runs is ended first."""


class AnotherDevice(RuntimeError):
    """The folder holds what was measured on another device."""


class Report:
    """suite.json and suite.md, whole after every lane; rows of earlier calls into the same folder stay.

    Raises AnotherDevice where the folder's are of another.
    """

    def __init__(self, out: Path, environment: dict):
        self.out, self.environment = out, environment
        out.mkdir(parents=True, exist_ok=True)
        self.rows = []
        if (out / "suite.json").is_file():
            earlier = json.loads((out / "suite.json").read_text())
            if earlier["environment"]["device"] != environment["device"]:
                raise AnotherDevice(
                    f"{out} holds what was measured on {earlier['environment']['device']}, and this is "
                    f"{environment['device']}: give another folder as --out"
                )
            self.rows = earlier["lanes"]

    def adopt(self, known: list[Lane]) -> None:
        """Lanes that an earlier call had begun when it was killed: what they had written by then."""
        told = {(row["part"], row["lane"]) for row in self.rows}
        for lane in known:
            folder = self.out / folder_of(lane)
            if (lane.part, lane.name) not in told and (folder / "stdout.txt").is_file():
                output = (folder / "stdout.txt").read_text(errors="replace")[-SHOWN:]
                head = {"lane": lane.name, "part": lane.part, "status": "stopped", "seconds": None}
                self.add(head | {"output": output, "rows": rows_of(folder)})

    def add(self, row: dict) -> None:
        """In place of the same lane's row of an earlier call; what did not run at all replaces nothing."""
        if row["status"] in NOT_RUN and self.find(row):
            return
        row["commit"] = self.environment["commit"]
        self.drop(row)
        self.rows = sorted([*self.rows, row], key=lambda row: row["part"])  # within a part as they were run
        self.write()

    def find(self, row: dict) -> dict | None:
        return next((r for r in self.rows if (r["part"], r["lane"]) == (row["part"], row["lane"])), None)

    def drop(self, row: dict) -> None:
        self.rows = [r for r in self.rows if (r["part"], r["lane"]) != (row["part"], row["lane"])]

    def begin(self, lane: Lane) -> None:
        """An earlier call's row goes with its files: were this one killed, old figures would stand beside new files."""
        self.drop({"lane": lane.name, "part": lane.part})
        self.write()

    def write(self) -> None:
        whole = {"environment": self.environment, "lanes": self.rows, "predicted": self.predicted()}
        write_atomically(self.out / "suite.json", json.dumps(whole, indent=1) + "\n")
        write_atomically(self.out / "suite.md", markdown(self.environment, self.rows, whole["predicted"]))

    def predicted(self) -> dict:
        """What was predicted before, beside what is measured so far."""
        try:
            found = predictions.newest()
        except ValueError as error:  # no reason to lose what is measured
            return {"error": str(error), "rows": []}
        rows = predictions.beside(found, self.environment, self.rows) if found else []
        return {"commit": found["commit"] if found else None, "rows": rows}


def run(chosen: list[Lane], report: Report, deadline: float, variables: dict[str, str], say=print) -> list[dict]:
    """Runs the lanes in order until the deadline (of time.monotonic); those left get a row that says so."""
    rows = []
    for lane in chosen:
        left = deadline - time.monotonic()
        row = {"lane": lane.name, "part": lane.part, "seconds": 0.0, "output": "", "rows": []}
        if left < LEAST:
            row["status"] = "no time left"
        elif lane.needs and not (found := optional.find(lane.needs)).available:
            row |= {"status": "not installed", "error": found.reason}
        else:
            report.begin(lane)
            row |= run_lane(lane, report.out / folder_of(lane), min(left, lane.seconds), variables)
        rows.append(row)
        report.add(row)
        say(f"{lane.part}: {lane.name}: {row['status']} ({row['seconds']} s)", flush=True)
        if row["status"] == "stopped":
            break
    return rows


def stop(*_) -> None:
    for sign in ENDING:  # once is enough: a second one would come while the lane is ended
        signal.signal(sign, signal.SIG_IGN)
    raise Stopped


def markdown(environment: dict, rows: list[dict], predicted: dict) -> str:
    """The report: machine, one line a lane, what was predicted, then what each printed."""
    lines = [f"# Suite on {environment['device']}", ""]
    lines += [f"- {name}: {value}" for name, value in environment.items()]
    shown = [{**row, "rows": len(row["rows"])} for row in rows]
    lines += ["", measure.table(shown, ["part", "lane", "status", "seconds", "rows", "command"])]
    lines += ["", f"Predictions: {predicted['error']}"] if "error" in predicted else []
    if predicted["rows"]:
        lines += ["", f"## Predicted at {predicted['commit']}, and measured", "", predictions.render(predicted["rows"])]
        lines += ["", "A predicted time is the least that memory and arithmetic allow (benchmarks.roofline)."]
    for row in rows:
        lines += ["", f"## {row['lane']}: {row['status']}", ""]
        text = row["output"].strip() or "No output."
        lines += [text] if text.startswith(("#", "|")) else ["```", text, "```"]
        lines += ["", "Standard error ends:", "", "```", row["error"].strip(), "```"] if row.get("error") else []
    return "\n".join(lines) + "\n"


def main(argv=None) -> int:
    """The command line in this file's head."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=measure.folder, required=True)
    parser.add_argument("--part", type=int, nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--minutes", type=float, help="for all lanes; default: ten a part")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: the GPU if there is one, the first")
    parser.add_argument("--wheels", type=Path, help="folder of wheels, on a machine without a package registry")
    args = parser.parse_args(argv)
    minutes = args.minutes if args.minutes is not None else 10 * len(args.part)
    deadline, out = time.monotonic() + 60 * minutes - GRACE, args.out.resolve()  # what installs and imports counts too
    try:
        device = measure.pick_device(args.device)
        variables = wheels.environment(args.wheels, out / "site-packages")
        sys.path[:0] = filter(None, variables.get("PYTHONPATH", "").split(os.pathsep))  # what is there for the lanes
        report = Report(out, measure.environment(device))
    except (wheels.WheelsError, RuntimeError) as error:
        print(f"the suite cannot start: {error}", file=sys.stderr)
        return 2
    if device.type == "cpu":
        variables |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    report.adopt(lanes(device.type))
    before = {sign: signal.signal(sign, stop) for sign in ENDING}
    try:
        rows = run(lanes(device.type, tuple(args.part)), report, deadline, variables)
    except Stopped:  # between two lanes
        return 1
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)
    print(f"written to {args.out}/suite.md and suite.json")
    return 1 if any(row["status"] in FAILED for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
