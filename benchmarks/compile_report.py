"""Compiles every kernel in its default configurations for sm_80, 86, 89 and 90; needs no GPU and no driver.

    python -m benchmarks.compile_report [--quick] [--arch 80 86 89 90 100 120] [--json]

Reports registers, shared memory, spills, matrix instructions and asynchronous copies, read from the machine code. The
exit status is 1 if a kernel spills registers, needs more shared memory than the chip has, or, where it multiplies
matrices, leaves the tensor cores unused; likewise if a half-precision kernel of a usual D copies nothing ahead.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import measure

COLUMNS = ["kernel", "arch", "dtype", "D", "B", "ids", "tile", "registers", "shared KB", "spills", "matrix", "async"]
ARCHS = (80, 86, 89, 90, 100, 120)  # those of launch.SHARED_MEMORY, which this file must not import before its time
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
FEATURES = ("image", "text", "image_m", "text_m", "image_queue", "text_queue")
INTEGERS = ("B", "M", "per_split", "splits", "stride_row", "stride_column")


def compile_kernel(kernel, types: dict, constants: dict, arch: int, aligned=(), **options) -> dict:
    """Resources and instruction counts of one kernel for one chip.

    `types` gives Triton's type name of each argument not in `constants`; `aligned` names those known divisible by 16,
    as tensors of the allocator are.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else types[name] for name in names},
        constexprs=constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def dump(what):
            done = subprocess.run([str(tool), what, file.name], capture_output=True, text=True, check=True)
            return done.stdout

        usage, code = dump("--dump-resource-usage"), dump("--dump-sass")

    def count(*instructions):
        return sum(len(re.findall(rf"\b{name}\b", code)) for name in instructions)

    return {
        "registers": int(re.search(r"\bREG:(\d+)", usage)[1]),
        "shared bytes": compiled.metadata.shared,
        "spills": count("STL", "LDL"),
        "matrix": count("HGMMA", "HMMA", "UTCHMMA"),
        "async": count("LDGSTS", "UTMALDG"),
    }


def shapes(quick: bool, scarce: bool):
    """(dtype, D, B, positives by ids) to compile; of a quick report where shared memory is scarce, what needs most."""
    if not quick:
        return itertools.product(DTYPES, (24, 64, 256, 512), (16, 64), (False, True))
    return [("bf16", 512, 64, False)] if scarce else itertools.product(("bf16", "fp32"), (256,), (64,), (False, True))


def contrastive_cases(arch: int, quick: bool):
    """(row's head, kernel, types, constants, options, must use tensor cores) of the loss's kernels."""
    import torch
    import triton

    from albef_ds.kernels import launch
    from albef_ds.kernels import queue_contrastive_kernels as kernels

    scarce = launch.SHARED_MEMORY[arch] == launch.SMALLEST
    for dtype, dim, batch, ids in shapes(quick, scarce):
        tiles = launch.default_tiles(arch, getattr(torch, DTYPES[dtype]), batch, dim, ids)
        for kernel, tile in zip((kernels.statistics, kernels.gradient), tiles, strict=True):
            options = tile.options(dim)
            launched = {name: options.pop(name) for name in ("num_warps", "num_stages")}
            constants = options | dict(D=dim, HAS_IDS=ids, HAS_QUEUE_IDS=ids, UPCAST=False)
            types = {name: f"*{dtype}" for name in FEATURES}
            types |= {name: "*i64" if ids else f"*{dtype}" for name in ("ids", "queue_ids")}
            shape = f"{options['BLOCK_M']}x{options['BLOCK_N']} k{options['BLOCK_K']} o{options['BLOCK_O']}"
            shape += f" w{launched['num_warps']} s{launched['num_stages']}"
            head = dict(dtype=dtype, D=dim, B=batch, ids="yes" if ids else "no", tile=shape)
            yield head, kernel, types, constants, launched, True
    if quick and scarce:  # these need next to none
        return
    for ids in (False, True):
        head = dict(dtype="bf16", D=256, B=64, ids="yes" if ids else "no", tile="")
        types = {name: "*bf16" for name in FEATURES}
        for splits in (128, triton.next_power_of_2(launch.MAX_SPLITS + 1)):
            constants = dict(HAS_IDS=ids, SPLITS=splits)
            yield head | dict(tile=f"{splits} splits"), kernels.combine, types, constants, {}, False
        yield head, kernels.reduce, types, dict(D=256, HAS_IDS=ids, BLOCK_D=256, SPLITS=16), {}, False
    yield dict(dtype="fp32", D="", B="", ids="", tile=""), kernels.finish, {}, dict(WITH_GRAD=True), {}, False


def sampler_cases():
    """The same of the sampler's kernel."""
    from albef_ds.kernels import hard_negatives_triton

    for ids, block in ((False, 64), (True, 1024)):
        types = dict(logits="*fp32", noise="*fp32", ids="*i64" if ids else "*fp32", winners="*i64")
        head = dict(dtype="fp32", D="", B=block, ids="yes" if ids else "no", tile="")
        yield head, hard_negatives_triton._race, types, dict(HAS_IDS=ids, BLOCK=block), {}, False


def problems(row: dict, arch: int, uses_tensor_cores: bool) -> list[str]:
    """What is wrong with a compiled kernel, in words."""
    from albef_ds.kernels.launch import SHARED_MEMORY

    found = []
    if row["spills"]:
        found.append(f"{row['spills']} spill instructions")
    if row["shared bytes"] > SHARED_MEMORY[arch]:
        found.append(f"{row['shared bytes']} bytes of shared memory, the chip has {SHARED_MEMORY[arch]}")
    if uses_tensor_cores and not row["matrix"]:
        found.append("tensor cores unused")
    if uses_tensor_cores and not row["async"]:
        found.append("no asynchronous copies")
    return found


def report(archs, quick: bool = False, out: Path | None = None) -> tuple[list[dict], list[str]]:
    """(one row per kernel, configuration and chip; all that is wrong). `out`: folder that keeps each row at once."""
    kept, wrong = measure.Rows(out and out / "compile_report.jsonl"), []
    for arch in archs:
        for head, kernel, types, constants, options, matrix in (*contrastive_cases(arch, quick), *sampler_cases()):
            types = {name: types.get(name) or ("i32" if name in INTEGERS else "*fp32") for name in kernel.arg_names}
            aligned = [name for name, kind in types.items() if kind.startswith("*") and name not in constants]
            measured = compile_kernel(kernel, types, constants, arch, aligned, **options)
            name = kernel.fn.__name__.strip("_")
            row = dict(kernel=name, arch=f"sm_{arch}", **head, **measured)
            row["shared KB"] = round(row["shared bytes"] / 1024, 1)
            kept.add(row)
            where = f"{name} sm_{arch} {head['dtype']} D={head['D']} B={head['B']} ids={head['ids']}"
            wrong += [f"{where}: {problem}" for problem in problems(row, arch, matrix)]
    return kept.rows, wrong


def main(argv=None) -> int:
    """The command line in this file's head."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHS, help="default 80 86 89 90; with --quick 80 86 90")
    quick = "ALBEF's own D = 256 in bf16 and fp32 alone; on chips of 99 KB of shared memory the widest features alone"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.add_argument(
        "--out", type=measure.folder, help="folder that keeps each row as soon as its kernel is compiled"
    )
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET=1 replaces the compiler by the interpreter: unset it", file=sys.stderr)
        return 2
    rows, wrong = report(args.arch or ((80, 86, 90) if args.quick else (80, 86, 89, 90)), args.quick, args.out)
    if args.json:
        print(json.dumps(dict(rows=rows, problems=wrong), indent=1))
    else:
        print(measure.table(rows, COLUMNS))
        print("\n".join(["", *wrong, f"{len(rows)} kernels compiled, {len(wrong)} problems"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
