"""A suite goes on when a lane does not, and whatever stops it leaves what was measured."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import lanes, measure, suite
from benchmarks.lanes import Lane

PRINTS = ("-c", "print('{}')")
WRITES_ROWS = (
    "-c",
    "import sys, time, pathlib; from benchmarks.measure import Rows\n"
    "rows = Rows(pathlib.Path(sys.argv[1]) / 'rows.jsonl')\n"
    "for i in range(100000): rows.add({'i': i, 'text': 'x' * 500}); time.sleep(0.005)",
    "{out}",
)
ENVIRONMENT = {"device": "a chip", "commit": "abc"}


def quiet(*_, **__) -> None:
    pass


def run(chosen: list[Lane], out: Path, minutes: float = 1.0) -> list[dict]:
    deadline = time.monotonic() + 60 * minutes
    return suite.run(chosen, suite.Report(out, ENVIRONMENT), deadline, dict(os.environ), say=quiet)


def written(out: Path) -> dict[str, dict]:
    return {row["lane"]: row for row in json.loads((out / "suite.json").read_text())["lanes"]}


def end_orphans(folder: str) -> None:
    """Ends the lanes that a killed suite has left, which write into this folder."""
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if folder in command.read_text():
                os.kill(int(command.parent.name), signal.SIGKILL)
        except OSError:  # it has ended by itself
            continue


def test_it_goes_on_after_lanes_that_fail_hang_or_are_not_there(tmp_path):
    chosen = [
        Lane("good", 1, PRINTS, 60),
        Lane("bad", 1, ("-c", "import sys; print('half', file=sys.stderr); sys.exit(3)"), 60),
        Lane("nothing to compare with", 1, ("-c", "import sys; sys.exit(3)"), 60, no_baseline=3),
        Lane("hangs", 1, ("-c", "import time; time.sleep(60)"), 1),
        Lane("needs apex", 2, PRINTS, 60, needs="apex"),
        Lane("last", 2, PRINTS, 60),
    ]
    rows = run(chosen, tmp_path)
    statuses = ["passed", "failed", "no baseline", "timed out", "not installed", "passed"]
    assert [row["status"] for row in rows] == statuses
    assert rows[0]["rows"] == [{}] and "half" in rows[1]["error"] and "apex" in rows[4]["error"]
    assert [row["status"] for row in written(tmp_path).values()] == statuses
    page = (tmp_path / "suite.md").read_text()
    assert "## hangs: timed out" in page and "| bad | failed |" in page and sys.executable not in page
    assert {row["status"] for row in run(chosen, tmp_path, minutes=0)} == {"no time left"}
    assert [row["status"] for row in written(tmp_path).values()] == statuses  # what was measured stays


def test_no_baseline_is_not_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(suite.wheels, "environment", lambda *_: dict(os.environ))
    monkeypatch.setattr(
        suite, "lanes", lambda *_: [Lane("compared", 1, ("-c", "raise SystemExit(3)"), 60, no_baseline=3)]
    )
    assert suite.main(["--out", str(tmp_path), "--device", "cpu"]) == 0
    assert written(tmp_path)["compared"]["status"] == "no baseline"
    monkeypatch.setattr(
        suite, "lanes", lambda *_: [Lane("compared", 1, ("-c", "raise SystemExit(1)"), 60, no_baseline=3)]
    )
    assert suite.main(["--out", str(tmp_path), "--device", "cpu"]) == 1


def test_a_lane_out_of_time_leaves_its_finished_rows(tmp_path):
    [row] = run([Lane("rows", 1, WRITES_ROWS, 4 + random.random())], tmp_path)
    assert row["status"] == "timed out" and len(row["rows"]) > 5
    assert [r["i"] for r in row["rows"]] == list(range(len(row["rows"])))


def test_parts_of_several_calls_stand_in_one_report(tmp_path):
    one, two = Lane("first", 1, PRINTS, 60), Lane("second", 2, PRINTS, 60)
    run([two], tmp_path)
    run([one], tmp_path)
    assert list(written(tmp_path)) == ["first", "second"]
    run([Lane("first", 1, ("-c", "raise SystemExit(1)"), 60)], tmp_path)  # run again: the newer one counts
    assert {name: row["status"] for name, row in written(tmp_path).items()} == {"first": "failed", "second": "passed"}
    before = (tmp_path / "suite.json").read_text()
    with pytest.raises(suite.AnotherDevice, match="measured on a chip, and this is another chip"):
        suite.Report(tmp_path, {"device": "another chip", "commit": "abc"})
    assert (tmp_path / "suite.json").read_text() == before


def test_a_lane_cut_in_the_middle_of_a_character_has_a_row(tmp_path):
    code = "import sys, os, time; os.write(1, 'é'.encode()[:1]); time.sleep(60)"
    [row] = run([Lane("cut", 1, ("-c", code), 2)], tmp_path)
    assert row["status"] == "timed out" and row["rows"] == []


def test_whatever_a_lane_started_may_say_its_last_words(tmp_path):
    """Its leader has ended at once; the child that it leaves is asked to end, too, and waited for."""
    child = (
        "import signal, sys, time\n"
        "def last(*_): time.sleep(0.5); open(sys.argv[1] + '/words', 'w').write('last'); sys.exit()\n"
        "signal.signal(signal.SIGTERM, last); open(sys.argv[1] + '/ready', 'w').close(); time.sleep(60)"
    )
    leader = (
        "import os, subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}, sys.argv[1]])\n"
        "while not os.path.exists(sys.argv[1] + '/ready'): time.sleep(0.02)"
    )
    [row] = run([Lane("leaves", 1, ("-c", leader, "{out}"), 30)], tmp_path)
    assert row["status"] == "passed" and (tmp_path / "1-leaves" / "words").read_text() == "last"


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_stopped_at_a_random_moment_the_suite_leaves_what_was_measured(tmp_path, sign):
    code = (
        "import os, sys; from benchmarks import suite; from benchmarks.lanes import Lane\n"
        "suite.wheels.environment = lambda *_: dict(os.environ)\n"
        f"suite.lanes = lambda *_: [Lane('good', 1, {PRINTS!r}, 60), Lane('rows', 1, {WRITES_ROWS!r}, 60)]\n"
        "sys.exit(suite.main(['--device', 'cpu', '--out', sys.argv[1]]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=measure.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        rows, deadline = tmp_path / "1-rows" / "rows.jsonl", time.monotonic() + 60
        while not rows.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(random.random())
        process.send_signal(sign)
    assert process.returncode == (-9 if sign == signal.SIGKILL else 1)
    assert written(tmp_path)["good"]["status"] == "passed"
    if sign == signal.SIGKILL:  # nobody was left to write it down: the next call does
        end_orphans(str(tmp_path))
        report = suite.Report(tmp_path, json.loads((tmp_path / "suite.json").read_text())["environment"])
        report.adopt([Lane("good", 1, PRINTS, 60), Lane("rows", 1, WRITES_ROWS, 60)])
    row = written(tmp_path)["rows"]
    assert row["status"] == "stopped" and row["rows"][0]["i"] == 0 and len(row["rows"]) > 1


def test_every_part_has_lanes_that_fit_ten_minutes_of_a_gpu():
    for part in lanes.PARTS:
        on_gpu = lanes.lanes("cuda", (part,))
        assert on_gpu and sum(lane.seconds for lane in on_gpu) <= 600, part
        assert lanes.lanes("cpu", (part,)), part
    assert lanes.lanes("cuda")[0].part == 1 and all("cpu" in lane.on for lane in lanes.lanes("cpu"))
    for kind in ("cuda", "cpu"):
        named = [(lane.part, lane.name) for lane in lanes.lanes(kind)]
        assert len(named) == len(set(named))


class Parsed(Exception):
    pass


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_every_lanes_command_line_is_taken(kind, monkeypatch):
    """By the very parser of what it starts; tests must be there."""
    parse = argparse.ArgumentParser.parse_args

    def parse_alone(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise Parsed

    for lane in lanes.lanes(kind):
        _, module, *arguments = lane.command
        if module == "pytest":
            files = [part.split("::")[0] for part in arguments if part.startswith("tests/")]
            assert files and all((measure.ROOT / file).exists() for file in files), lane.name
            continue
        main = importlib.import_module(module if module != "albef_ds" else "albef_ds.__main__").main
        with monkeypatch.context() as patch, pytest.raises(Parsed):
            patch.setattr(argparse.ArgumentParser, "parse_args", parse_alone)
            patch.setattr("torch.cuda.is_available", lambda: True)
            main(arguments)


def test_tests_run_in_one_process_where_nothing_divides_them(monkeypatch):
    command = lanes.pytest("tests/model", processes=4)
    monkeypatch.setattr(suite.wheels, "not_importable", lambda modules, variables: [])
    assert suite.on_processes(command, {}) == list(command)
    monkeypatch.setattr(suite.wheels, "not_importable", lambda modules, variables: list(modules))
    alone = suite.on_processes(command, {})
    assert "-n" not in alone and "4" not in alone and alone[-1] == "tests/model"
