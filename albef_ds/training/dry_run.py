"""`--dry-run`: one step on made-up data, and what the run will take."""

from __future__ import annotations

import resource
import time

import deepspeed
import torch

from albef_ds.config import BatchPlan, Config
from albef_ds.data.batch import (
    LabelledBatch,
    Loaded,
    MaskedTokens,
    PackedText,
    PairBatch,
    PretrainingBatch,
    QuestionBatch,
)
from albef_ds.data.tokenizer import CaptionTokenizer
from albef_ds.training.flops import FlopCount

GIB = 2**30
ANSWERS, ANSWER_TOKENS = 4, 5


def synthetic_batch(config: Config, size: int, mask_id: int, cls_id: int) -> Loaded:
    """A micro-batch of the largest shape that the recipe allows: every text is max_tokens long."""
    generator = torch.Generator().manual_seed(0)
    pixels = config.model.vision.image_size
    length, vocabulary = config.data.max_tokens, config.model.text.vocab_size

    def texts(number: int) -> PackedText:
        ids = torch.randint(vocabulary, (number, length), generator=generator)
        ids[:, 0] = cls_id
        return PackedText.from_lists(ids.tolist())

    text = texts(size)
    images = torch.randn(size * (2 if config.task == "nlvr" else 1), 3, pixels, pixels, generator=generator)
    if config.task in ("entailment", "nlvr"):
        return LabelledBatch(images, text, torch.zeros(size, dtype=torch.int64))
    if config.task in ("retrieval", "grounding", "text_assignment"):
        return PairBatch(images, text, torch.arange(size))
    if config.task == "vqa":  # as many answers a question as its annotators may give, each short
        ids = torch.randint(vocabulary, (ANSWERS * size, ANSWER_TOKENS), generator=generator)
        weights = torch.full((ANSWERS * size,), 1 / ANSWERS)
        return QuestionBatch.of(images, text, PackedText.from_lists(ids.tolist()), weights, [ANSWERS] * size)
    chosen = torch.rand(size, length, generator=generator) < config.data.mlm_probability
    chosen[:, 0] = False
    positions = chosen.flatten().nonzero().flatten()
    masked = text.input_ids.clone()
    masked[positions] = mask_id
    return PretrainingBatch(images, text, MaskedTokens.of(text, masked, positions))


def describe(
    engine: deepspeed.DeepSpeedEngine,
    config: Config,
    plan: BatchPlan,
    tokenizer: CaptionTokenizer,
    device: torch.device,
) -> str:
    """Runs one optimiser step and returns the batch arithmetic, the sizes and the memory, as text."""
    task = engine.module
    batch = synthetic_batch(config, plan.micro_batch, tokenizer.mask_id, tokenizer.cls_id).to(device)
    start = time.perf_counter()
    task.start_step(config.train.alpha)
    for _ in range(plan.accumulation):
        with FlopCount() as flops:
            losses = engine(batch)
            engine.backward(sum(losses.values()))
        engine.step()
    task.finish_step(applied=engine.was_step_applied())
    shown = ", ".join(f"{name} {float(value.detach()):.3f}" for name, value in losses.items())

    student = sum(p.numel() for p in task.model.parameters())
    teacher = 0 if task.teacher is None else sum(p.numel() for p in task.teacher.parameters())
    queue = sum(b.numel() * b.element_size() for b in task.buffers())
    # fp32 throughout: parameters and teacher whole on every rank; gradients, masters and two moments divided by ZeRO-2.
    divided = 4 * student / plan.world_size
    state = 4 * student + 4 * teacher + queue + 4 * divided
    return "\n".join(
        [
            f"batch:       {plan}",
            f"parameters:  {student / 1e6:.1f} M trained, {teacher / 1e6:.1f} M in the teacher",
            f"model state: {state / GIB:.2f} GiB a rank (weights {4 * student / GIB:.2f}, "
            f"teacher {4 * teacher / GIB:.2f}, queues {queue / GIB:.2f}, "
            f"gradients, masters and moments {4 * divided / GIB:.2f})",
            f"peak memory: {_peak(device) / GIB:.2f} GiB of the {'device' if device.type == 'cuda' else 'process'}",
            f"compute:     {flops.total / plan.micro_batch / 1e9:.2f} GFLOP a sample, both ways, all texts full",
            f"one step:    {time.perf_counter() - start:.2f} s, cold; losses {shown}",
        ]
    )


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_reserved(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
