"""What a GPU will be measured to do, written down before: launches, FLOPs, bytes, and the least time on each card.

    python -m benchmarks.predictions [--out benchmarks/results]

Writes predictions-COMMIT.json from benchmarks.roofline, for whole steps and for the kernels of the loss. The report of
benchmarks.suite puts the newest of them beside what it measures. A time is the least, which a measured one exceeds by
what launching, waiting and small kernels take. A GPU will show other launches where cuDNN or cuBLAS divide an operator,
and of the references more, those of their draws of negatives.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import chips, measure
from benchmarks.roofline import CONTENDERS

FOLDER = Path(__file__).parent / "results"
# Steps that the suite's lanes run: ours with and without flash-attn, the rivals, and the regression check's (where a
# test compares the rivals' too with what is counted now).
STEPS = (
    ("--preset", "base", "--batch", "64", "--captions", "histogram", "--backend", "flash"),
    ("--preset", "base", "--batch", "64", "--captions", "histogram", "--backend", "varlen", "--contenders", "ours"),
    ("--preset", "tiny", "--batch", "8", "--captions", "mean14", "--backend", "flash"),
    ("--preset", "tiny", "--batch", "8", "--captions", "mean14", "--backend", "varlen", "--contenders", "ours"),
)
CASE = ("preset", "batch", "captions")
NOTES = {
    "modernised": ("predicted without compiling and without draws",),
    "reference": ("predicted without draws",),
}


def predict() -> dict:
    """Counts all steps anew.

    Raises:
        RuntimeError: a step could not be counted; says why.
    """
    from benchmarks import counts  # which brings what the suite's report, on a bare machine, may have to do without

    runs = [counts.answer_of("roofline", *arguments) for arguments in STEPS]
    conditions = runs[0]["conditions"]
    found = {key: conditions[key] for key in ("commit", "packages", "rates", "capability")}
    found["time"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    found["steps"] = [row for run in runs for row in _steps(run)]
    found["kernels"] = [row for row in map(_loss, runs) if row["B"] == 64][:1]
    return found


def _steps(run: dict) -> Iterator[dict]:
    case = {key: run["conditions"][key] for key in CASE}
    for name in filter(run.__contains__, CONTENDERS):
        sums = {key: run[name][key] for key in ("launches", "gb", "tflop", "ms")}
        attention = {"attention": run["conditions"]["backend"]} if name == "ours" else {}
        yield {"contender": CONTENDERS[name], **case, **attention, **sums}


def _loss(run: dict) -> dict:
    """The loss's kernels within ours, as benchmarks.kernels times them: fp32 queues, forward and backward."""
    group = run["ours"]["groups"]["ITC kernels"]
    batch, queue = run["conditions"]["batch"], run["conditions"]["queue"]
    head = {"contender": "ours triton fp32", "B": batch, "M": queue, "pass": "forward + backward"}
    return {**head, "launches": group["launches"], "gb": group["gb"], "ms": group["ms"]}


def newest(folder: Path = FOLDER) -> dict | None:
    """The latest predictions of a folder, None where it has none.

    Raises:
        ValueError: a file holds none; names it.
    """
    found = [_read(path) for path in sorted(folder.glob("predictions-*.json"))]
    return max(found, key=lambda predicted: predicted["time"], default=None)


def _read(path: Path) -> dict:
    try:
        found = json.loads(path.read_bytes())
        rows = [*found["steps"], *found["kernels"]]
        texts = [found["commit"], found["time"], *(row["contender"] for row in rows)]
        numbers = [number for row in rows for number in (row["launches"], *row["ms"].values())]
        numbers += [step[name] for step in found["steps"] for name in ("tflop", "batch")]
        texts += [step[name] for step in found["steps"] for name in ("preset", "captions")]
        if not all(isinstance(text, str) for text in texts) or not all(number > 0 for number in numbers):
            raise ValueError("a name is no text, or a number not above 0")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name} holds no predictions ({error!r}): delete it, or write it anew") from None
    return found


def beside(predicted: dict, environment: dict, lanes: list[dict]) -> list[dict]:
    """Every prediction that was measured, with the error: measured over predicted, less one.

    Args:
        environment: of the suite; its device says which card's times are meant, its packages which attention ours had.
        lanes: the suite's, with the rows that each measured.
    """
    card = chips.chip_of(environment["device"])
    if card is None:
        return []
    attention = "flash" if "flash-attn" in environment.get("packages", {}) else "varlen"
    rows = [row for lane in lanes for row in _measured(lane)]
    steps = [step for step in predicted["steps"] if step.get("attention", attention) == attention]
    found = []
    for expected in [*steps, *predicted["kernels"]]:
        key = {name: expected[name] for name in ("contender", *CASE, "B", "M", "pass") if name in expected}
        for row in rows:
            if any(row.get(name) != value for name, value in key.items()):
                continue
            for what, value in _figures(expected, card).items():
                if value is not None and (measured := row.get(what)) is not None:
                    name = ", ".join([what, *map(str, key.values()), *NOTES.get(expected["contender"], ())])
                    found.append({"what": name, "predicted": value, "measured": measured, "lane": row["lane"]})
                    found[-1]["error"] = measured / value - 1
    return found


def _figures(expected: dict, card: str) -> dict[str, float | None]:
    found = {"ms": expected["ms"].get(card), "launches": expected["launches"]}
    if "tflop" in expected:
        found["TFLOP"] = expected["tflop"]
    return found


def _measured(lane: dict) -> Iterator[dict]:
    """A lane's rows under the names of the predictions."""
    rows = [row for row in lane["rows"] if isinstance(row, dict)]
    preset = next((row["preset"] for row in rows if "preset" in row), None)
    for row in rows:
        if row.get("what") == "step" and "median" in row:
            told = {"TFLOP": row["FLOP a sample"] * row["batch"] / 1e12} if "FLOP a sample" in row else {}
            yield {**row, **told, "preset": preset, "ms": row["median"], "lane": lane["lane"]}
        elif row.get("kind") == "loss":
            yield {**row, "lane": lane["lane"]}
        elif "counts" in row:  # of benchmarks.regress
            case = {"contender": "ours bf16", "preset": "tiny", "batch": 8, "captions": "mean14"}
            yield {**case, "launches": row["counts"].get("kernel launches a step"), "lane": lane["lane"]}


def render(found: list[dict]) -> str:
    shown = [{**row, "error": f"{100 * row['error']:+.1f} %"} for row in found]
    return measure.table(shown, ["what", "predicted", "measured", "error", "lane"])


def main(argv=None) -> int:
    """The command line in this file's head."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=measure.folder, default=FOLDER)
    args = parser.parse_args(argv)
    if not measure.commit().isalnum() or measure.commit() == "unknown":
        print("predictions belong to a commit: commit what has changed, then predict", file=sys.stderr)
        return 2
    try:
        predicted = predict()
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"predictions-{predicted['commit']}.json"
    path.write_text(json.dumps(predicted, indent=1) + "\n")
    rows = [
        {"attention": "its own", **row, **{f"ms {card}": ms for card, ms in row["ms"].items()}}
        for row in predicted["steps"]
    ]
    columns = ["contender", "attention", *CASE, "launches", "gb", "tflop", *(f"ms {card}" for card in chips.CHIPS)]
    print(measure.table(rows, columns))
    print(f"written to {path.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
