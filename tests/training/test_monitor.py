"""What a monitor writes, that it does not ask the device for more than it must, and that a resumed run fits on."""

import json
import logging
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from albef_ds.training.monitor import Monitor
from albef_ds.training.peak_flops import peak_flops_by_name, peak_flops_of, peak_flops_source


def make(folder, **changes):
    settings = {"rank": 0, "total_steps": 10, "samples_per_step": 4, "log_every": 5, "progress": False}
    return Monitor(folder, **(settings | changes))


def run(monitor, first, last):
    for step in range(first, last + 1):
        monitor.data_wait(0.0)
        monitor.log(step, {"itc": torch.tensor(float(step)), "itm": torch.tensor(0.5)}, {"lr": step * 1e-3})


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class HostReads(TorchDispatchMode):
    """Counts how often a tensor's value was asked for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_lines_hold_window_means_and_the_latest_rates(tmp_path):
    monitor = make(tmp_path)
    temperature = torch.nn.Parameter(torch.tensor([0.07]))
    for step in range(1, 11):
        values = {"lr": step * 1e-3, "alpha": 0.1 * step, "temperature": temperature, "grad_norm": float(step)}
        values["mi_bound_i2t"] = torch.tensor(2.0 * step)
        monitor.log(step, {"itc": torch.tensor(float(step), requires_grad=True), "itm": torch.tensor(0.5)}, values)
        with torch.no_grad():
            temperature += 0.01
    monitor.close()
    first, second = lines(tmp_path)
    assert (first["step"], second["step"]) == (5, 10)
    assert first["losses"] == {"itc": 3.0, "itm": 0.5, "total": 3.5}
    assert second["losses"]["itc"] == 8.0
    assert (second["lr"], second["alpha"]) == (0.01, 1.0)
    assert second["temperature"] == pytest.approx(0.16)  # as the last step used it, not as it was moved since
    assert (second["grad_norm"], second["mi_bound_i2t"]) == (8.0, 16.0)
    assert first["mfu"] is None
    assert first["memory_gib"] > 0


def test_the_device_is_read_only_when_a_line_is_written(tmp_path):
    monitor = make(tmp_path, total_steps=100)
    with HostReads() as reads:
        for step in range(1, 5):
            monitor.log(step, {"itc": torch.ones(())}, {"grad_norm": torch.ones(1), "temperature": torch.ones(1)})
        assert reads.count == 0
        monitor.log(5, {"itc": torch.ones(())}, {"grad_norm": torch.ones(1), "temperature": torch.ones(1)})
        assert reads.count == 3


def test_values_overwritten_in_place_after_logging_do_not_change_the_mean(tmp_path):
    monitor = make(tmp_path, log_every=2)
    static = torch.zeros(())
    for step in (1, 2):
        static.fill_(step)
        monitor.log(step, {"itc": static})
    monitor.close()
    assert lines(tmp_path)[0]["losses"]["itc"] == 1.5


def test_resuming_writes_each_step_once_despite_a_half_written_line(tmp_path):
    killed = make(tmp_path, log_every=1)
    run(killed, 1, 6)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "losses": {"it')
    resumed = make(tmp_path, log_every=1, start_step=4)
    run(resumed, 5, 10)
    resumed.close()
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 11))
    assert [line["losses"]["itc"] for line in lines(tmp_path)] == list(range(1, 11))


def test_flushing_at_a_checkpoint_gives_a_resumed_run_the_same_windows(tmp_path):
    def means(folder):
        return [(line["step"], line["window"], line["losses"]["itc"]) for line in lines(folder)]

    whole = make(tmp_path / "whole")
    run(whole, 1, 7)
    whole.flush()
    run(whole, 8, 10)
    whole.close()

    killed = make(tmp_path / "killed")
    run(killed, 1, 7)
    killed.flush()
    run(killed, 8, 9)
    resumed = make(tmp_path / "killed", start_step=7)
    run(resumed, 8, 10)
    resumed.close()
    assert means(tmp_path / "whole") == means(tmp_path / "killed") == [(5, 5, 3.0), (7, 2, 6.5), (10, 3, 9.0)]


def test_a_new_run_in_an_old_folder_starts_from_nothing(tmp_path):
    run(make(tmp_path), 1, 10)
    make(tmp_path).close()
    assert lines(tmp_path) == []


def test_not_a_number_is_named_and_the_file_stays_json(tmp_path):
    monitor = make(tmp_path, log_every=1)
    monitor.log(1, {"itc": torch.tensor(math.nan), "itm": torch.tensor(1.0)}, {"grad_norm": math.inf})
    monitor.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert line["losses"] == {"itc": None, "itm": 1.0, "total": None}
    assert line["grad_norm"] is None
    assert set(line["nonfinite"]) == {"itc", "total", "grad_norm"}


def test_rates_come_from_the_clock(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monitor = make(tmp_path, total_steps=40, flops_per_step=1e9, peak_flops=4e9, samples_per_step=8)
    for step in range(1, 21):
        now[0] += 0.125
        monitor.data_wait(0.125)
        now[0] += 0.375 if step > 5 else 3.875  # the first window is slow: it warms up
        monitor.log(step, {"itc": torch.zeros(())})
        if step == 10:
            with monitor.paused():
                now[0] += 1000.0
    last = lines(tmp_path)[-1]
    assert last["samples_per_s"] == pytest.approx(16.0)
    assert last["data_wait"] == pytest.approx(0.25)
    assert last["mfu"] == pytest.approx(0.5)
    assert last["eta_s"] == pytest.approx(20 * (5 * 4.0 + 15 * 0.5) / 20)
    summary = monitor.close()
    assert summary["samples_per_s"] == pytest.approx(16.0)
    assert summary["seconds"] == pytest.approx(5 * 4.0 + 15 * 0.5)
    assert (summary["steps"], summary["samples"], summary["data_wait"]) == (20, 160, pytest.approx(0.25))
    assert summary["mfu"] == pytest.approx(0.5)


def test_without_a_terminal_a_line_is_printed_per_interval(tmp_path, capsys):
    run(make(tmp_path, progress=None), 1, 10)  # pytest's stdout is none
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2
    assert printed[0].startswith("step 5/10  itc 3.0000  itm 0.5000  total 3.5000  lr 5.00e-03")
    assert "samples/s" in printed[0] and "ETA 0:00:0" in printed[0]


def test_progress_bar_resumes_where_the_run_does(tmp_path, capsys):
    monitor = make(tmp_path, progress=True, start_step=4)
    run(monitor, 5, 10)
    monitor.close()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "4/10" in captured.err and "10/10" in captured.err and "itc 8.0000" in captured.err


def test_tensorboard_events_hold_every_series(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(monitor := make(tmp_path), 1, 10)
    monitor.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"loss/itc", "loss/total", "train/lr", "train/samples_per_s", "train/eta_s"} <= set(events.Tags()["scalars"])
    assert [(event.step, event.value) for event in events.Scalars("loss/itc")] == [(5, 3.0), (10, 8.0)]


def test_tensorboard_forgets_what_a_killed_run_did_after_the_checkpoint(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    killed = make(tmp_path, total_steps=20)
    run(killed, 1, 15)
    killed._events.flush()
    resumed = make(tmp_path, total_steps=20, start_step=5)
    run(resumed, 6, 10)
    resumed.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss/itc")] == [5, 10]


def test_other_ranks_write_no_metrics_and_read_nothing(tmp_path, capsys):
    monitor = make(tmp_path, rank=1)
    with HostReads() as reads:
        run(monitor, 1, 10)
        monitor.flush()
    assert monitor.close() == {}
    assert reads.count == 0
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_rejected_samples_of_all_ranks_are_listed_once_and_warned_about_sparingly(tmp_path, caplog):
    first, second = make(tmp_path), make(tmp_path, rank=1)
    with caplog.at_level(logging.WARNING):
        first.rejected([("a.jpg", "truncated"), ("b.jpg", "missing")])
        first.rejected((("a.jpg", "truncated"),))  # a second epoch meets it again
        second.rejected([(f"{n}.jpg", "empty") for n in range(150)])
    listed = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert listed[0] == {"key": "a.jpg", "reason": "truncated", "rank": 0, "step": 0}
    assert len(listed) == 152
    assert first.rejected_count == 3
    assert len(caplog.records) == 3  # one of rank 0, the 1st and the 101st of rank 1
    assert "a.jpg rejected (truncated)" in caplog.text and "rejected.jsonl" in caplog.text
    assert first.close()["rejected"] == 152
    again = make(tmp_path, start_step=5)
    again.rejected([("a.jpg", "truncated")])
    assert again.close()["rejected"] == 152
    assert len((tmp_path / "rejected.jsonl").read_text().splitlines()) == 152


def test_log_every_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="log_every is 0"):
        make(tmp_path, log_every=0)


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835.5e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 9999", None),
    ],
)
def test_peak_flops_by_name(name, flops):
    assert peak_flops_by_name(name) == flops


def test_peak_flops_of_a_cpu_is_measured_and_says_so():
    assert 1e8 < peak_flops_of("cpu") < 1e14
    assert "measured" in peak_flops_source("cpu")
