"""What a recipe takes: memory of a GPU (an estimate), memory of the host, room on the disk, and whether there is it."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from albef_ds.config import BatchPlan, Config
from albef_ds.doctor.finding import Finding, judged, ok, problem, warning
from albef_ds.tasks.registry import task_class
from albef_ds.training.dry_run import ANSWER_TOKENS, ANSWERS

GIB = 2**30
CONTEXT = 1.5 * GIB  # CUDA's context, NCCL's buffers, cuBLAS's workspaces: a usual size
PROCESS = 0.6 * GIB  # Python with torch and DeepSpeed, on a CPU
TIGHT = 0.85  # of a GPU's memory: the allocator's fragments want some too
TRIAL = 64 * 2**20  # bytes written to see how fast the disk is
SLOW_SAVE = 600.0  # seconds

# Bytes that the backward pass keeps for each token, unit of width and layer: measured on a CPU with hooks on saved
# tensors, dropout on, attention by torch's kernel in fp32. A GPU keeps less under autocast, as its attention is in bf16
# too. A CPU's plain products keep the probabilities, which is not counted here.
BYTES_AUTOCAST = {"vision": 56, "text": 62, "fusion": 94}
BYTES_FP32 = {"vision": 56, "text": 80, "fusion": 116}
BYTES_CHECKPOINTED = 4  # a layer's input alone
FUSED_TEXTS = {"pretraining": 4, "retrieval": 3, "grounding": 3, "nlvr": 2, "text_assignment": 3}  # a sample; others: 1


@dataclass(frozen=True)
class Sizes:
    """Parameters of student and teacher, bytes of queues."""

    student: int
    teacher: int
    queues: int

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint of all ranks: fp32 weights, teacher, queues, masters, two moments."""
        return 4 * (self.student + self.teacher) + self.queues + 12 * self.student


def sizes_of(config: Config) -> Sizes:
    """Counted on a model without memory. model.text.vocab_size must be filled in."""
    with torch.device("meta"):
        task = task_class(config.task)(config.model)
    return Sizes(
        sum(p.numel() for p in task.model.parameters()),
        0 if task.teacher is None else sum(p.numel() for p in task.teacher.parameters()),
        sum(b.numel() * b.element_size() for b in task.buffers()),
    )


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, by what they are for."""

    state: float
    activations: float
    buckets: float
    context: float

    @property
    def total(self) -> float:
        return self.state + self.activations + self.buckets + self.context


def estimate(config: Config, deepspeed: Mapping, plan: BatchPlan, sizes: Sizes, context: float = CONTEXT) -> Memory:
    """The dry run's arithmetic of the state, and a rule of thumb for the rest; the dry run itself measures it."""
    zero = deepspeed.get("zero_optimization", {})
    autocast = bool(deepspeed.get("torch_autocast", {}).get("enabled"))
    ranks = plan.world_size if zero.get("stage", 0) else 1
    # Gradients, masters and two moments, divided by ZeRO; offloaded, the gradients alone stay.
    divided = (1 if offloads(deepspeed) else 4) * 4 * sizes.student / ranks
    state = 4 * sizes.student + 4 * sizes.teacher + sizes.queues + divided
    if autocast:
        state += 2 * (sizes.student + sizes.teacher)  # weights cast to bf16, kept through a forward pass
    buckets = (2 if zero.get("overlap_comm") else 1) * 4 * zero.get("reduce_bucket_size", 5e8)
    return Memory(
        state, plan.micro_batch * activation_bytes(config, autocast), min(buckets, 8 * sizes.student), context
    )


def activation_bytes(config: Config, autocast: bool) -> float:
    """Of one sample whose text is as long as the recipe allows; tests/doctor/test_sizes.py has it beside real steps."""
    vision, text, task = config.model.vision, config.model.text, config.task
    cost = BYTES_AUTOCAST if autocast else BYTES_FP32
    one_layer = cost["vision"] * vision.width
    if config.train.activation_checkpointing:
        cost = dict.fromkeys(cost, BYTES_CHECKPOINTED)
    images = 2 if task == "nlvr" else 1
    patches = images * ((vision.image_size // vision.patch_size) ** 2 + 1)
    length, fused_layers = config.data.max_tokens, text.layers - text.fusion_layer
    texts = 2 if task == "pretraining" else 1
    fused = FUSED_TEXTS.get(task, 1) * length
    if task == "vqa":  # the decoder reads every answer through all of its layers
        fused += ANSWERS * ANSWER_TOKENS
    total = cost["vision"] * patches * vision.width * vision.layers
    total += cost["text"] * texts * length * text.width * text.fusion_layer
    total += cost["fusion"] * fused * text.width * fused_layers
    total += 2 * (2 if autocast else 4) * patches * text.width * fused_layers  # keys and values of the image
    if task in ("pretraining", "vqa"):  # logits of masked words, or of answers: ours, the soft labels, both logarithms
        words = config.data.mlm_probability * length if task == "pretraining" else ANSWERS * ANSWER_TOKENS
        total += 14 * words * (text.vocab_size or 30522)
    if config.train.activation_checkpointing:  # one layer is computed again, whole, at a time
        total += patches * one_layer
    return total


def offloads(deepspeed: Mapping) -> bool:
    target = deepspeed.get("zero_optimization", {}).get("offload_optimizer", {})
    return target.get("device", "none") not in (None, "none")


def check_memory(
    config: Config, deepspeed: Mapping, plan: BatchPlan, sizes: Sizes, room: int | None, on_cpu: bool = False
) -> Finding:
    """room: bytes of the smallest GPU, or a rank's share of the host's; None: not known, nothing is judged."""

    def needed(micro_batch: int) -> Memory:
        changed = plan.model_copy(update={"micro_batch": micro_batch})
        return estimate(config, deepspeed, changed, sizes, PROCESS if on_cpu else CONTEXT)

    memory = needed(plan.micro_batch)
    shown = (
        f"estimate {memory.total / GIB:.1f} GiB a rank: state {memory.state / GIB:.1f}, activations of "
        f"{plan.micro_batch} samples {memory.activations / GIB:.1f}, buckets {memory.buckets / GIB:.1f}, context "
        f"{memory.context / GIB:.1f}"
    )
    if room is None:
        return ok("memory", f"{shown}; --dry-run measures it")
    shown += f"; {'a rank' if on_cpu else 'the GPU'} has {room / GIB:.1f}"
    if memory.total <= TIGHT * room:
        return ok("memory", shown)
    share = plan.micro_batch * plan.accumulation
    fitting = [m for m in range(plan.micro_batch, 0, -1) if share % m == 0 and needed(m).total <= TIGHT * room]
    if fitting:
        advice = f"train.micro_batch={fitting[0]} (the same step, accumulated); --dry-run measures it"
    elif config.train.activation_checkpointing:
        advice = "more ranks divide the state further; train.deepspeed=zero2_offload moves most of it to the host"
    else:
        advice = "train.activation_checkpointing=true; then train.deepspeed=zero2_offload"
    return (warning if memory.total <= room else problem)("memory", shown, advice)


def check_host_memory(sizes: Sizes, available: int, local_ranks: int, world_size: int) -> Finding:
    """A checkpoint is copied to the host's memory before it is written. available: bytes."""
    needed = 4 * (sizes.student + sizes.teacher) + sizes.queues + 12 * sizes.student * local_ranks / world_size
    shown = f"{available / GIB:.1f} GiB available, {needed / GIB:.1f} GiB wanted for the copy of a checkpoint"
    advice = "end other programs, or give the job more memory (SLURM: --mem)"
    return ok("host memory", shown) if needed <= available else warning("host memory", shown, advice)


def available_memory() -> int:
    """Bytes that programs may still take, as Linux reckons."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_disk(output: Path, config: Config, sizes: Sizes, total_steps: int | None) -> Iterator[Finding]:
    """Writes a little where the run would, and removes it; total_steps: of the run, where it is known."""
    folder = output.absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        speed = write_speed(folder)
    except OSError as error:
        text = f"{folder}: cannot be written: {error.strerror or error}"
        yield problem("disk", text, "set output_dir to a folder that can be")
        return
    state = os.statvfs(folder)
    yield judge_disk(folder, state.f_bavail * state.f_frsize, speed, kept(config, total_steps), sizes.checkpoint)


def kept(config: Config, total_steps: int | None) -> int:
    """Checkpoints that are there at once: the newest, one that is being written, those that stay for good."""
    settings = config.checkpoint
    for_good = total_steps // settings.keep_every if settings.keep_every and total_steps else 0
    return settings.keep + 1 + for_good


def write_speed(folder: Path, size: int = TRIAL) -> float:
    """Bytes a second until they are on the disk."""
    block = os.urandom(2**20)  # some file systems store zeros for nothing
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor_") as file:
        start = time.perf_counter()
        for _ in range(size // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return size / (time.perf_counter() - start)


def judge_disk(folder: Path, free: int, speed: float, count: int, checkpoint: int) -> Finding:
    seconds = checkpoint / speed
    shown = (
        f"{folder}: {free / 1e9:.1f} GB free, {count} checkpoints of {checkpoint / 1e9:.2f} GB; writes "
        f"{speed / 1e6:.0f} MB/s: {seconds:.0f} s a checkpoint"
    )
    room = "make room, lower checkpoint.keep, raise checkpoint.keep_every, or choose another output_dir"
    return judged(
        (free < count * checkpoint, problem("disk", shown, room)),
        (seconds > SLOW_SAVE, warning("disk", shown, "raise checkpoint.every, or choose a faster disk")),
        (True, ok("disk", shown)),
    )
