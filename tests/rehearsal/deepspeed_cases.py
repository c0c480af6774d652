"""What is rehearsed under DeepSpeed ZeRO-2, and how; tests/rehearsal/deepspeed_steps.py runs it.

Layers are as wide as ALBEF-base's, so that buckets fill as they do there; on tensors without values that costs nothing.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path

import torch
from deepspeed import DeepSpeedEngine

from albef_ds.config import BatchPlan, ModelConfig, OptimizerConfig, TextConfig, VisionConfig
from albef_ds.data.batch import Loaded
from albef_ds.tasks.registry import task_class
from albef_ds.tasks.task import Task
from albef_ds.training.bad_steps import BadSteps, check_precondition
from albef_ds.training.ds_config import load_deepspeed_config
from albef_ds.training.engine import build_engine, clamp_temperature, engine_config, set_learning_rate
from benchmarks import fake_gpu, fake_ranks, workload
from benchmarks.fake_streams import memory_of

WORLD, MICRO = 8, 4
LENGTHS = (9, 10, 11, 25)  # of a micro-batch's texts
LEARNING_RATES = (1e-4, 5e-5)  # of the two steps

ZERO = "deepspeed/runtime/zero/stage_1_and_2.py"
# Who reads values on the host: DeepSpeed, whether the gradients' norm is finite; with offload also every gradient's.
READS = {
    "deepspeed/runtime/utils.py:is_invalid_grad_norm": False,
    f"{ZERO}:update_offload_overflow_tracker": False,
    f"{ZERO}:complete_grad_norm_calculation_for_cpu_offload": 1.0,
}
# Who copies to the host and waits for it: DeepSpeed with offload, the masters at the start, the clamped temperature.
COPIES = frozenset({f"{ZERO}:__init__", "deepspeed/utils/tensor_fragment.py:set_full_hp_param"})
# What the hosts have told each other of their texts: how many tokens, and how long the longest.
KNOWN = {"albef_ds/tasks/negatives.py:largest": (sum(LENGTHS), max(LENGTHS))}


@dataclasses.dataclass(frozen=True)
class Case:
    """What one engine is made of."""

    deepspeed: str = "zero2_h100"  # of ds_configs/
    task: str = "pretraining"
    overlap: bool = True
    accumulation: int = 1
    optimizer: str = "adamw"
    clip: float = 0.0
    negatives: str = "rank"

    @property
    def model(self) -> ModelConfig:
        text = TextConfig(vocab_size=30522, layers=2, fusion_layer=1)
        options = {"negatives": self.negatives}
        return ModelConfig(vision=VisionConfig(layers=2), text=text, queue_size=64, options=options)

    @property
    def plan(self) -> BatchPlan:
        whole = MICRO * self.accumulation * WORLD
        return BatchPlan(global_batch=whole, micro_batch=MICRO, accumulation=self.accumulation, world_size=WORLD)


GPU_CONFIGURATIONS = ("zero2_a100_40gb", "zero2_a100_80gb", "zero2_h100", "zero2_offload")
OTHER_TASKS = ("retrieval", "vqa", "entailment", "nlvr", "text_assignment")
CASES: dict[str, Case] = {
    **{name: Case(name) for name in GPU_CONFIGURATIONS},
    **{f"{name}, no overlap": Case(name, overlap=False) for name in GPU_CONFIGURATIONS},
    **{task: Case(task=task) for task in OTHER_TASKS},
    "accumulation and clipping": Case(accumulation=2, clip=1.0),
    "offload, accumulation and clipping": Case("zero2_offload", accumulation=2, clip=1.0),
    "muon": Case(optimizer="muon", accumulation=2),
    "negatives of all ranks": Case(negatives="all"),
}


class Rehearsal:
    """The two steps of a case, and what must hold in them. A fault is a Rehearsal of which one method does something
    else."""

    def __init__(self, case: Case):
        self.case = case

    def deepspeed_json(self) -> dict:
        given = json.loads((fake_ranks.ROOT / "ds_configs" / f"{self.case.deepspeed}.json").read_text())
        given["zero_optimization"]["overlap_comm"] = self.case.overlap
        return given

    def task(self) -> Task:
        with torch.device("meta"):  # values would only cost time
            return task_class(self.case.task)(self.case.model).train()

    def batch(self) -> Loaded:
        return fake_gpu.move(workload.task_batch(self.case.task, self.case.model, LENGTHS))

    def run(self) -> dict:
        """What was found; raises whatever goes wrong."""
        case, config = self.case, self._checked_json()
        task, batch = fake_gpu.to_gpu(self.task()), self.batch()
        before, collectives = _kinds(task), {}
        with fake_gpu.install(), fake_ranks.Watch(READS, COPIES, KNOWN) as watch:
            config = engine_config(config, case.plan, case.clip)
            engine = build_engine(task, OptimizerConfig(name=case.optimizer), config)
            check_precondition(engine)
            collectives["start"] = _taken(watch)
            for number, lr in enumerate(LEARNING_RATES, start=1):
                clamped = self.step(engine, batch, lr, watch)
                collectives[f"step {number}"] = _taken(watch)
            engine.destroy()
        if (after := _kinds(task)) != before:
            raise AssertionError(f"changed by training: {sorted(set(after.items()) ^ set(before.items()))}")
        trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
        return {"trained": trained, "reads": dict(watch.reads), "clamped": clamped, "collectives": collectives}

    def step(self, engine: DeepSpeedEngine, batch: Loaded, lr: float, watch: fake_ranks.Watch) -> list[str]:
        """One optimiser step, as the loop does it. Returns where the temperature was clamped: in the model's parameter,
        in this rank's masters."""
        task = engine.module
        bad_steps = BadSteps(task, limit=1, output_dir="nowhere")
        set_learning_rate(engine, lr)
        task.start_step(0.4, measuring=True)
        for _ in range(self.case.accumulation):
            with bad_steps.examined():
                losses = engine(batch)
                engine.backward(bad_steps.total(losses))
            engine.step()
            for name, loss in losses.items():
                if (kind := _kind(loss)) != f"float32 [] cuda:{torch.cuda.current_device()}":
                    raise AssertionError(f"the loss {name} is {kind}")
        applied = engine.was_step_applied()
        task.finish_step(applied)
        watch.written.clear()
        clamp_temperature(engine)
        if bad_steps.after_step(0, applied):
            raise AssertionError("the step was skipped")
        places = {"masters": engine.optimizer.single_partition_of_fp32_groups}
        if task.temperature is not None:
            places["model"] = [task.temperature]
        return [place for place, tensors in places.items() if any(memory_of(t) in watch.written for t in tensors)]

    def _checked_json(self) -> dict:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, f"{self.case.deepspeed}.json")
            file.write_text(json.dumps(self.deepspeed_json()))
            return load_deepspeed_config(file)


def _kinds(task: Task) -> dict[str, str]:
    """Of all that a checkpoint holds. Raises AssertionError where something with a fraction is not fp32."""
    found = task.state_dict()
    rounded = [name for name, tensor in found.items() if tensor.is_floating_point() and tensor.dtype != torch.float32]
    if rounded:
        raise AssertionError(f"not kept in fp32: {', '.join(rounded)}")
    return {name: _kind(tensor) for name, tensor in found.items()}


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} {tensor.device}"


def _taken(watch: fake_ranks.Watch) -> list[dict]:
    found = [dataclasses.asdict(collective) for collective in watch.collectives]
    watch.collectives.clear()
    return found
