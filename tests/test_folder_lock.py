"""One owner at a time: while it lives, however it ends, and where the file system knows no locks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from albef_ds import folder_lock
from albef_ds.data.files import write_atomically
from albef_ds.folder_lock import OWNER, FolderError, FolderLock

ROOT = Path(__file__).parent.parent
HOLDS = """
import os, sys, time
from albef_ds.folder_lock import FolderLock
with FolderLock(sys.argv[1], beat=0.1, silence=0.5):
    if "forks" in sys.argv and os.fork() == 0:
        time.sleep(60)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Starts a process that holds tmp_path; killed at the end."""
    processes = []

    def start(*arguments: str, code: str = HOLDS) -> subprocess.Popen:
        command = [sys.executable, "-c", code, str(tmp_path), *arguments]
        processes.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        assert processes[-1].stdout.readline() == "held\n"
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def lock(folder: Path) -> FolderLock:
    return FolderLock(folder, beat=0.1, silence=0.5)


def test_the_second_is_refused_and_told_who_holds_it_and_since_when(tmp_path, holder):
    process = holder()
    with pytest.raises(FolderError) as refused, lock(tmp_path):
        pass
    said = str(refused.value)
    assert said.startswith(f"{tmp_path} is in use by process {process.pid} on ")
    assert re.search(r"since \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d; its command: .*FolderLock", said), said
    assert json.loads((tmp_path / OWNER).read_text())["process"] == process.pid


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_is_free_as_soon_as_its_owner_was_killed(tmp_path, holder, number):
    process = holder()
    process.send_signal(number)
    process.wait()
    assert (tmp_path / OWNER).exists()
    began = time.monotonic()
    with FolderLock(tmp_path, silence=60):
        assert json.loads((tmp_path / OWNER).read_text())["process"] == os.getpid()
    assert time.monotonic() - began < 5
    assert not (tmp_path / OWNER).exists()


def test_a_stopped_owner_still_owns_it(tmp_path, holder):
    process = holder()
    process.send_signal(signal.SIGSTOP)
    time.sleep(1)  # ten signs of life that it does not give
    with pytest.raises(FolderError, match=f"process {process.pid}"), lock(tmp_path):
        pass


def test_left_in_good_order_it_is_free_although_a_forked_child_has_the_file_open(tmp_path):
    with FolderLock(tmp_path):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        with FolderLock(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_its_owner_removes_meanwhile_is_not_the_one_to_lock(tmp_path, monkeypatch):
    (tmp_path / OWNER).touch()
    really_lock = fcntl.flock

    def ended_just_now(file, operation) -> None:
        (tmp_path / OWNER).unlink()
        monkeypatch.setattr(fcntl, "flock", really_lock)
        really_lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", ended_just_now)
    with lock(tmp_path), pytest.raises(FolderError, match=f"process {os.getpid()} on"), lock(tmp_path):
        pass


def test_many_at_once_are_never_two(tmp_path):
    """A counter that only an owner may touch loses no step."""
    (tmp_path / "counter").write_text("0")
    code = """
import pathlib, sys, time
from albef_ds.folder_lock import FolderError, FolderLock
done = 0
while done < 50:
    try:
        with FolderLock(sys.argv[1]):
            counter = pathlib.Path(sys.argv[1], "counter")
            seen = int(counter.read_text())
            time.sleep(0.0005)
            counter.write_text(str(seen + 1))
            done += 1
    except FolderError:
        time.sleep(0.001)
"""
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT) for _ in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    assert (tmp_path / "counter").read_text() == "150"


# -- file systems that know no locks, or keep them to one machine ------------------------------------------------------


def no_locks(*_) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def test_without_locks_signs_of_life_keep_the_second_out(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with lock(tmp_path):
        with pytest.raises(FolderError, match=f"process {os.getpid()} on"), lock(tmp_path):
            pass
    with lock(tmp_path):
        pass
    assert not (tmp_path / OWNER).exists()


@pytest.mark.parametrize("locks", ["none", "of this machine alone"])
def test_what_another_machine_has_left_is_watched_and_then_taken(tmp_path, monkeypatch, caplog, locks):
    if locks == "none":
        monkeypatch.setattr(fcntl, "flock", no_locks)
    left = {
        "process": 7,
        "host": "far",
        "user": "ann",
        "since": "2026-01-01",
        "command": "x",
        "boot": "1",
        "token": "t",
    }
    (tmp_path / OWNER).write_text(json.dumps(left))
    began = time.monotonic()
    with lock(tmp_path):
        assert time.monotonic() - began >= 0.5
        assert (
            "left by process 7 on far (user ann, since " in caplog.text and "no sign of life: taken over" in caplog.text
        )


def test_an_owner_on_another_machine_whose_locks_are_not_seen_here_is_seen_by_its_signs_of_life(
    tmp_path, monkeypatch, holder
):
    process = holder()
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)  # granted, whoever holds it elsewhere
    monkeypatch.setattr(folder_lock, "_boot", lambda: "another machine")
    with pytest.raises(FolderError, match=f"process {process.pid} on"), lock(tmp_path):
        pass


@pytest.mark.parametrize("ends", ["gives signs", "keeps it", "lets go"])
def test_a_lock_of_another_machine_is_believed_while_it_gives_signs_of_life(tmp_path, monkeypatch, holder, ends):
    """A server keeps the lock of a machine that has failed for a while, or until that is back."""
    process = holder()
    monkeypatch.setattr(folder_lock, "_boot", lambda: "another machine")
    second = FolderLock(tmp_path, beat=0.2, silence=0.5, lease=2)
    if ends == "gives signs":
        with pytest.raises(FolderError, match=f"is in use by process {process.pid} on"), second:
            pass
        return
    process.send_signal(signal.SIGSTOP)
    if ends == "keeps it":
        said = re.escape(f"no sign of life for 2 s. If that machine has failed, remove {tmp_path / OWNER}")
        with pytest.raises(FolderError, match=said), second:
            pass
        return
    threading.Timer(0.5, process.kill).start()
    with second:
        assert json.loads((tmp_path / OWNER).read_text())["process"] == os.getpid()


def test_of_two_that_take_it_at_once_without_locks_one_stays(tmp_path, monkeypatch):
    """Both have looked and found nobody before either has written."""
    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(FolderLock, "_another_ends", lambda *_: False)
    together, ended = threading.Barrier(2), []

    def take() -> None:
        together.wait()
        try:
            with lock(tmp_path):
                time.sleep(1)
                ended.append("held")
        except FolderError:
            ended.append("refused")

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(ended) == ["held", "refused"]


def test_an_owner_that_stood_still_too_long_gives_way(tmp_path, holder):
    process = holder(code="import fcntl\nfcntl.flock = lambda *_: None\n" + HOLDS)
    process.send_signal(signal.SIGSTOP)
    theirs = {"process": 7, "host": "far", "token": "another", "beats": 0}
    (tmp_path / OWNER).write_text(json.dumps(theirs))
    process.send_signal(signal.SIGCONT)
    while process.poll() is None and theirs["beats"] < 1000:
        time.sleep(0.03)
        theirs["beats"] += 1
        write_atomically(tmp_path / OWNER, json.dumps(theirs))
    assert process.wait(timeout=1) == 2
    assert f"{tmp_path} was taken over by process 7 on far" in process.stderr.read()


@pytest.mark.parametrize("text", ["", "none", '{"process": 7, "host": "far", "token": "another"}'])
def test_what_is_copied_over_its_file_is_no_other_owner(tmp_path, holder, text):
    """`cp -r` of another run's folder, a restored backup: nobody gives a sign of life there."""
    process = holder()
    (tmp_path / OWNER).write_text(text)
    deadline = time.monotonic() + 20
    while str(process.pid) not in (tmp_path / OWNER).read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None
    with pytest.raises(FolderError, match=f"process {process.pid} on"), lock(tmp_path):
        pass


def test_an_owner_whose_file_was_removed_puts_it_back(tmp_path, holder):
    process = holder()
    (tmp_path / OWNER).unlink()
    deadline = time.monotonic() + 20
    while not (tmp_path / OWNER).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(FolderError, match=f"process {process.pid} on"), lock(tmp_path):
        pass


# -- folders that cannot be had ----------------------------------------------------------------------------------------


def test_a_name_that_no_file_system_takes_is_named():
    with pytest.raises(FolderError, match="cannot be written to: .*File name too long"), lock(Path("/tmp", "x" * 300)):
        pass


def test_an_owner_that_ends_while_it_is_watched_leaves_the_folder(tmp_path, monkeypatch):
    left = {"process": 7, "host": "far", "boot": "1", "token": "t"}
    (tmp_path / OWNER).write_text(json.dumps(left))
    threading.Timer(0.2, (tmp_path / OWNER).unlink).start()
    with FolderLock(tmp_path, beat=0.1, silence=30):
        assert json.loads((tmp_path / OWNER).read_text())["process"] == os.getpid()


def test_a_lock_that_is_to_last_goes_with_the_process(tmp_path):
    code = "import sys; from albef_ds.folder_lock import FolderLock\n"
    code += "with FolderLock(sys.argv[1]) as held:\n    held.until_the_end = True\n"
    code += "print('left', flush=True); sys.stdin.readline()"
    command, pipes = [sys.executable, "-c", code, str(tmp_path)], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
    assert process.stdout.readline() == "left\n"
    with pytest.raises(FolderError, match=f"process {process.pid} on"), lock(tmp_path):
        pass
    process.communicate("\n")
    with lock(tmp_path):
        pass


@pytest.mark.parametrize("there", ["file", "pipe", "link"])
def test_what_cannot_be_a_folder_or_a_lock_is_named(tmp_path, there):
    if there == "file":
        (tmp_path / "run").write_text("")
    else:
        (tmp_path / "run").mkdir()
        (tmp_path / "precious").write_text("precious")
        owner = tmp_path / "run" / OWNER
        owner.symlink_to(tmp_path / "precious") if there == "link" else os.mkfifo(owner)
    with (
        pytest.raises(FolderError, match=re.escape(f"{tmp_path / 'run'}: cannot be written to: ")),
        lock(tmp_path / "run"),
    ):
        pass
    assert there == "file" or (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"token": 3}', "[" * 100_000, '{"process": "\\u001b[2J\\n"}'])
def test_any_contents_left_there_are_no_obstacle_and_no_harm(tmp_path, text):
    (tmp_path / OWNER).write_text(text)
    with lock(tmp_path):
        pass
    assert "\x1b" not in folder_lock._who(text.encode())


def test_another_user_s_file_is_said_to_be_so(tmp_path, monkeypatch):
    (tmp_path / OWNER).write_text(json.dumps({"process": 7, "host": "here", "token": "t"}))
    really_open = os.open

    def refusing(path, flags, *mode):
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return really_open(path, flags, *mode)

    monkeypatch.setattr(os, "open", refusing)
    with (
        pytest.raises(FolderError, match="may be in use: .* belongs to process 7 on here.*remove the file"),
        lock(tmp_path),
    ):
        pass
