"""What `benchmarks.kernels` leaves: its rows as one object, as a page, and as curves."""

import json
from pathlib import Path

from albef_ds.data.files import write_atomically
from benchmarks import measure

TIMES = ["ms", "20 %", "80 %", "host ms", "host-bound"]
COLUMNS = ["B", "M", "pass", "contender", *TIMES, "times eager", "peak MB", "of limit"]
SAMPLER_COLUMNS = ["B", "contender", *TIMES, "times loop"]


def result_of(rows: list[dict]) -> dict:
    """The benchmark as one object, from the rows of its last run: whole, or what one that was stopped had measured."""
    start = max(i for i, row in enumerate(rows) if row["kind"] == "machine")
    machine, *rest = ({**row} for row in rows[start:])
    result = {name: machine[name] for name in ("environment", "limits", "dim", "note")}
    result["loss"], result["sampler"] = ([row for row in rest if row["kind"] == k] for k in ("loss", "sampler"))
    measured = {row["job"] for row in rest}
    result["not measured"] = [job for job in machine["planned"] if job not in measured]
    return result


def markdown(result: dict) -> str:
    """The result as a page: where, limits, both tables."""
    at, limits = result["environment"], result["limits"]
    head = [f"# Kernels on {at['device']}", "", f"Commit {at['commit']}, {at['time']}, packages {at['packages']}."]
    head += [f"Driver {at['driver']}, CUDA {at['cuda']}, clocks {at['clocks']}."] if "driver" in at else []
    head += [result["note"]] if result["note"] else []
    head.append(
        f"Measured limits: copy {limits['copy bytes/s'] / 1e9:.4g} GB/s, bf16 {limits['bf16 FLOP/s'] / 1e12:.4g}, "
        f"fp32 {limits['fp32 FLOP/s'] / 1e12:.4g} TFLOP/s. D = {result['dim']}. Milliseconds are medians."
    )
    parts = []
    for title, kind, columns in (
        ("## Queue-contrastive loss", "loss", COLUMNS),
        ("## Hard negatives, one direction", "sampler", SAMPLER_COLUMNS),
    ):
        parts += [title, measure.table([row for row in result[kind] if "error" not in row], columns)]
        failed = [row for row in result[kind] if "error" in row]
        parts += [f"{row['job']}: {row['contender']} failed: {row['error']}" for row in failed]
    if result["not measured"]:
        parts += ["## Not measured", "\n".join(f"- {job}" for job in result["not measured"])]
    return "\n".join(head) + "\n\n" + "\n\n".join(parts) + "\n"


def plot(result: dict, path: Path) -> None:
    """Milliseconds of forward and backward over B, one panel per M."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in result["loss"] if "ms" in row and row["pass"] != "forward"]
    if not rows:
        return
    lengths = sorted({row["M"] for row in rows})
    figure, panels = pyplot.subplots(1, len(lengths), figsize=(4.5 * len(lengths), 4), squeeze=False, sharey=True)
    for panel, length in zip(panels[0], lengths, strict=True):
        for name in dict.fromkeys(row["contender"] for row in rows):
            points = sorted((row["B"], row["ms"]) for row in rows if (row["contender"], row["M"]) == (name, length))
            panel.loglog(*zip(*points, strict=True), marker="o", label=name) if points else None
        panel.set(title=f"queue of {length:,}", xlabel="batch")
    panels[0][0].set_ylabel("ms, forward + backward")
    panels[0][-1].legend(fontsize=7)
    figure.suptitle(f"Queue-contrastive loss on {result['environment']['device']}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def publish(result: dict, folder: Path) -> None:
    """Writes both pages, and the curves where there are any."""
    write_atomically(folder / "kernels.json", json.dumps(result, indent=1) + "\n")
    write_atomically(folder / "kernels.md", markdown(result))
    if not result["not measured"]:
        plot(result, folder / "kernels.png")
