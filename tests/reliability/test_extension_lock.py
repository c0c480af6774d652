"""A process killed while it builds an extension leaves a lock behind; the next one must not wait for ever."""

from __future__ import annotations

import os
import signal
import time

from albef_ds.training.extension_lock import building


def test_the_lock_of_a_killed_builder_is_removed(tmp_path):
    child = os.fork()
    if child == 0:
        with building(tmp_path):
            (tmp_path / "lock").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / "lock").exists()
    with building(tmp_path):
        assert not (tmp_path / "lock").exists()


def test_the_lock_of_another_program_is_respected_until_nobody_builds_for_so_long(tmp_path):
    lock = tmp_path / "lock"
    lock.touch()
    child = os.fork()
    if child == 0:
        time.sleep(0.5)
        lock.unlink()
        (tmp_path / "done").touch()
        os._exit(0)
    with building(tmp_path):
        assert (tmp_path / "done").exists()
    os.waitpid(child, 0)
    lock.touch()
    os.utime(lock, (0, 0))
    with building(tmp_path):
        assert not lock.exists()
