"""The doctor: every judgement on stand-ins, and the whole of it on a recipe, on broken ones and over two ranks."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from torch.autograd.graph import saved_tensors_hooks

from albef_ds.__main__ import main
from albef_ds.config import load_config, plan_batches
from albef_ds.doctor import hardware, network, sizes, software
from albef_ds.doctor.finding import Finding, status
from albef_ds.doctor.hardware import GIB, Gpu
from albef_ds.doctor.network import Link, Versions
from albef_ds.tasks.registry import TASKS
from albef_ds.training.dry_run import synthetic_batch
from tests.ranks import run_ranks
from tests.training_run import write_recipe

A100 = Gpu(0, "NVIDIA A100-SXM4-80GB", 80 * GIB, 79 * GIB, (8, 0))
CODE = ["sm_75", "sm_80", "sm_90", "compute_90"]


def doctor(*arguments: str) -> tuple[int, list[Finding]]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main(["doctor", *arguments, "--json"])
    told = json.loads(out.getvalue().splitlines()[-1])
    assert told["status"] == code
    return code, [Finding(**finding) for finding in told["findings"]]


def of(findings: list[Finding], subject: str) -> list[Finding]:
    return [finding for finding in findings if finding.subject == subject]


def states(findings) -> list[str]:
    return [finding.state for finding in findings]


def test_what_is_not_ok_says_what_to_do_and_problems_alone_count():
    finding = Finding("warning", "cores", "2 for 8", "fewer workers")
    assert str(finding).splitlines()[1].strip() == "-> fewer workers" and "warning" in str(finding)
    assert "->" not in str(Finding("ok", "cores", "8 for 8"))
    assert status([finding, Finding("ok", "a", "b")]) == 0
    assert status([finding, Finding("problem", "a", "b", "c")]) == 1


# -- the whole ---------------------------------------------------------------------------------------------------------


def test_a_sound_recipe_has_no_problem(tmp_path):
    recipe = str(write_recipe(tmp_path))
    code, findings = doctor(recipe, "--gpus", "2")
    assert code == 0, [str(f) for f in findings if f.state == "problem"]
    assert "6 a forward pass x 2 accumulated x 2 ranks" in of(findings, "batches")[0].text
    assert "120 samples, 4 of 4" in of(findings, "data")[0].text
    assert of(findings, "disk") and of(findings, "memory") and of(findings, "tokenizer")
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob(".doctor*"))  # it leaves nothing


def test_without_a_recipe_it_looks_at_the_machine(capsys):
    assert main(["doctor"]) in (0, 1)  # what this machine lacks is not known here
    told = capsys.readouterr().out
    for subject in ("python", "torch", "deepspeed", "compiler", "cores", "/dev/shm", "open files"):
        assert f" {subject} " in told, subject


def break_images(folder: Path, share: float) -> None:
    images = sorted((folder / "data" / "images").glob("*.jpg"))
    for image in images[: int(share * len(images))]:
        image.write_bytes(b"no image")


BROKEN = {
    "misspelt key": (["train.micro_batsh=4"], None, "recipe", "train.micro_batch"),
    "ranks": (["--gpus", "7"], None, "batches", "does not divide over 7 ranks"),
    "queue": (["model.queue_size=8"], None, "batches", "model.queue_size 8"),
    "deepspeed file": (["--deepspeed_config", "no.json"], None, "deepspeed file", "no.json"),
    "vocabulary": (["model.text.vocab_size=5"], None, "tokenizer", "smaller than the vocabulary"),
    "no vocabulary": (["data.tokenizer=nowhere/vocab.txt"], None, "tokenizer", "nowhere/vocab.txt"),
    "annotations": (["data.train=[nowhere.json]"], None, "data", "nowhere.json"),
    "shards": (["data.train=[]", "data.shards=[nowhere]"], None, "data", "nowhere"),
    "no data": (["data.train=[]"], None, "data", "are empty"),
    "images": ([], lambda folder: break_images(folder, 1.0), "data", "0 of 4"),
    "test": (["data.test=nowhere.json"], None, "data", "data.test: nowhere.json"),
    "weights": (["model.weights=nowhere.pth"], None, "weights", "nowhere.pth is not there"),
    "output": (["output_dir=/proc/run"], None, "disk", "cannot be written"),
    "batch": (["train.global_batch=240", "model.queue_size=300"], None, "data", "120 samples do not fill"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_a_problem_that_names_it(tmp_path, name):
    arguments, damage, subject, named = BROKEN[name]
    recipe = str(write_recipe(tmp_path))
    if damage:
        damage(tmp_path)
    code, findings = doctor(recipe, *arguments)
    problems = [f for f in of(findings, subject) if f.state == "problem"]
    assert code == 1 and any(named in f.text for f in problems), [str(f) for f in findings]
    assert all(f.advice for f in findings if f.state != "ok")


def test_some_broken_images_are_a_warning(tmp_path):
    recipe = str(write_recipe(tmp_path))
    break_images(tmp_path, 0.5)
    code, findings = doctor(recipe)
    assert code == 0 and "2 of 4" in of(findings, "data")[0].text and of(findings, "data")[0].state == "warning"


def test_numbers_of_ranks_that_would_do_are_named(tmp_path):
    _, findings = doctor(str(write_recipe(tmp_path)), "--gpus", "3")
    (batches,) = of(findings, "batches")
    assert batches.state == "problem"  # 8 samples a rank, not a multiple of 6
    assert batches.advice == "with these settings 1, 2, 4 ranks would do"


# -- software ----------------------------------------------------------------------------------------------------------


def test_versions_outside_of_what_is_required(monkeypatch):
    versions = {"torch": "2.13.0+cu130", "deepspeed": "0.19.8", "timm": "1.0.20rc1"}

    def version(name):
        if name not in versions:
            raise software.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(software.metadata, "version", version)
    wanted = ["torch>=2.6,<2.13", "deepspeed>=0.19.4,<0.20", "timm>=1.0.20", "tqdm>=4", 'ruff>=0.8; extra == "dev"']
    found = {f.subject: f for f in software.check_versions([Requirement(w) for w in wanted])}
    assert {name: f.state for name, f in found.items()} == {
        "torch": "problem",
        "deepspeed": "ok",
        "timm": "problem",
        "tqdm": "problem",
    }
    assert "2.13.0" in found["torch"].text and "<2.13" in found["torch"].advice
    assert found["tqdm"].text == "not installed"


def test_an_old_python():
    assert software.check_python((3, 9, 18)).state == "problem"
    assert software.check_python((3, 13, 0)).state == "ok"


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(software.shutil, "which", lambda name: None)
    monkeypatch.setattr(software.sys, "executable", "/nowhere/python")
    monkeypatch.setattr(software.torch.cuda, "is_available", lambda: False)
    assert states(software.check_compilers(offload=False)) == ["problem", "problem"]


def test_two_kinds_of_ninja_build_everything_again():
    assert software.judge_ninja({"/venv/bin/ninja": "1.13.0"}).state == "ok"
    assert software.judge_ninja({"/venv/bin/ninja": "1.13.0", "/usr/bin/ninja": "1.13.0"}).state == "ok"
    found = software.judge_ninja({"/usr/bin/ninja": "1.11.1", "/venv/bin/ninja": "1.13.0"})
    assert found.state == "warning" and "/usr/bin/ninja 1.11.1" in found.text
    assert software.ninja_version("/nowhere/ninja") == "that does not start"


def test_a_lock_that_is_left_over_and_one_of_a_build(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name in ("old", "py311_cpu/new", "none"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("old", "py311_cpu/new"):
        (tmp_path / name / "lock").touch()
    os.utime(tmp_path / "old" / "lock", (time.time() - 3600,) * 2)
    found = {f.state: f for f in software.check_locks(software.extension_folders())}
    assert found.keys() == {"problem", "warning"}
    assert found["problem"].advice == f"rm {tmp_path / 'old' / 'lock'}" and "py311_cpu/new" in found["warning"].text


# -- hardware ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("built", "driver", "available", "wanted", "state"),
    [
        ("13.0", (13, 0), True, True, "ok"),
        ("12.8", (12, 4), True, True, "ok"),  # any driver of 12 serves any 12
        ("12.8", (13, 0), True, True, "ok"),
        ("13.0", (12, 8), False, True, "problem"),
        ("13.0", (13, 0), False, True, "problem"),  # it is there and cannot be used
        ("13.0", None, False, True, "warning"),
        ("13.0", None, False, False, "ok"),
        (None, (13, 0), False, True, "problem"),
        (None, None, False, False, "ok"),
    ],
)
def test_driver_and_torch(built, driver, available, wanted, state):
    found = hardware.check_driver(built, driver, available, wanted)
    assert found.state == state and bool(found.advice) == (state != "ok")


@pytest.mark.parametrize(
    ("change", "state", "named"),
    [
        ({}, "ok", "80.0 GiB, compute capability 8.0"),
        ({"capability": (8, 6)}, "ok", "8.6"),  # code of 8.0 runs on it
        ({"capability": (10, 0)}, "ok", "10.0"),  # compiled from PTX of 9.0
        ({"capability": (7, 0)}, "problem", "no code for it"),
        ({"capability": (7, 5)}, "warning", "no bf16"),
        ({"free": 60 * GIB}, "warning", "20.0 GiB are in use"),
        ({"ecc_errors": 0}, "ok", "A100"),
        ({"ecc_errors": 3}, "problem", "3 uncorrected ECC errors"),
    ],
)
def test_a_gpu(change, state, named):
    (found,) = hardware.check_gpus([replace(A100, **change)], CODE)
    assert found.state == state and named in found.text


def test_gpus_of_different_kinds_and_without_access_to_each_other():
    pair = [replace(A100, peers=(1,)), replace(A100, index=1, peers=(0,))]
    assert states(hardware.check_gpus(pair, CODE)) == ["ok", "ok", "ok"]
    found = list(hardware.check_gpus([A100, replace(A100, index=1, name="NVIDIA A30")], CODE))
    assert {f.subject for f in found if f.state == "warning"} == {"gpus", "peer access"}
    assert "0-1" in found[-1].text


def test_cores_shared_memory_and_open_files():
    assert hardware.check_cores(64, 8, 7).state == "ok"
    assert "data.workers=3" in hardware.check_cores(32, 8, 4).advice
    assert "data.workers=0" in hardware.check_cores(2, 8, 4).advice
    assert hardware.check_shm(64 * 2**20, 100 * 2**20, 1).state == "problem"
    assert hardware.check_shm(GIB, 100 * 2**20, 8).state == "ok"
    assert hardware.check_files((1024, 4096), 4).state == "ok"
    assert "ulimit -n 4096" in hardware.check_files((1024, 4096), 32).advice
    assert "ulimit -n 65536" in hardware.check_files((256, hardware.resource.RLIM_INFINITY), 0).advice
    assert hardware.check_files((hardware.resource.RLIM_INFINITY,) * 2, 32).state == "ok"


# -- sizes -------------------------------------------------------------------------------------------------------------

SHAPE = """model: {embed_dim: 32, queue_size: 64,
  vision: {width: 64, layers: 3, heads: 2, patch_size: 8, image_size: 48},
  text: {width: 64, layers: 4, fusion_layer: 2, heads: 2, mlp_width: 256, vocab_size: 200, max_positions: 64}}
train: {global_batch: 16}"""


def shaped(tmp_path: Path, *overrides: str):
    (tmp_path / "shape.yaml").write_text(SHAPE)
    return load_config(tmp_path / "shape.yaml", overrides)


def kept_for_backward(config, samples: int, autocast: bool) -> int:
    """Bytes of the distinct tensors that a real step keeps, without parameters and buffers."""
    task = TASKS[config.task](config.model)
    if config.train.activation_checkpointing:
        task.model.enable_checkpointing()
    own = {t.untyped_storage().data_ptr() for t in (*task.parameters(), *task.buffers())}
    seen = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    task.start_step(0.4)
    with saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = task(synthetic_batch(config, samples, 3, 2))  # they hold the graph, and the graph the tensors
        assert losses
    return sum(size for pointer, size in seen.items() if pointer not in own)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_the_estimate_of_activations_is_near_what_a_step_keeps(tmp_path, task, autocast):
    config = shaped(tmp_path, f"task={task}")
    measured = (kept_for_backward(config, 8, autocast) - kept_for_backward(config, 4, autocast)) / 4
    assert 0.7 < sizes.activation_bytes(config, autocast) / measured < 1.5


def test_checkpointed_activations_are_less_and_the_estimate_knows(tmp_path):
    config = shaped(tmp_path, "train.activation_checkpointing=true")
    measured = (kept_for_backward(config, 8, True) - kept_for_backward(config, 4, True)) / 4
    assert measured < sizes.activation_bytes(config, True) < sizes.activation_bytes(shaped(tmp_path), True)


def test_sizes_are_those_of_the_real_model(tmp_path):
    config = shaped(tmp_path)
    task = TASKS["pretraining"](config.model)
    found = sizes.sizes_of(config)
    assert found.student == sum(p.numel() for p in task.model.parameters())
    assert found.teacher == sum(p.numel() for p in task.teacher.parameters())
    assert found.queues == sum(b.numel() * b.element_size() for b in task.buffers())


ZERO2 = {"zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000}}
OFFLOAD = {"zero_optimization": ZERO2["zero_optimization"] | {"offload_optimizer": {"device": "cpu"}}}


def test_state_is_the_dry_runs_arithmetic_divided_among_the_ranks(tmp_path):
    config, model = shaped(tmp_path), sizes.Sizes(student=1000, teacher=1000, queues=64)
    plan = plan_batches(config, 4)
    assert sizes.estimate(config, ZERO2, plan, model).state == 4000 + 4000 + 64 + 16 * 1000 / 4
    assert sizes.estimate(config, OFFLOAD, plan, model).state == 4000 + 4000 + 64 + 4 * 1000 / 4
    autocast = ZERO2 | {"torch_autocast": {"enabled": True}}
    assert sizes.estimate(config, autocast, plan, model).state == 4000 + 4000 + 64 + 4000 + 2 * 2000
    assert sizes.estimate(config, ZERO2, plan, model).buckets == 8000
    assert model.checkpoint == 8000 + 64 + 12000


def test_memory_that_does_not_suffice_and_what_would(tmp_path, monkeypatch):
    monkeypatch.setattr(sizes, "CONTEXT", 0)  # it would outweigh so small a model
    config, model = shaped(tmp_path), sizes.Sizes(student=1000, teacher=1000, queues=0)
    plan = plan_batches(config, 1)  # 16 samples
    needed = sizes.estimate(config, ZERO2, plan, model, 0).total
    one = sizes.activation_bytes(config, False)

    def found(room: float, settings=config) -> Finding:
        return sizes.check_memory(settings, ZERO2, plan, model, int(room))

    assert found(needed / sizes.TIGHT + 100).state == "ok"
    tight = found(needed + 100)
    assert tight.state == "warning" and "train.micro_batch=" in tight.advice
    assert found(needed - 100).state == "problem"
    exactly_four = (needed - 12 * one) / sizes.TIGHT + 100
    assert found(exactly_four).advice.startswith("train.micro_batch=4 ")
    assert found(2).advice.startswith("train.activation_checkpointing=true")
    assert "zero2_offload" in found(1, shaped(tmp_path, "train.activation_checkpointing=true")).advice
    unknown = sizes.check_memory(config, ZERO2, plan, model, None)
    assert unknown.state == "ok" and "estimate" in unknown.text


def test_room_on_the_disk_and_its_speed(tmp_path):
    config = load_config(write_recipe(tmp_path, checkpoint={"keep": 2, "keep_every": 100}))
    assert sizes.kept(config, 1050) == 13 and sizes.kept(config, None) == 3
    assert sizes.judge_disk(tmp_path, 12 * 10**9, 10**8, 13, 10**9).state == "problem"
    assert sizes.judge_disk(tmp_path, 14 * 10**9, 10**8, 13, 10**9).state == "ok"
    assert sizes.judge_disk(tmp_path, 14 * 10**9, 10**6, 13, 10**9).state == "warning"
    assert sizes.write_speed(tmp_path, 2**20) > 0
    assert sizes.check_host_memory(sizes.Sizes(100, 100, 0), 1999, 8, 8).state == "warning"
    assert sizes.check_host_memory(sizes.Sizes(100, 100, 0), 2000, 8, 8).state == "ok"


# -- network -----------------------------------------------------------------------------------------------------------


def test_a_hostfile(tmp_path):
    file = tmp_path / "hostfile"
    file.write_text("# two\nlocalhost slots=2\nno-such-host.invalid slots=1\n")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        hosts, findings = network.check_hostfile(file, port)
        assert network.check_host_address("localhost", port).state == "ok"
    assert hosts == {"localhost": 2, "no-such-host.invalid": 1}
    found = of(findings, "host")
    assert states(found) == ["ok", "problem"] and "no-such-host.invalid" in found[1].text
    assert "different numbers of slots" in of(findings, "hostfile")[1].text
    assert network.check_host_address("localhost", port).state == "warning"  # nobody listens any more


@pytest.mark.parametrize("text", ["node1 slots=eight\n", "node1\n", "node1 slots=1\nnode1 slots=1\n", ""])
def test_a_hostfile_that_is_none(tmp_path, text):
    (tmp_path / "hostfile").write_text(text)
    assert states(network.read_hostfile(tmp_path / "hostfile")[1]) == ["problem"]
    assert states(network.read_hostfile(tmp_path / "nowhere")[1]) == ["problem"]


def test_a_host_that_calls_itself_by_a_loopback_address(monkeypatch):
    """As Debian's installer writes it into /etc/hosts."""
    monkeypatch.setattr(network.socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", ("127.0.1.1", 22))])
    found = network.check_host_address("node1")
    assert found.state == "problem" and "/etc/hosts" in found.advice


def test_settings_that_the_launcher_would_not_pass_on():
    env = {"NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "eth0", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1", "HOME": "/root"}
    launcher, settings = network.check_launcher(lambda name: f"/usr/bin/{name}", env)
    assert launcher.state == "ok"
    assert settings.text.startswith("GLOO_SOCKET_IFNAME, TORCH_NCCL_DUMP_ON_TIMEOUT: ")
    (missing,) = network.check_launcher(lambda name: None if name == "pdsh" else name, {})
    assert missing.state == "warning" and "pdsh" in missing.text and "--no_ssh" in missing.advice


def test_links_clocks_versions_and_the_shared_folder_are_judged():
    fast, slow = Link(20e9, 30e-6, True), Link(0.1e9, 5e-3, True)
    assert network.judge_link(fast, 16, 2, "cuda").state == "ok"
    assert network.judge_link(slow, 16, 2, "cuda").state == "warning"
    assert network.judge_link(slow, 2, 1, "cpu").state == "ok"  # gloo is no faster
    assert network.judge_link(replace(fast, right=False), 16, 2, "cuda").state == "problem"
    assert network.judge_clocks({"a": 0.01, "b": -0.2}).state == "ok"
    behind = network.judge_clocks({"a": 0.01, "b": -7.0})
    assert behind.state == "warning" and "b's: -7000 ms" in behind.text
    one = Versions("3.11", "2.11.0", "2.28.9", "0.19.8", "0.1.0")
    assert states(network.judge_versions([("a", one), ("b", one)])) == ["ok"]
    found = list(network.judge_versions([("a", one), ("b", replace(one, nccl="2.21.5"))]))
    assert states(found) == ["ok", "problem"] and "2.21.5 on b" in found[1].text
    assert network.judge_output(Path("run"), []).state == "ok"
    assert "b do not see" in network.judge_output(Path("run"), ["b"]).text


def test_a_master_that_nobody_reaches(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for key, value in {"RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
            monkeypatch.setenv(key, value)
        assert network.reach_master(1) is None
    found = network.reach_master(0.1)
    assert found.state == "problem" and f"port {port}" in found.text


def doctor_on_a_rank(recipe: str) -> tuple[int, str]:
    os.environ["LOCAL_RANK"] = "0"  # each rank a host of its own
    if os.environ["RANK"] == "1":
        software.OLDEST_PYTHON = (99, 0)  # a host with a trouble of its own
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main(["doctor", recipe, "--json"])
    return code, out.getvalue()


def test_over_two_ranks_all_know_what_one_host_lacks_and_rank_0_tells(tmp_path):
    recipe = write_recipe(tmp_path)
    first, second = run_ranks(2, doctor_on_a_rank, str(recipe))
    assert first[0] == second[0] == 1 and "findings" not in second[1]
    findings = [Finding(**f) for f in json.loads(first[1].splitlines()[-1])["findings"]]
    own, other = of(findings, "python")
    assert own.state == "ok" and other.state == "problem" and other.text.startswith("on ")
    for subject in ("ranks", "network", "clocks", "output_dir"):
        assert states(of(findings, subject)) == ["ok"], subject
    assert of(findings, "batches")[0].text.endswith("x 2 ranks")
    assert not list(tmp_path.glob(".doctor*"))


def test_every_recipe_of_the_package_can_be_examined():
    """Without its data: what is not there is a finding, never a traceback."""
    for file in sorted((Path(main.__code__.co_filename).parent / "configs").glob("*.yaml")):
        arguments = [file.stem, "data.tokenizer=nowhere/vocab.txt", "output_dir=."]
        code, findings = doctor(*arguments)
        assert code == 1 and of(findings, "recipe")[0].state == "ok", file.stem
        assert yaml.safe_load(file.read_text()).get("task", "pretraining") in of(findings, "recipe")[0].text
