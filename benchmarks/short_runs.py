"""Attention between short runs on the CPU: several side by side with a mask, as `attention` does it, or one by one.

    python -m benchmarks.short_runs [--seconds 4] [--out DIR]

Forward and backward, on the lengths of a rank's step of shapes_vqa: 128 questions of 5 to 10 tokens, and the 2 tokens
of 156 answers that look at them. Both in turns in one process; ratios: medians of pairs, a 95 % bootstrap interval.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from albef_ds.data.files import write_atomically
from albef_ds.model import attention as module
from albef_ds.model.attention import Spans, attention
from benchmarks import measure

QUESTIONS, HEADS, HEAD_DIM = 128, 4, 32


def lengths() -> dict[str, tuple[Tensor, Tensor, bool]]:
    """{what: (rows of each query run, of each key run, causal)}."""
    generator = torch.Generator().manual_seed(0)
    questions = torch.randint(5, 11, (QUESTIONS,), generator=generator)
    answers = torch.ones(QUESTIONS, dtype=torch.int64)
    answers[:28] += 1  # some questions have two
    words = torch.full((int(answers.sum()),), 2)
    return {
        "questions, self": (questions, questions, False),
        "answers, self": (words, words, True),
        "answers to questions": (2 * answers, questions, False),
    }


def step(q_lengths: Tensor, k_lengths: Tensor, causal: bool, short: int):
    """A call of attention and its gradients, `short` rows at once."""
    q_spans, k_spans = (spans_of(n) for n in (q_lengths, k_lengths))
    q, k, v = (
        torch.randn(s.num_rows, HEADS, HEAD_DIM, dtype=torch.bfloat16, requires_grad=True)
        for s in (q_spans, k_spans, k_spans)
    )
    ones = torch.ones_like(q)

    def call() -> None:
        module.SHORT = short
        attention(q, k, v, q_spans, k_spans, causal=causal).backward(ones)

    return call


def spans_of(runs: Tensor) -> Spans:
    cu_seqlens = torch.nn.functional.pad(runs.cumsum(0), (1, 0)).int()
    return Spans(cu_seqlens, int(runs.max()), int(runs.sum()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each kind")
    parser.add_argument("--out", type=Path, help="a folder for short-runs-cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device, at_once = torch.device("cpu"), module.SHORT
    rows = {}
    for name, kind in lengths().items():
        calls = {"one by one": step(*kind, short=0), "side by side": step(*kind, short=at_once)}
        samples = measure.interleaved(calls, device, args.seconds)
        rows[name] = {call: measure.summary(times) for call, times in samples.items()}
        rows[name]["times as fast"] = measure.ratio(*samples.values())
    text = json.dumps({"environment": measure.environment(device), "ms": rows}, indent=1)
    print(text)
    if args.out:
        write_atomically(args.out / "short-runs-cpu.json", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
