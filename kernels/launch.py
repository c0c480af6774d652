"""How the queue-contrastive kernels are cut into tiles: defaults by shared memory, and what tuning has found.

The defaults were chosen by compiling, not by timing (`python -m benchmarks.compile_report`): no register spills, shared
memory within the chip's, tensor cores and asynchronous copies in use. `python -m albef_ds.kernels.tuning` times a short
list of others on the GPU at hand and remembers the best in a file; nothing is ever tuned in the middle of a run.
"""

import json
import os
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
import triton

from albef_ds.kernels.queue_contrastive import MAX_TRITON_DIM as MAX_DIM

MAX_SPLITS = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SMALLEST = 99 * 1024  # bytes of shared memory that a program may have on the smallest chips
SHARED_MEMORY = {80: 163 * 1024, 86: SMALLEST, 89: SMALLEST, 90: 227 * 1024, 100: 227 * 1024, 120: SMALLEST}


@dataclass(frozen=True)
class Tile:
    """Tile of one pass: BLOCK_M rows by BLOCK_N columns; features BLOCK_K at a time into logits, BLOCK_O per program
    into gradients (both at most the padded D; the tile of the bank is read once where both equal it)."""

    block_m: int
    block_n: int
    block_k: int = MAX_DIM
    block_o: int = MAX_DIM
    warps: int = 8
    stages: int = 2
    precision: str = "ieee"  # of fp32 products; "tf32x3" is three TF32 products, about fp32

    def options(self, dim: int) -> dict:
        """Keyword arguments of the launch for features of `dim`."""
        padded = pad(dim)
        return dict(
            BLOCK_M=self.block_m,
            BLOCK_N=self.block_n,
            BLOCK_D=padded,
            BLOCK_K=min(self.block_k, padded),
            BLOCK_O=min(self.block_o, padded),
            PRECISION=self.precision,
            num_warps=self.warps,
            num_stages=self.stages,
        )

    def chunks(self, dim: int) -> int:
        """Programs that share the D gradients of a row."""
        return pad(dim) // min(self.block_o, pad(dim))


@dataclass(frozen=True)
class Plan:
    """All that a call must know before launching. The queue is cut into `splits` ranges of whole tiles."""

    statistics: Tile
    gradient: Tile
    splits: int


def columns_per_split(length: int, splits: int, tile: Tile) -> int:
    """Columns of a queue of `length` that one program of `tile` streams: a multiple of the tile, at least one tile."""
    return max(1, -(-length // (splits * tile.block_n))) * tile.block_n


def pad(dim: int) -> int:
    """The power of two, 16 or more, that a tile of `dim` features takes."""
    return max(16, triton.next_power_of_2(dim))


@cache
def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels (TRITON_INTERPRET=1 when they were imported)."""
    from albef_ds.kernels import queue_contrastive_kernels

    return not isinstance(queue_contrastive_kernels.statistics, triton.runtime.JITFunction)


def check_device(device: torch.device) -> None:
    """Raises ValueError where Triton has nothing to run on."""
    if device.type != "cuda" and not interpreted():
        raise ValueError(
            f"impl='triton' needs tensors on a GPU, got {device}; use impl='auto' or 'torch', or set "
            "TRITON_INTERPRET=1 before Triton is imported to run the kernels in its interpreter"
        )


def default_tiles(
    arch: int, dtype: torch.dtype, batch: int, dim: int, with_ids: bool, shared: int | None = None
) -> tuple[Tile, Tile]:
    """(statistics, gradient) tiles that fit into the chip's shared memory and registers.

    Args:
        arch: compute capability, 90 for 9.0. Hopper, of other matrix instructions, has tiles of its own; those of all
            other chips follow from their shared memory.
        dtype: of the queues.
        batch, dim: B and D of the features.
        with_ids: positives by ids.
        shared: bytes of shared memory that a program may have; None: what `SHARED_MEMORY` says of `arch`, and the least
            for one that is not there.
    """
    hopper, padded = arch == 90, pad(dim)
    shared = SHARED_MEMORY.get(arch, SMALLEST) if shared is None else shared
    if dtype == torch.float32:
        precise = dict(block_k=max(16, min(32, padded // 2)), precision="tf32x3")
        if hopper and batch > 32 and not with_ids:
            return Tile(64, 64, **precise), Tile(64, 32, block_o=64, **precise)
        return Tile(32, 64, **precise), Tile(32, 64, block_o=64 if with_ids else 128, **precise)
    if shared < SHARED_MEMORY[80]:
        small = Tile(32, 16 if padded == MAX_DIM else 32)  # 32 columns of 512 features would be 100 KB
        return small, small
    width = 32 if with_ids else 64  # comparing ids takes registers
    if padded == MAX_DIM:
        return Tile(32, width), Tile(32, 32, block_o=256 if with_ids else MAX_DIM)
    if padded <= 128:
        return Tile(64, width), Tile(64, width)
    if batch <= 32:
        return Tile(32, width), Tile(32, width)
    if with_ids:
        return Tile(64, 32), Tile(64, 32, block_o=128)
    return Tile(64, 64), Tile(64, 32 if hopper else 64)


def choose_splits(groups: int, tiles: int, slots: int) -> int:
    """Ranges to cut a queue of `tiles` tiles into, for `groups` programs each on a chip that runs `slots` at once.

    Counts the waves of programs and the tiles each streams; one program more per group takes the batch. A program is
    taken to cost eight tiles besides its stream, which keeps the number of partial results small.
    """

    def cost(splits):
        return -(-groups * (splits + 1) // slots) * (-(-tiles // splits) + 8)

    return min(range(1, max(1, min(tiles, MAX_SPLITS)) + 1), key=lambda splits: (cost(splits), splits))


_forced: dict[tuple, Plan] = {}


def force(key: tuple | None = None, plan: Plan | None = None) -> None:
    """Uses `plan` for `key` = (dtype, B, M, D, with_ids), or for every call with the key (); without arguments forgets.

    For tuning and for tests of tiles that are not the default's.
    """
    if plan is None:
        _forced.clear()
    else:
        _forced[key] = plan


def plan(device: torch.device, dtype: torch.dtype, batch: int, length: int, dim: int, with_ids: bool) -> Plan:
    """The plan of a call: forced, else found by tuning on this kind of device, else the default."""
    shape = (dtype, batch, length, dim, with_ids)
    forced = _forced.get(shape) or _forced.get(())
    return forced or _known_plan(device, *shape)


@cache
def _known_plan(device, dtype, batch, length, dim, with_ids) -> Plan:
    if device.type == "cuda":
        found = tuned().get(tuning_key(torch.cuda.get_device_name(device), dtype, batch, length, dim, with_ids))
        if found:
            return Plan(Tile(**found["statistics"]), Tile(**found["gradient"]), found["splits"])
    return default_plan(device, dtype, batch, length, dim, with_ids)


def default_plan(device: torch.device, dtype: torch.dtype, batch: int, length: int, dim: int, with_ids: bool) -> Plan:
    """The plan without any tuning; on a CPU the interpreter's."""
    if device.type == "cuda":
        chip = torch.cuda.get_device_properties(device)
        slots = chip.multi_processor_count
        tiles = default_tiles(chip.major * 10 + chip.minor, dtype, batch, dim, with_ids, shared_memory(device))
    else:
        # The interpreter's cost is by operation, not by element: few wide tiles.
        slots, rows = 8, min(128, pad(batch))
        tiles = (Tile(rows, 64 if length <= 256 else 512),) * 2
    statistics, gradient = tiles
    groups = 2 * -(-batch // gradient.block_m) * gradient.chunks(dim)
    return Plan(statistics, gradient, choose_splits(groups, -(-length // max(t.block_n for t in tiles)), slots))


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have on this GPU."""
    chip = torch.cuda.get_device_properties(device)
    found = getattr(chip, "shared_memory_per_block_optin", None)  # an older PyTorch does not say
    return found or SHARED_MEMORY.get(chip.major * 10 + chip.minor, SMALLEST)


def cache_file() -> Path:
    """Where tuned plans are kept: $ALBEF_DS_CACHE, else $XDG_CACHE_HOME/albef_ds, else ~/.cache/albef_ds."""
    folder = os.environ.get("ALBEF_DS_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "albef_ds")
    return Path(folder).expanduser() / "kernels.json"


def tuning_key(device_name: str, dtype: torch.dtype, batch: int, length: int, dim: int, with_ids: bool) -> str:
    """The entry of one shape on one kind of device, for one version of Triton."""
    ids = "ids" if with_ids else "rows"
    return f"{device_name} | triton {triton.__version__} | {str(dtype)[6:]} B={batch} M={length} D={dim} {ids}"


@cache
def tuned() -> dict:
    """All tuned plans of the cache file, {} where there is none or it cannot be read."""
    try:
        return json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}


def remember(key: str, found: Plan) -> None:
    """Writes a tuned plan into the cache file, atomically, beside what is already there."""
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    tuned.cache_clear()
    entries = tuned() | {key: asdict(found)}
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n")
    temporary.replace(path)
    reread()


def reread() -> None:
    """Lets the next call look into the cache file again."""
    tuned.cache_clear()
    _known_plan.cache_clear()
