"""Microbenchmarks of the kernels: time, memory, and the share of what the chip could do.

    python -m benchmarks.kernels [--json] [--device cuda] [--out DIR] [--batches 64 512] [--lengths 65536] [--seconds 1]

Contenders of one shape are timed in turns. Operations and bytes are counted from the shape: with N = B + M columns, one
matrix product of a direction is 2 B N D operations; the loss needs two (model, teacher) for its value and three more
for its gradient, and each pass reads both banks once. The limit is the larger of operations / measured matrix rate and
bytes / measured copy bandwidth; "of limit" is the limit over the measured time. On a CPU the PyTorch forms alone are
timed.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from benchmarks import kernel_rivals, measure

COLUMNS = ["B", "M", "pass", "contender", "ms", "20 %", "80 %", "times eager", "peak MB", "of limit"]
SAMPLER_COLUMNS = ["B", "contender", "ms", "20 %", "80 %", "times loop"]
BATCHES = (16, 64, 128, 256, 512, 1024)
LENGTHS = (4096, 16384, 65536, 262144)
CPU_NOTE = "This is a CPU: the PyTorch forms alone are timed. The Triton kernels are not measured here."


def cost(batch: int, length: int, dim: int, with_grad: bool, element: int) -> tuple[float, float]:
    """(operations, bytes) that the loss cannot do without, both directions; banks of `element` bytes a number."""
    columns = batch + length
    products = 5 if with_grad else 2
    passes = 2 if with_grad else 1
    return 2.0 * products * 2 * batch * columns * dim, 2.0 * passes * columns * dim * element


def bench_losses(device, batches, lengths, dim, seconds, limits, say) -> list[dict]:
    """One row per shape, pass and contender. A contender that fails (memory, say) has a row that says so."""
    rows, contenders = [], kernel_rivals.losses(device)
    for batch, length in ((b, m) for m in lengths for b in batches):
        problem = kernel_rivals.Problem(batch, length, dim, device)
        for with_grad in (False, True):
            calls, peaks = {}, {}
            head = {"B": batch, "M": length, "D": dim, "pass": "forward + backward" if with_grad else "forward"}
            for name, build in contenders.items():
                try:
                    calls[name] = build(problem, with_grad)
                    calls[name]()
                    peaks[name] = measure.peak_memory(calls[name], device)
                except Exception as error:  # a rival's failure is a result, not the end of the benchmark
                    calls.pop(name, None)
                    rows.append(head | {"contender": name, "error": f"{type(error).__name__}: {error}"[:300]})
            if not calls:
                continue
            samples = measure.interleaved(calls, device, seconds * len(calls))
            for name, times in samples.items():
                row = head | {"contender": name} | timing(times)
                if "eager fp32" in samples:
                    row["ratio"] = measure.ratio(samples["eager fp32"], times)
                    row["times eager"] = row["ratio"]["median"]
                row["peak bytes"], row["peak MB"] = peaks[name], peaks[name] and peaks[name] / 2**20
                if name.startswith("ours"):
                    kind = "bf16" if "bf16" in name else "fp32"
                    flops, traffic = cost(batch, length, dim, with_grad, 2 if kind == "bf16" else 4)
                    limit = max(flops / limits[f"{kind} FLOP/s"], traffic / limits["copy bytes/s"]) * 1e3
                    row |= {"FLOPs": flops, "bytes": traffic, "limit ms": limit, "of limit": limit / row["ms"]}
                rows.append(row)
                say(f"B={batch} M={length} {row['pass']}: {name} {row['ms']:.4g} ms")
    return rows


def bench_samplers(device, batches, seconds, say) -> list[dict]:
    """One row per batch and contender, one direction."""
    rows = []
    for batch in batches:
        logits = torch.randn(batch, batch, device=device) * 5
        calls = kernel_rivals.samplers(logits)
        samples = measure.interleaved(calls, device, seconds)
        loop = samples["loop of multinomial().item()"]
        for name, times in samples.items():
            ratio = measure.ratio(loop, times)
            rows.append({"B": batch, "contender": name, **timing(times), "ratio": ratio, "times loop": ratio["median"]})
            say(f"sampler B={batch}: {name} {rows[-1]['ms']:.4g} ms")
    return rows


def timing(samples) -> dict:
    """The columns of a row that hold times."""
    found = measure.summary(samples)
    return {"ms": found["median"], "20 %": found["q20"], "80 %": found["q80"], "samples": found["count"]}


def run(device, batches, lengths, dim=256, seconds=1.0, say=lambda line: None) -> dict:
    """The whole benchmark as one JSON-able object."""
    limits = {"copy bytes/s": measure.copy_bandwidth(device)}
    limits |= {f"{k} FLOP/s": measure.matmul_rate(device, d) for k, d in KINDS.items()}
    result = {"environment": measure.environment(device), "limits": limits, "dim": dim}
    result["note"] = CPU_NOTE if device.type == "cpu" else ""
    result["loss"] = bench_losses(device, batches, lengths, dim, seconds, limits, say)
    result["sampler"] = bench_samplers(device, batches, seconds, say)
    return result


KINDS = {"bf16": torch.bfloat16, "fp32": torch.float32}


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
    failed = [f"B={r['B']} M={r['M']} {r['pass']}: {r['contender']} failed: {r['error']}" for r in result["loss"] if "error" in r]  # fmt: skip  # noqa: E501
    timed = [row for row in result["loss"] if "error" not in row]
    parts = ["## Queue-contrastive loss", measure.table(timed, COLUMNS), *failed]
    parts += ["## Hard negatives, one direction", measure.table(result["sampler"], SAMPLER_COLUMNS)]
    return "\n".join(head) + "\n\n" + "\n\n".join(parts) + "\n"


def plot(result: dict, path: Path) -> None:
    """Milliseconds of forward and backward over B, one panel per M."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in result["loss"] if "ms" in row and row["pass"] != "forward"]
    lengths = sorted({row["M"] for row in rows})
    figure, panels = pyplot.subplots(1, len(lengths), figsize=(4.5 * len(lengths), 4), squeeze=False, sharey=True)
    for panel, length in zip(panels[0], lengths, strict=True):
        for name in dict.fromkeys(row["contender"] for row in rows):
            points = [(row["B"], row["ms"]) for row in rows if row["contender"] == name and row["M"] == length]
            panel.loglog(*zip(*points, strict=True), marker="o", label=name) if points else None
        panel.set(title=f"queue of {length:,}", xlabel="batch")
    panels[0][0].set_ylabel("ms, forward + backward")
    panels[0][-1].legend(fontsize=7)
    figure.suptitle(f"Queue-contrastive loss on {result['environment']['device']}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv=None) -> int:
    """The command line in this file's head."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON in place of the tables")
    parser.add_argument("--device", help="cuda, cuda:1 or cpu; default: the GPU if there is one")
    parser.add_argument("--out", type=Path, help="also write kernels.json, kernels.md and kernels.png into this folder")
    parser.add_argument("--batches", type=int, nargs="+", help=f"default {BATCHES}; on a CPU 16 64")
    parser.add_argument("--lengths", type=int, nargs="+", help=f"default {LENGTHS}; on a CPU 4096")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=1.0, help="timing per contender and shape")
    args = parser.parse_args(argv)
    device = measure.pick_device(args.device)
    if device.type == "cpu":
        print(CPU_NOTE, file=sys.stderr)
    batches = args.batches or (BATCHES if device.type == "cuda" else (16, 64))
    lengths = args.lengths or (LENGTHS if device.type == "cuda" else (4096,))
    result = run(
        device, batches, lengths, args.dim, args.seconds, lambda line: print(line, file=sys.stderr, flush=True)
    )
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "kernels.json").write_text(json.dumps(result, indent=1) + "\n")
        (args.out / "kernels.md").write_text(markdown(result))
        plot(result, args.out / "kernels.png")
    print(json.dumps(result, indent=1) if args.json else markdown(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
