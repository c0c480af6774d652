"""Times a short list of tiles on the GPU at hand and remembers the fastest, per shape and kind of device.

    python -m albef_ds.kernels.tuning --batch 64 --length 65536 --dim 256 --dtype bf16 [--ids] [--seconds 60]

The list is bounded and so is the time. A candidate that does not compile or does not fit the chip is skipped. The
result goes into the file that `launch.cache_file` names, and every later run on such a device uses it; removing the
file brings the defaults back.
"""

import argparse
import itertools
import statistics
import time

import torch
import triton

from albef_ds.kernels import launch, queue_contrastive_loss
from albef_ds.kernels.launch import Plan, Tile, choose_splits

HEAD_START = 5_000_000  # cycles of the GPU, some two to four milliseconds: several times what queueing a call takes
NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def candidates(default: Plan, batch: int, length: int, dim: int, slots: int) -> list[Plan]:
    """At most 32 plans around `default`, which comes first: tiles of both passes, warps, stages, programs per chip."""
    plans = [default]
    first = default.gradient
    rows = {default.gradient.block_m, 64} if first.precision == "ieee" else {first.block_m}
    for block_m, block_n, warps, stages in itertools.product(sorted(rows), (32, 64), (4, 8), (2, 3)):
        changed = dict(block_m=block_m, block_n=block_n, warps=warps, stages=stages)
        tiles = [Tile(**(vars(tile) | changed)) for tile in (default.statistics, default.gradient)]
        groups = 2 * -(-batch // block_m) * tiles[1].chunks(dim)
        for share in (1, 2):
            splits = choose_splits(groups, -(-length // block_n), slots * share)
            plans.append(Plan(*tiles, splits))
    return list(dict.fromkeys(plans))[:32]


def time_plan(call, repeats: int = 30) -> float:
    """Median milliseconds of `call`, the chip's cache overwritten each time; infinite if it cannot be run.

    The GPU is kept busy until the host has queued the call: else launching would be timed, the same for every plan.
    """
    try:
        call()
        flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
        return statistics.median(_time_once(call, flush) for _ in range(repeats))
    except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError, RuntimeError):
        return float("inf")


def _time_once(call, flush) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    torch.cuda._sleep(HEAD_START)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def tune(
    batch, length, dim, dtype, with_ids=False, seconds=60.0, clock=time_plan, device="cuda", say=lambda plan, time: None
) -> tuple[Plan, dict]:
    """(fastest plan, {plan: milliseconds}) for forward and gradient at one shape.

    `clock` maps a call to its milliseconds, `say` is told of each. Stops at `seconds`; the default plan is always timed
    first. The fastest so far is in the cache file at any time: whatever stops the tuning, it stays.
    """
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(0)

    def unit(rows):
        x = torch.randn(rows, dim, device=device, generator=generator)
        return torch.nn.functional.normalize(x, dim=-1).to(dtype)

    tensors = [unit(batch) for _ in range(4)] + [unit(length) for _ in range(2)]
    for feat in tensors[:2]:
        feat.requires_grad_()
    temperature = torch.full((1,), 0.07, device=device, requires_grad=True)
    ids = (torch.arange(batch, device=device), torch.arange(length, device=device)) if with_ids else (None, None)
    slots = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    key = (dtype, batch, length, dim, with_ids)
    default = launch.default_plan(device, *key)
    results, deadline = {}, time.monotonic() + seconds
    try:
        for plan in candidates(default, batch, length, dim, slots):
            if results and time.monotonic() > deadline:
                break
            launch.force(key, plan)
            results[plan] = clock(lambda: queue_contrastive_loss(*tensors, temperature, 0.4, *ids, impl="triton"))
            say(plan, results[plan])
            if plan == min(results, key=results.get):
                launch.remember(launch.tuning_key(name, *key), plan)
    finally:
        launch.force()
    return min(results, key=results.get), results


def main(argv=None) -> int:
    """The command line in this file's head."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--length", type=int, required=True, help="rows of the queue")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--dtype", choices=NAMES, default="bf16")
    parser.add_argument("--ids", action="store_true", help="positives by ids, as in retrieval fine-tuning")
    parser.add_argument("--seconds", type=float, default=60.0)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("There is no GPU here, and nothing to tune: the defaults in launch.py stand.")
        return 1
    shape = (args.batch, args.length, args.dim, NAMES[args.dtype], args.ids, args.seconds)
    best, results = tune(*shape, say=lambda plan, time: print(f"{time:9.4f} ms  {plan}", flush=True))
    print(f"{results[best]:9.4f} ms  {best}  <- kept, of {len(results)}")
    print(f"written to {launch.cache_file()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
