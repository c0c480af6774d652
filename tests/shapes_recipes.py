"""Tiny recipes of the tasks after pre-training, on the data that Shapes World has for each."""

from __future__ import annotations

from pathlib import Path

import yaml

from albef_ds.config import Config, load_config
from albef_ds.data.shapes_tasks import ShapesTasks, write_shapes_tasks
from albef_ds.data.shapes_world import ShapesWorld, write_shapes_world

EVALUATED = ("retrieval", "vqa", "entailment", "nlvr", "grounding")
TRAINED = (*EVALUATED, "text_assignment")


def write_world(folder: Path, images: int = 30, test_images: int = 6) -> tuple[ShapesWorld, ShapesTasks]:
    """Makes it, or finds it made."""
    world = write_shapes_world(folder / "world", images=images, test_images=test_images, size=48, seed=3)
    return world, write_shapes_tasks(folder / "tasks", world)


def write_task_recipe(folder: Path, task: str, **sections) -> Path:
    """`sections` update its sections, and may be settings of no section."""
    world, tasks = write_world(folder)
    data = {
        "train": [str(world.train if task == "text_assignment" else getattr(tasks, f"{task}_train"))],
        "tokenizer": str(world.vocab),
        "image_root": str(world.root),
        "workers": 0,
    }
    if task in EVALUATED:
        data["test"] = str(getattr(tasks, f"{task}_test"))
    if task == "vqa":
        data |= {"test_annotations": str(tasks.vqa_test_annotations), "answer_list": str(tasks.answer_list)}
    recipe = {
        "task": task,
        "output_dir": str(folder / f"run_{task}"),
        "model": {
            "vision": {"image_size": 32, "patch_size": 8, "width": 24, "layers": 2, "heads": 2},
            "text": {"width": 24, "layers": 3, "fusion_layer": 1, "heads": 3, "mlp_width": 40, "max_positions": 40},
            "embed_dim": 12,
            "queue_size": 17,
        },
        "data": data,
        "schedule": {"warmup_steps": 0},
        "train": {"max_steps": 2, "global_batch": 6, "micro_batch": 3, "deepspeed": "zero2_cpu"},
        "evaluation": {"batch": 5, "k_test": 4},
        "log": {"report": False},
    }
    for name, values in sections.items():
        recipe[name] = {**recipe.get(name, {}), **values} if isinstance(values, dict) else values
    path = folder / f"{task}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def built(path: Path, *overrides: str, seed: int = 0):
    """(config, tokenizer, model with random weights) of a recipe, as evaluation takes them."""
    import torch

    from albef_ds.build import build_task, with_vocabulary
    from albef_ds.data.tokenizer import load_tokenizer

    config: Config = load_config(path, overrides)
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.sep_token)
    config = with_vocabulary(config, tokenizer.vocab_size)
    torch.manual_seed(seed)
    model = build_task(config).model
    with torch.no_grad():  # far enough from the start that answers differ between samples
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return config, tokenizer, model
