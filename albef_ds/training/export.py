"""A run's checkpoint as one file in the reference's form, without a GPU and without building DeepSpeed's engine."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from albef_ds.config import Config
from albef_ds.training.checkpoint_files import read_tensors
from albef_ds.training.checkpoint_manifest import CheckpointError, Manifest, verify
from albef_ds.training.restore import MODEL_FILE
from albef_ds.training.retention import complete_folders


def export_checkpoint(checkpoint: str | Path, out: str | Path, with_teacher: bool = True) -> Path:
    """Writes `out`: .safetensors, or a .pth as the reference has it ({"model": state dict, "step": ...}).

    Args:
        checkpoint: RUN/checkpoints/step_…, RUN/checkpoints, or RUN; of the latter two the newest complete one.
        with_teacher: also the momentum copies and the queues, where the task has them.

    Raises:
        CheckpointError: there is none, it is damaged, or of a task that this version does not know.
    """
    folder = newest_of(checkpoint)
    manifest = verify(folder)
    state = reference_state(load_task(folder, manifest), with_teacher)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".safetensors":
        from safetensors.torch import save_file

        # Tied weights under two names are stored twice: the format allows no sharing.
        save_file({k: v.clone() for k, v in state.items()}, out, metadata={"step": str(manifest.step)})
    else:
        torch.save({"model": state, "step": manifest.step}, out)
    return out


def load_task(folder: Path, manifest: Manifest):
    """The task that wrote a checkpoint, with its weights, on the CPU."""
    from albef_ds.tasks.registry import task_class

    sections = {key: manifest.identity.get(key) for key in ("task", "model")}
    try:
        config = Config.model_validate({key: value for key, value in sections.items() if value is not None})
        task = task_class(config.task)(config.model)
        # Parameters are fp32 (torch_autocast), so DeepSpeed's module states are the masters.
        task.load_state_dict(read_tensors(folder / MODEL_FILE)["module"])
    except (ValidationError, ValueError, KeyError, TypeError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder}: no checkpoint of a model that this version knows: {error}") from error
    return task


def reference_state(task, with_teacher: bool = True) -> dict[str, Tensor]:
    """A task's weights by the reference's names; the only place where export meets `to_reference`."""
    from albef_ds.model.reference_weights import to_reference

    extra = (task.teacher, getattr(task, "queue", None)) if with_teacher else (None, None)
    return to_reference(task.model, *extra)


def newest_of(path: str | Path) -> Path:
    """A step's folder itself, or the newest complete one of a run or of its checkpoints."""
    path = Path(path)
    if (path / MODEL_FILE).is_file():
        return path
    for folder in (path / "checkpoints", path):
        if complete := complete_folders(folder):
            return complete[0]
    raise CheckpointError(f"{path}: neither a checkpoint nor a run that has one")
