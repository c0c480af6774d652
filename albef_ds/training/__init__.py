"""How a run runs: engine, loop, schedule, checkpoints, and what is shown of it."""

import os

import torch

# Before any module here imports DeepSpeed, which otherwise guesses, and says on stdout that it had to.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
