"""Ends this rank when another is lost or hangs, and says which: a collective alone would wait, and name nobody.

Every rank gives a sign of life through a store of its own (TCP, kept by rank 0), from a thread, so that a long step or
a slow checkpoint is no silence. A second thread judges:

- a rank is silent for `dead_seconds`: killed, stopped, or its machine is gone;
- the store does not answer: rank 0 is, or its machine cannot be reached;
- a rank left with an error, and this one is still waiting for it after `dead_seconds`;
- this rank's own training loop stands still for `timeout_minutes`: some rank hangs. The rank that got least far is
  named (every rank, where all got equally far), and the stack of every thread is written to stderr.

The judge ends the process with EXIT_RANK_LOST, from its own thread, whatever the main thread waits for. The same holds
under gloo and NCCL. Should the threads fail too, the process group's timeout (the two times together) is behind them.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from albef_ds.processes import say
from albef_ds.training.rendezvous import open_store

EXIT_RANK_LOST = 69  # EX_UNAVAILABLE of sysexits.h

Place = tuple[int, int, str]  # how many places the loop has passed, the step, and what it does there


class Watchdog:
    """A context around a run. Collective to enter; one rank alone is watched for standing still only.

    Args:
        dead_seconds: silence after which a rank is lost.
        timeout_minutes: standstill of a loop after which it hangs.
    """

    def __init__(self, dead_seconds: float, timeout_minutes: float):
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.dead_seconds, self.hang_seconds = dead_seconds, 60 * timeout_minutes
        self.interval = min(max(dead_seconds / 10, 0.1), 5.0)
        self._place: Place | None = None  # None: outside the loop
        self._count = 0
        self._moved = time.monotonic()
        self._left: str | None = None  # "": in good order; else the error
        self._failing = False  # an error has come up, with which it will leave unless another rank turns out to be lost
        self._left_is_said = False
        self._talking: threading.Thread | None = None
        self._hurry, self._ending = threading.Event(), threading.Event()
        self._others = {rank: _Rank(f"rank {rank}") for rank in range(self.world_size) if rank != self.rank}
        self._answered = time.monotonic()
        self._store_error: str | None = None
        self._with_stacks = False

    # -- for the main thread -----------------------------------------------------------------------------------------

    def at(self, step: int, phase: str) -> None:
        """The loop has reached this phase of optimiser step `step`. Every rank calls it at the same places."""
        self._count += 1
        self._place, self._moved = (self._count, step, phase), time.monotonic()

    def limit_groups(self) -> None:
        """Sets the timeout of all process groups that there are, DeepSpeed's too, which are made with its engine."""
        timeout = timedelta(seconds=self.hang_seconds + self.dead_seconds)
        for group in dist.distributed_c10d._world.pg_map:  # PyTorch has no public names for this
            dist.distributed_c10d._set_pg_timeout(timeout, group)

    def outside(self) -> None:
        """The loop has ended: nothing tells how long what follows may take."""
        self._place = None

    def __enter__(self) -> Watchdog:
        self.limit_groups()
        if self.world_size > 1:
            self._store = self._open_store()
            self._say()
            dist.barrier()  # from here on every rank has said something
            self._talking = self._start(self._talk)
        self._start(self._judge)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is not None and _may_be_a_lost_peer(error) and self.world_size > 1:
            text = str(error).strip().splitlines()
            say(f"rank {self.rank}: {text[0] if text else kind.__name__}")
            self._failing = True
            # The judge ends this process, with a better message, if a rank is missing. This one goes on giving signs.
            time.sleep(self.dead_seconds + 3 * self.interval)
        self._leave("" if error is None else f"{kind.__name__}: {error}")

    def _leave(self, why: str) -> None:
        self._left = why
        if self.world_size > 1:
            self._hurry.set()
            # The store goes with rank 0: the others read why it left, or leave before it does.
            seconds = 2 if why else self.dead_seconds
            self._wait(lambda: self._left_is_said, 2)
            if self.rank == 0:
                self._wait(lambda: all(r.left is not None for r in self._others.values()), seconds)
        self._ending.set()
        if self._talking is not None:  # in the store's code it would abort the process where Python ends meanwhile
            self._talking.join(2)

    def _wait(self, done: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not done() and self._store_error is None and time.monotonic() < deadline:
            time.sleep(0.02)

    # -- signs of life -------------------------------------------------------------------------------------------------

    def _open_store(self) -> dist.TCPStore:
        address = [None]
        timeout = timedelta(seconds=max(self.dead_seconds, 5))
        if self.rank == 0:
            host = os.environ.get("MASTER_ADDR", socket.gethostname())
            store = open_store(host, 0, timeout)
            address = [(host, store.port)]
        dist.broadcast_object_list(address, src=0)
        if self.rank == 0:
            return store
        host, port = address[0]
        return dist.TCPStore(host, port, None, is_master=False, wait_for_workers=False, timeout=timeout)

    def _say(self) -> None:
        where = f"{socket.gethostname()}, process {os.getpid()}"
        mine = {"beat": time.monotonic(), "where": where, "place": self._place, "left": self._left}
        mine["failing"] = self._failing
        self._store.set(f"sign/{self.rank}", json.dumps(mine))

    def _talk(self) -> None:
        others = list(self._others)
        try:
            while not self._ending.is_set():
                leaving = self._left is not None
                self._say()
                self._left_is_said = leaving
                for rank, said in zip(others, self._store.multi_get([f"sign/{r}" for r in others]), strict=True):
                    self._others[rank].heard(said)
                self._answered = time.monotonic()
                self._hurry.wait(self.interval)
                if leaving:
                    self._ending.wait(0.05)
        except RuntimeError as error:  # the store is gone
            self._store_error = str(error).strip().splitlines()[0]

    # -- the judge -----------------------------------------------------------------------------------------------------

    def _judge(self) -> None:
        last = time.monotonic()
        while not self._ending.wait(self.interval):
            now = time.monotonic()
            if now - last > self.dead_seconds / 2:
                # This process itself stood still, and knows nothing of the others yet.
                self._answered = self._moved = now
                for rank in self._others.values():
                    rank.pardon(now)
            elif verdict := self._verdict(now):
                self._end(verdict)
            last = now

    def _verdict(self, now: float) -> str | None:
        if self._others and (lost := self._lost(now)):
            return lost
        if self._place is None or now - self._moved < self.hang_seconds or self._left is not None:
            return None
        places = {f"rank {self.rank}": self._place, **{r.name: r.place for r in self._others.values() if r.place}}
        least = min(place[0] for place in places.values())
        behind = [name for name, place in places.items() if place[0] == least]
        who = "every rank stands" if len(behind) == len(places) > 1 else f"{' and '.join(behind)} stands"
        _, step, phase = places[behind[0]]
        self._with_stacks = True
        return (
            f"no progress for {now - self._moved:.0f} s (faults.timeout_minutes): {who} still at step {step}, {phase}; "
            f"this rank is at step {self._place[1]}, {self._place[2]}"
        )

    def _lost(self, now: float) -> str | None:
        if self.rank != 0 and (self._store_error or now - self._answered > self.dead_seconds):
            zero = self._others[0]
            if zero.left == "":
                return None
            silence = f"no sign of life for {now - self._answered:.0f} s"
            why = zero.left or (f"it does not answer ({self._store_error})" if self._store_error else silence)
            return f"rank 0 ({zero.where}) is lost: {why}"
        silent = [r for r in self._others.values() if r.left is None and now - r.at > self.dead_seconds]
        failed = [r for r in self._others.values() if r.left and now - r.at > self.dead_seconds]
        if self._failing:  # it leaves by itself soon; where both met a RuntimeError, neither explains the other's
            failed = [r for r in failed if r.failing_since is None]
        if silent:
            return "; ".join(f"{r.name} ({r.where}) is lost: no sign of life for {now - r.at:.0f} s" for r in silent)
        if failed:
            return "; ".join(f"{r.name} ({r.where}) has ended: {r.left}" for r in failed)
        return None

    def _end(self, verdict: str) -> None:
        if self._left is not None:  # the main thread has come to its own end meanwhile
            return
        try:
            say(f"rank {self.rank} ends: {verdict}")
            if self._with_stacks:
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
            sys.stdout.flush()
        finally:  # whoever read it may be gone
            os._exit(EXIT_RANK_LOST)

    def _start(self, target) -> threading.Thread:
        thread = threading.Thread(target=target, name=f"watchdog {target.__name__}", daemon=True)
        thread.start()
        return thread


class _Rank:
    """What is known of another rank. `at`: when it last said something new, by this rank's clock."""

    def __init__(self, name: str):
        self.name = name
        self.where, self.place, self.left = "never heard of", None, None
        self.failing_since: float | None = None
        self.at = time.monotonic()
        self._said = b""

    def heard(self, said: bytes) -> None:
        if said == self._said:
            return
        self._said = said
        found = json.loads(said)
        self.where, self.place = found["where"], found["place"]
        if self.left is not None:  # what it says after that is no news
            return
        self.left, self.at = found["left"], time.monotonic()
        if found["failing"]:
            self.failing_since = self.failing_since or self.at
            if self.left:  # it has waited for a while already before it left
                self.at = self.failing_since

    def pardon(self, now: float) -> None:
        self.at = max(self.at, now)


def _may_be_a_lost_peer(error: BaseException) -> bool:
    """Gloo reports a lost connection as a plain RuntimeError, NCCL as a DistError."""
    return type(error) is RuntimeError or isinstance(error, torch.distributed.DistError)
