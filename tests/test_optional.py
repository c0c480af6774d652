"""Optional packages are told from what is installed, without running any of them."""

from __future__ import annotations

import importlib
import logging

import pytest

from albef_ds import optional

BOMB = "raise RuntimeError('looking must not import')\n"
RIGHT = ("apex/__init__.py", "apex/normalization/__init__.py", "apex/normalization/fused_layer_norm.py")
EXTENSIONS = ("amp_C.py", "fused_layer_norm_cuda.py")
WRONG = ("apex/__init__.py", "apex/models.py", "apex/views.py")


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts made-up packages, which fail when imported, onto sys.path."""

    def put(*files: str, metadata: tuple[str, str] | None = None):
        for file in files:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text(BOMB)
        if metadata:
            folder = tmp_path / f"{metadata[0].replace('-', '_')}-{metadata[1]}.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {metadata[0]}\nVersion: {metadata[1]}\n")
        importlib.invalidate_caches()
        optional.find.cache_clear()

    monkeypatch.syspath_prepend(str(tmp_path))
    yield put
    optional.find.cache_clear()


def test_nvidias_apex_is_found(install):
    install(*RIGHT, *EXTENSIONS, metadata=("apex", "0.1"))
    assert optional.find("apex") == optional.Presence(True, "0.1", "")


def test_the_other_apex_is_named_once_in_plain_words(install, caplog):
    install(*WRONG, metadata=("apex", "0.9.10.dev0"))
    with caplog.at_level(logging.WARNING):
        found = [optional.find("apex") for _ in range(3)]
    assert not found[0].available and found[0].version == "0.9.10.dev0"
    assert "another project of that name" in found[0].reason and "github.com/NVIDIA/apex" in found[0].reason
    assert len([line for line in caplog.messages if "another project" in line]) == 1


def test_an_apex_without_its_extensions_is_not_enough(install):
    install(*RIGHT, EXTENSIONS[1])
    assert optional.find("apex").reason == (
        "NVIDIA's apex was built without amp_C: build it again with its CUDA extensions"
    )


def test_a_package_is_found_without_being_imported(install):
    install("flash_attn/__init__.py", metadata=("flash-attn", "2.8.3"))
    assert optional.find("flash-attn") == optional.Presence(True, "2.8.3", "")


def test_a_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(optional, "module_exists", lambda module: False)
    optional.find.cache_clear()
    for name, package in optional.PACKAGES.items():
        found = optional.find(name)
        assert not found.available and found.version is None and package.install in found.reason
    optional.find.cache_clear()


def test_a_dotted_name_without_its_parent_is_missing():
    assert not optional.module_exists("no_such_parent.child")


@pytest.mark.parametrize("version, fits", [("2.9.1", False), ("2.10.0+cu130", False), ("2.11.0", True), ("3.0", True)])
def test_torchs_varlen_needs_the_signature_of_2_11(monkeypatch, version, fits):
    monkeypatch.setattr(optional.metadata, "version", lambda name: version)
    assert (optional.old_varlen() is None) == fits


def test_describe_has_a_line_for_every_package(install):
    install(*WRONG)
    lines = optional.describe()
    assert [line.split()[0] for line in lines] == list(optional.PACKAGES)
    assert "another project" in next(line for line in lines if line.startswith("apex"))
