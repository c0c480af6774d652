"""A run's checkpoint as one file in the reference's form, without a GPU and without building DeepSpeed's engine."""

from __future__ import annotations

from pathlib import Path

import torch

from albef_ds.config import Config
from albef_ds.model.reference_weights import to_reference
from albef_ds.tasks.pretraining import Pretraining
from albef_ds.training.checkpoint import MANIFEST, CheckpointError, verify


def export_checkpoint(checkpoint: str | Path, out: str | Path, with_teacher: bool = True) -> Path:
    """Writes `out`: .safetensors, or a .pth as the reference has it ({"model": state dict, "epoch": ...}).

    Args:
        checkpoint: RUN/checkpoints/step_…, or RUN, whose newest complete checkpoint is taken.
        with_teacher: also the momentum copies and the queues.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    folder = _step_folder(Path(checkpoint))
    manifest = verify(folder)
    model = Config.model_validate({"model": manifest["identity"]["model"]}).model
    task = Pretraining(model)
    # Parameters are fp32 (torch_autocast), so DeepSpeed's module states are the masters.
    states = torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=True)
    task.load_state_dict(states["module"])
    extra = (task.teacher, task.queue) if with_teacher else (None, None)
    state = to_reference(task.model, *extra)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({k: v.clone() for k, v in state.items()}, out, metadata={"step": str(manifest["step"])})
    else:
        torch.save({"model": state, "step": manifest["step"]}, out)
    return out


def _step_folder(path: Path) -> Path:
    if (path / MANIFEST).is_file():
        return path
    steps = sorted(path.glob(f"checkpoints/step_*/{MANIFEST}"))
    if not steps:
        raise CheckpointError(f"{path}: neither a checkpoint nor a run that has one")
    return steps[-1].parent
