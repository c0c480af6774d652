"""Builds the DeepSpeed engine that carries a task: precision, ZeRO stage and batch arithmetic in one place."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Mapping

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_set_full_fp32_param

from albef_ds.config import BatchPlan, ConfigError, OptimizerConfig
from albef_ds.tasks.negatives import hosts
from albef_ds.training.checkpoint_writer import CHECKPOINT_THREAD
from albef_ds.training.extension_lock import build_cpu_collectives
from albef_ds.training.muon import Matrices, Muon
from albef_ds.training.optimizer import build_optimizer, parameter_groups
from albef_ds.training.rendezvous import free_port, on_loopback_alone


def init_distributed() -> tuple[int, int, torch.device]:
    """Joins the process group that the launcher describes (or makes one of a single process).

    Returns:
        rank, world size, and this rank's device.
    """
    build_cpu_collectives()
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        for name, value in {**alone, "MASTER_PORT": str(free_port())}.items():
            os.environ.setdefault(name, value)
    on_gpu = deepspeed.get_accelerator().device_name() == "cuda" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if not dist.is_initialized():
        with on_loopback_alone():
            deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", verbose=False)
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    return dist.get_rank(), dist.get_world_size(), device


def leave_distributed(together: bool = True) -> None:
    """Ends all process groups and the threads in which Gloo's work; nothing where there is none.

    Such a thread lets go of a tensor a moment after those who waited for its sum have gone on. Does it so while Python
    ends, the process aborts ("terminate called without an active exception") and a run that went well is reported as
    failed: https://github.com/pytorch/pytorch/pull/179291. A DeepSpeed engine holds groups until it is destroyed.

    Args:
        together: all ranks leave now. Where they may not, as after an error of one, NCCL's groups would wait for each
            other, and are left to the end of the process.
    """
    if not dist.is_initialized() or not (together or dist.get_backend() == "gloo"):
        return
    for thread in threading.enumerate():
        if thread.name == CHECKPOINT_THREAD:  # after an error a checkpoint may still be written, through its group
            thread.join()
    hosts.cache_clear()
    deepspeed.comm.destroy_process_group()
    gc.collect()  # the threads end with the last reference to a group


def engine_config(deepspeed_json: Mapping, plan: BatchPlan, clip: float) -> dict:
    """DeepSpeed's JSON with the recipe's batch arithmetic and clipping filled in.

    Raises:
        ConfigError: the JSON sets a batch size of its own that contradicts the recipe's.
    """
    ours = {
        "train_batch_size": plan.global_batch,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
    }
    for key, value in ours.items():
        given = deepspeed_json.get(key, "auto")
        if given not in ("auto", value):
            raise ConfigError(
                f"the DeepSpeed configuration sets {key} = {given}, the recipe means {value}; leave it out there"
            )
    return {"steps_per_print": 10**9, **deepspeed_json, **ours, "gradient_clipping": clip}


def build_engine(task: torch.nn.Module, optimizer: OptimizerConfig, config: Mapping) -> deepspeed.DeepSpeedEngine:
    """Wraps the task. Weights must be loaded before: ZeRO copies them into its fp32 masters here."""
    config = dict(config)
    if optimizer.name == "muon":
        if _offloads(config):
            raise ConfigError(
                "optimizer.name is muon, and DeepSpeed offloads the optimiser to the CPU: use adamw there"
            )
        config["zero_allow_untested_optimizer"] = True  # DeepSpeed's list knows its own Muon only
    if _offloads(config):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        groups = parameter_groups(task, optimizer.weight_decay)
        built = DeepSpeedCPUAdam(groups, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, adamw_mode=True)
    else:
        built = build_optimizer(task, optimizer, optimizer.fused)
    engine, *_ = deepspeed.initialize(model=task, optimizer=built, config=config)
    if isinstance(built, Muon) and engine.zero_optimization():
        _divide(built, engine)
    return engine


def _divide(muon: Muon, engine: deepspeed.DeepSpeedEngine) -> None:
    """Tells Muon which matrices, and which parts of them, the flat tensors hold that ZeRO has put into its groups."""
    for group, shapes in zip(muon.param_groups, engine._get_zero_param_shapes(), strict=True):
        if group.get("muon"):
            muon.divide(group["params"][0], Matrices.of(shapes, dist.get_rank(), dist.get_world_size()))


def _offloads(config: Mapping) -> bool:
    target = config.get("zero_optimization", {}).get("offload_optimizer", {})
    return target.get("device", "none") not in (None, "none")


def clamp_temperature(engine: deepspeed.DeepSpeedEngine) -> None:
    """Keeps the temperature in its bounds where the optimiser keeps it: were it clamped in the model alone, ZeRO would
    write the unclamped master back at the next step. Costs no communication: every rank clamps the same number."""
    task = engine.module
    task.clamp_temperature()
    if task.temperature is not None and engine.zero_optimization():
        safe_set_full_fp32_param(task.temperature, task.temperature.data)


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
