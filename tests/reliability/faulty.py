"""Runs albef_ds.train in this process with faults put into it.

    python -m tests.reliability.faulty 'JSON LIST OF FAULTS' ARGUMENTS OF albef_ds.train

A fault: {"do": what, "rank": whose, "step": when}, and for some {"until": last step} or {"phase": of the step}. What:
    kill, stop, hang, raise      this process: SIGKILL, SIGSTOP, stand still, an error, while it computes the step
    kill_worker                  SIGKILL to one of its loader processes
    term, usr1, term_again       the signal to itself; twice
    nan, nan_constant, nan_grad  the loss not finite; a NaN without a gradient; a NaN gradient of a finite loss
    spike                        the loss of the samples that this step has, a thousandfold, whenever they come
    report                       says which of PyTorch's settings are in force
    kill_after                   SIGKILL so many "seconds" after the loop began
    wait_for                     stands still until there is a "file"
    evaluate_on                  says "evaluating" and evaluates again and again, between two epochs
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time

import torch

from albef_ds import train
from albef_ds.tasks.pretraining import Pretraining
from albef_ds.training.validation import Validation
from albef_ds.training.watchdog import Watchdog

RANK = int(os.environ["RANK"])
step_now = furthest = 0
spiking: set[str] = set()


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def send_twice() -> None:
    send(signal.SIGTERM)
    time.sleep(0.5)  # one signal that is pending already swallows its like
    send(signal.SIGTERM)


def kill_worker() -> None:
    """Torch hears of it by a signal, at the next line that Python runs, or when it next waits for a batch."""
    multiprocessing.active_children()[0].kill()


def evaluate_on(self, step) -> None:
    print("evaluating", flush=True)
    while True:
        self.evaluate()


def fail() -> None:
    raise LookupError("put in by the test")


def report() -> None:
    found = {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark,
        "workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }
    print("settings", json.dumps(found), flush=True)


ACTIONS = {
    "report": report,
    "kill": lambda: send(signal.SIGKILL),
    "kill_worker": lambda: kill_worker(),
    "stop": lambda: send(signal.SIGSTOP),
    "hang": lambda: time.sleep(3600),
    "raise": fail,
    "term": lambda: send(signal.SIGTERM),
    "usr1": lambda: send(signal.SIGUSR1),
    "term_again": send_twice,
}


def main() -> int:
    faults = [f for f in json.loads(sys.argv[1]) if f.get("rank", RANK) == RANK]
    at, forward = Watchdog.at, Pretraining.forward

    def faulty_at(self, step, phase):
        global step_now, furthest
        if step_now == 0:
            for fault in faults:
                if fault["do"] == "kill_after":
                    threading.Timer(fault["seconds"], ACTIONS["kill"]).start()
        step_now, furthest = step, max(step, furthest)
        at(self, step, phase)
        for fault in list(faults):
            if fault["do"] in ACTIONS and fault["step"] == step and phase == fault.get("phase", "computing"):
                faults.remove(fault)
                ACTIONS[fault["do"]]()
            elif fault["do"] == "wait_for" and fault["step"] == step:
                while not os.path.exists(fault["file"]):
                    time.sleep(0.02)

    def faulty_forward(self, batch):
        losses = forward(self, batch)
        for fault in faults:
            now = "step" in fault and fault["step"] <= step_now <= fault.get("until", fault["step"])
            itc = losses["itc"]
            if fault["do"] == "nan" and now:
                losses["itc"] = itc * math.nan
            elif fault["do"] == "nan_constant" and now:
                losses["itc"] = itc + math.nan
            elif fault["do"] == "nan_grad" and now:
                itc.register_hook(lambda grad: grad * math.nan)
            elif fault["do"] == "spike":
                if now and step_now == furthest:  # not when a roll-back comes by again
                    spiking.update(batch.keys)
                if spiking.intersection(batch.keys):
                    losses["itc"] = itc * 1000
        return losses

    Watchdog.at, Pretraining.forward = faulty_at, faulty_forward
    if any(fault["do"] == "evaluate_on" for fault in faults):
        Validation.after_step = evaluate_on
    return train.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
