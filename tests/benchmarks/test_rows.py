"""Rows of a benchmark that is killed: what was finished is on the disk and readable."""

import multiprocessing
import random
import time

import pytest

from benchmarks import measure


def write_for_ever(path, told):
    rows = measure.Rows(path)
    for number in range(10**9):
        rows.add({"number": number, "filler": "x" * (number % 5000)})
        told.value = number


def test_a_killed_process_leaves_every_row_it_finished(tmp_path):
    path = tmp_path / "made" / "rows.jsonl"
    processes = multiprocessing.get_context("fork")
    told = processes.Value("q", -1, lock=False)  # the last row whose `add` came back
    child = processes.Process(target=write_for_ever, args=(path, told))
    child.start()
    while told.value < 20:
        time.sleep(0.001)
    time.sleep(random.random() * 0.1)
    child.kill()
    child.join()
    found = [row["number"] for row in measure.read_rows(path)]
    assert found == list(range(len(found))) and len(found) > told.value


def test_a_torn_last_line_is_passed_over(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = measure.Rows(path)
    rows.add({"a": 1})
    rows.add({"a": 2})
    whole = path.read_text()
    for length in range(len('{"a": 1}\n'), len(whole)):
        path.write_text(whole[:length])
        assert measure.read_rows(path) == [{"a": 1}]
        measure.Rows(path).add({"a": 3})
        assert measure.read_rows(path) == [{"a": 1}, {"a": 3}]
    assert rows.rows == [{"a": 1}, {"a": 2}]


def test_a_later_run_appends(tmp_path):
    path = tmp_path / "rows.jsonl"
    for number in range(2):
        measure.Rows(path).add({"number": number})
    assert [row["number"] for row in measure.read_rows(path)] == [0, 1]


@pytest.mark.parametrize("rows", [[], [{"a": 1}]])
def test_without_a_path_nothing_is_written(tmp_path, monkeypatch, rows):
    monkeypatch.chdir(tmp_path)
    kept = measure.Rows(None)
    for row in rows:
        kept.add(row)
    assert kept.rows == rows and not list(tmp_path.iterdir())
