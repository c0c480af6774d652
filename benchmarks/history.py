"""The measurements of benchmarks/results over time, as a table and a plot."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import measure

FOLDER = Path(__file__).parent / "results"
COLUMNS = ["time", "commit", "device", "what", "median", "low", "high"]


def add(folder: Path, found: dict) -> Path:
    """Keeps one measurement of benchmarks.regress under its device, time and commit."""
    environment = found["environment"]
    stamp = environment["time"].replace(":", "").replace("-", "")
    path = folder / f"regress-{found['device']}-{stamp}-{environment['commit'].rstrip('+')}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    return path


def rows(folder: Path) -> list[dict]:
    """One row per time ratio and per FLOP ratio of every measurement, oldest first. Other files are passed over."""
    found = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or not {"counts", "times", "environment"} <= content.keys():
            continue
        environment = content["environment"]
        head = {"time": environment["time"], "commit": environment["commit"], "device": environment["device"]}
        for name, ratio in content["times"].items():
            found.append({**head, "what": f"time: {name}", **{k: ratio[k] for k in ("median", "low", "high")}})
        for name, value in content["counts"].items():
            if name.startswith("FLOP of the reference"):
                found.append({**head, "what": name, "median": value, "low": value, "high": value})
    return sorted(found, key=lambda row: row["time"])


def render(folder: Path) -> str:
    """The table; the plot goes into folder/history.png."""
    found = rows(folder)
    if not found:
        return "No measurements yet: python -m benchmarks.regress --results benchmarks/results keeps one."
    plot(found, folder / "history.png")
    return measure.table(found, COLUMNS)


def plot(found: list[dict], path: Path) -> None:
    """Ratios to the reference over measurements, one line per device and quantity; below 1 is better."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5))
    times = sorted({row["time"] for row in found})
    for device, what in sorted({(row["device"], row["what"]) for row in found}):
        mine = [row for row in found if (row["device"], row["what"]) == (device, what)]
        x = [times.index(row["time"]) for row in mine]
        spread = [[r["median"] - r["low"] for r in mine], [r["high"] - r["median"] for r in mine]]
        axes.errorbar(x, [r["median"] for r in mine], yerr=spread, marker="o", capsize=3, label=f"{device}: {what}")
    commits = {row["time"]: f"{row['time'][:10]}\n{row['commit'][:8]}" for row in found}
    axes.set_xticks(range(len(times)), [commits[time] for time in times], fontsize=7)
    axes.set(ylabel="ours / reference", ylim=(0, 1.1), title="Step against the reference implementation")
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
