"""Attention on a CPU in bf16: what a fine-tuning step costs with each way to compute it.

    python -m benchmarks.cpu_attention [--seconds 60] [--out DIR]

Forward and backward of shapes_vqa's model in one process with one thread, under autocast, as a rank of it has them: 8
images, 16 questions each. In turns; ratios are medians of pairs with a 95 % bootstrap interval.
"""

from __future__ import annotations

import argparse
import sys

import torch

from albef_ds.build import build_task, with_vocabulary
from albef_ds.config import load_config
from albef_ds.data.batch import PackedText, QuestionBatch
from albef_ds.model import attention
from benchmarks import measure

IMAGES, QUESTIONS, VOCABULARY = 8, 16, 384
WAYS = {  # backend, rows taken at once
    "torch's kernel, in fp32": ("sdpa", 0),
    "plain products, run by run": ("eager", 0),
    "plain products, short runs side by side": ("eager", attention.SHORT),
}


def batch(size: int) -> QuestionBatch:
    generator = torch.Generator().manual_seed(0)

    def texts(lengths: torch.Tensor) -> PackedText:
        ids = torch.randint(5, VOCABULARY, (int(lengths.sum()),), generator=generator).tolist()
        return PackedText.from_lists([[ids.pop() for _ in range(n)] for n in lengths.tolist()])

    questions = torch.randint(6, 13, (IMAGES * QUESTIONS,), generator=generator)
    counts = torch.ones(IMAGES * QUESTIONS, dtype=torch.int64)
    counts[::5] += 1  # some questions have two answers
    answers = torch.full((int(counts.sum()),), 3)
    images = torch.randn(IMAGES, 3, size, size, generator=generator)
    return QuestionBatch.of(images, texts(questions), texts(answers), torch.ones(len(answers)), counts.tolist())


def steps() -> dict:
    """{way: a call that computes the loss and its gradients}."""
    config = with_vocabulary(load_config("shapes_vqa"), VOCABULARY)
    torch.manual_seed(0)
    task, data = build_task(config).train(), batch(config.model.vision.image_size)

    def step(backend: str, short: int):
        def call() -> None:
            attention.SHORT = short
            for module in task.modules():
                if hasattr(module, "backend"):
                    module.backend = backend
            with torch.autocast("cpu", torch.bfloat16):
                loss = sum(task(data).values())
            loss.backward()
            task.zero_grad()

        return call

    return {name: step(*way) for name, way in WAYS.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--out", type=measure.folder, help="a folder for cpu-attention.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cpu")
    samples = measure.interleaved(steps(), device, args.seconds)
    first = samples[next(iter(WAYS))]
    rows = {
        name: {"ms": measure.summary(times), "times as fast as the first": measure.ratio(first, times)}
        for name, times in samples.items()
    }
    measure.publish({"environment": measure.environment(device), "ways": rows}, args.out, "cpu-attention.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
