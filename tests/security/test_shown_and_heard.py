"""What hostile text looks like where it is shown, and where a run listens."""

from __future__ import annotations

import json
import logging

import torch

from albef_ds.data.pack_sources import read_entries
from albef_ds.training.monitor import Monitor
from tests.ranks import run_ranks

# -- text that is shown ------------------------------------------------------------------------------------------------


FORMULA = '=HYPERLINK("http://a.example","x")'
HOSTILE = (
    FORMULA,
    "+1+cmd|' /C calc'!A0",
    "<script>alert(1)</script>",
    "a\nstep 9 forged\x1b[2J\u2028\x85.jpg",
    "half \ud83d",
)


def test_hostile_names_stay_one_line_of_json_and_never_reach_tensorboard_or_the_terminal_as_they_are(tmp_path, caplog):
    monitor = Monitor(tmp_path, rank=0, total_steps=2, samples_per_step=1, log_every=1, progress=False)
    with caplog.at_level(logging.WARNING):
        for number, name in enumerate(HOSTILE):
            monitor.rejected_count = 100 * number  # every hundredth is logged
            monitor.rejected([(name, f"{name} cannot be decoded")])
    monitor.log(1, {"itc": torch.tensor(1.0)}, {"lr": 1e-3})
    assert monitor.close()["rejected"] == len(HOSTILE)
    lines = (tmp_path / "rejected.jsonl").read_text(encoding="ascii").splitlines()
    assert [json.loads(line)["key"] for line in lines] == list(HOSTILE)
    events = b"".join(p.read_bytes() for p in (tmp_path / "tensorboard").iterdir())
    assert events and not any(word in events for word in (b"HYPERLINK", b"calc", b"script", b"forged"))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(HOSTILE) and all(text.isprintable() for text in said)
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".csv", ".tsv", ".xlsx")]  # nothing for a spreadsheet


def test_an_entry_that_is_a_text_is_no_entry(tmp_path):
    """Found by fuzzing: a list's own text was taken for the reason of its rejection, an empty one for an image."""
    (tmp_path / "list.json").write_text('["", "sound"]')
    faults = [entry.fault for entry in read_entries(tmp_path / "list.json")]
    assert faults == ["expected an object, found a string"] * 2


# -- what listens ------------------------------------------------------------------------------------------------------


def listening(_: None = None) -> list[str]:
    """Where this process listens while it trains with others."""
    import psutil
    import torch.distributed as dist

    from albef_ds.training.engine import init_distributed
    from albef_ds.training.watchdog import Watchdog

    init_distributed()
    with Watchdog(dead_seconds=20, timeout_minutes=2):
        dist.all_reduce(torch.ones(1))
        found = [c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
        dist.barrier()
    return found


def test_ranks_of_one_machine_listen_where_no_other_machine_can_reach_them():
    first, second = run_ranks(2, listening)
    assert len(first) >= 3 and len(second) >= 1  # rendezvous, signs of life, Gloo
    assert {*first, *second} <= {"127.0.0.1", "::1"}
