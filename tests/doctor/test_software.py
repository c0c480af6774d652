"""Versions, compilers and what building leaves behind, judged on stand-ins."""

from __future__ import annotations

import os
import time

from packaging.requirements import Requirement

from albef_ds.doctor import software
from tests.doctor.told import states


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


def test_tcmalloc_is_told_where_cpus_compute(monkeypatch):
    def told(library, preloaded=""):
        monkeypatch.setattr(software.optional, "tcmalloc", lambda: library)
        monkeypatch.setenv("LD_PRELOAD", preloaded)
        return software.check_allocator()

    assert {told(None).state, told("libtcmalloc.so.4").state} == {"ok"}  # nothing needs it
    assert "apt install libtcmalloc-minimal4" in told(None).text
    assert "LD_PRELOAD=libtcmalloc.so.4 loads it" in told("libtcmalloc.so.4").text
    assert told("libtcmalloc.so.4", "libtcmalloc.so.4").text.endswith("libtcmalloc.so.4, loaded")


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
