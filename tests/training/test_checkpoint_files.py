"""A checkpoint's files from strangers: nothing in them is executed, nothing unpacks to an absurd size."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albef_ds.training.checkpoint_files import read_tensors, remove_folder, write_tensors
from albef_ds.training.checkpoint_manifest import CheckpointError
from albef_ds.training.snapshot import Snapshots, copied


class Bomb:
    """Leaves a mark in the working folder where it is unpickled."""

    def __reduce__(self):
        return (os.system, ("touch exploded",))


@pytest.fixture(autouse=True)
def nothing_explodes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path("exploded").exists()


def good_state() -> dict:
    return {
        "module": OrderedDict(a=torch.arange(6.0)),
        "step": 3,
        "names": ["x", ("y", None)],
        "half": torch.ones(2).half(),
    }


def test_tensors_and_plain_containers_come_back(tmp_path):
    write_tensors(good_state(), tmp_path / "a.pt")
    found = read_tensors(tmp_path / "a.pt")
    assert torch.equal(found["module"]["a"], torch.arange(6.0)) and found["half"].dtype == torch.float16
    assert (found["step"], found["names"]) == (3, ["x", ("y", None)])


@pytest.mark.parametrize("where", ["module", "optimizer_state_dict", "torch", "python"])
def test_code_in_any_file_is_not_executed(tmp_path, where):
    torch.save({**good_state(), where: Bomb()}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt: .*nothing was executed"):
        read_tensors(tmp_path / "a.pt")


def test_code_in_files_of_older_forms_is_not_executed(tmp_path):
    torch.save({"module": Bomb()}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb()))
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("script/data.pkl", pickle.dumps(Bomb()))
        archive.writestr("script/constants.pkl", pickle.dumps(Bomb()))
        archive.writestr("script/version", "3\n")
    for name in ("legacy.pt", "plain.pt", "script.pt"):
        with pytest.raises(CheckpointError, match=name):
            read_tensors(tmp_path / name)


def test_classes_beyond_the_short_list_are_refused_and_those_on_it_are_read(tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.save({"scaler": LossScaler(1), "part": fragment_address(numel=3, start=1)}, tmp_path / "a.pt")
    assert read_tensors(tmp_path / "a.pt")["part"].numel == 3
    torch.save({"path": Path("x")}, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match="neither tensor nor plain data"):
        read_tensors(tmp_path / "b.pt")


def test_compressed_entries_which_could_unpack_to_any_size_are_refused(tmp_path):
    torch.save({"x": torch.zeros(1_000_000)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name, contents in entries.items():
            new.writestr(name, contents)
    assert (tmp_path / "b.pt").stat().st_size < 100_000
    with pytest.raises(CheckpointError, match="compressed"):
        read_tensors(tmp_path / "b.pt")


GOOD = io.BytesIO()
torch.save(good_state(), GOOD)


@given(at=st.integers(0, len(GOOD.getvalue()) - 1), byte=st.integers(0, 255), cut=st.booleans())
@settings(deadline=None, max_examples=60)
def test_damage_anywhere_is_refused_or_harmless(tmp_path_factory, at, byte, cut):
    contents = bytearray(GOOD.getvalue())
    contents[at] = byte
    path = tmp_path_factory.mktemp("damaged") / "a.pt"
    path.write_bytes(contents[:at] if cut else contents)
    try:
        assert isinstance(read_tensors(path), dict | list | str | int | torch.Tensor | None)
    except CheckpointError as error:
        assert "a.pt" in str(error)


@given(contents=st.binary(max_size=400))
@settings(deadline=None, max_examples=40)
def test_any_bytes_are_refused(tmp_path_factory, contents):
    path = tmp_path_factory.mktemp("any") / "a.pt"
    path.write_bytes(contents)
    with pytest.raises(CheckpointError):
        read_tensors(path)


def test_a_folder_that_is_a_link_keeps_what_it_leads_to(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("")
    (tmp_path / "step_00000001").symlink_to(outside)
    remove_folder(tmp_path / "step_00000001", first="manifest.json")
    assert (outside / "precious").exists()


# -- snapshots ---------------------------------------------------------------------------------------------------------


def test_a_copy_shares_nothing_and_keeps_the_form():
    class Versioned(OrderedDict):
        pass

    state = OrderedDict(w=torch.arange(4.0)[1:3], n=[1, (torch.ones(()), {"k": "v"})])
    state._metadata = {"": {"version": 2}}
    twin = copied(state, lambda tensor, key: tensor.clone())
    assert type(twin) is OrderedDict and twin._metadata == state._metadata
    state["w"].zero_()
    state["n"][1][1]["k"] = "changed"
    assert twin["w"].tolist() == [1, 2] and twin["n"][1][1] == {"k": "v"} and isinstance(twin["n"][1], tuple)


def test_buffers_are_used_again_unless_the_shape_changes():
    snapshots, devices = Snapshots(), set()
    first = snapshots._copy(torch.zeros(3), "a", devices)
    assert snapshots._copy(torch.ones(3), "a", devices) is first and first.tolist() == [1, 1, 1]
    assert snapshots._copy(torch.ones(4), "a", devices) is not first
    assert snapshots._copy(torch.ones(3), "b", devices) is not first


def test_what_the_manifest_is_made_of_is_json(tmp_path):
    entry = write_tensors({"x": torch.zeros(1)}, tmp_path / "a.pt")
    assert json.loads(json.dumps(entry.model_dump())) == {"size": entry.size, "sha256": entry.sha256}
