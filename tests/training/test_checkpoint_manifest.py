"""Manifests from strangers: whatever stands in them is either a checked manifest or a plain refusal."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albef_ds.training.checkpoint_manifest import (
    MANIFEST,
    CheckpointError,
    Manifest,
    config_hash,
    differences,
    parse_manifest,
    read_manifest,
    verify,
)

CONTENTS = b"some weights"
ENTRY = {"size": len(CONTENTS), "sha256": hashlib.sha256(CONTENTS).hexdigest()}


def manifest(**changes) -> dict:
    return {
        "schema": 2,
        "step": 7,
        "world_size": 2,
        "identity": {"task": "pretraining"},
        "versions": {"torch": "2"},
        "files": {"a.pt": ENTRY},
    } | changes


def write_checkpoint(folder, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "a.pt").write_bytes(CONTENTS)
    (folder / MANIFEST).write_text(json.dumps(manifest(**changes)))
    return folder


def test_what_was_written_is_read(tmp_path):
    config = {"train": {"seed": 1}}
    folder = write_checkpoint(tmp_path / "c", config=config, config_sha256=config_hash(config))
    found = verify(folder)
    assert (found.step, found.world_size, found.total_bytes) == (7, 2, len(CONTENTS))
    assert parse_manifest(found.to_json().encode(), "again") == found


def test_a_checkpoint_of_the_schema_before_is_still_read(tmp_path):
    assert verify(write_checkpoint(tmp_path / "c", schema=1)).config is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=10), children, max_size=4),
    max_leaves=12,
)


@given(raw=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
@settings(deadline=None)
def test_any_bytes_are_refused_with_a_message(raw):
    with pytest.raises(CheckpointError, match="somewhere"):
        parse_manifest(raw, "somewhere")


@given(changes=st.dictionaries(st.sampled_from(sorted([*manifest(), "config", "config_sha256"])), JSON, max_size=3))
@settings(deadline=None)
def test_any_values_of_the_right_keys_are_checked_or_refused(changes):
    try:
        found = parse_manifest(json.dumps(manifest(**changes)).encode(), "somewhere")
    except CheckpointError as error:
        assert "somewhere" in str(error)
        return
    assert isinstance(found, Manifest) and found.total_bytes >= 0
    assert type(found.step) is int and found.step >= 0 and found.world_size >= 1


@pytest.mark.parametrize(
    "name",
    [
        "../a.pt",
        "/etc/passwd",
        "a/../../b",
        "..",
        ".",
        "",
        "a\\..\\b",
        "sub/a.pt",
        ".hidden",
        "a\n",
        MANIFEST,
        "x" * 999,
    ],
)
def test_names_that_lead_elsewhere_are_refused(name):
    with pytest.raises(CheckpointError, match="plain names"):
        parse_manifest(json.dumps(manifest(files={name: ENTRY})).encode(), "m")


@pytest.mark.parametrize("size", [-1, 10**30, 1 << 60, 1.5, "12", None, True, float("inf")])
def test_absurd_sizes_are_refused(size):
    with pytest.raises(CheckpointError, match="size"):
        parse_manifest(json.dumps(manifest(files={"a.pt": {**ENTRY, "size": size}})).encode(), "m")


@pytest.mark.parametrize("depth", [40, 5_000, 200_000])
def test_deep_nesting_is_refused(depth):
    nested = "[" * depth + "]" * depth
    text = json.dumps(manifest())[:-1] + f', "config": {{"x": {nested}}}}}'
    with pytest.raises(CheckpointError, match="m: "):
        parse_manifest(text.encode(), "m")


def test_numbers_of_many_digits_and_endless_files_are_refused(tmp_path):
    text = json.dumps(manifest()).replace('"step": 7', f'"step": {"9" * 100_000}')
    with pytest.raises(CheckpointError):
        parse_manifest(text.encode(), "m")
    with open(tmp_path / MANIFEST, "wb") as file:
        file.truncate(1 << 30)  # of zeros, none of them on the disk
    with pytest.raises(CheckpointError, match="larger than"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("make", [lambda p: p.symlink_to("/dev/zero"), os.mkfifo, Path.mkdir])
def test_a_manifest_that_is_no_file_is_not_waited_for(tmp_path, make):
    make(tmp_path / MANIFEST)
    with pytest.raises(CheckpointError, match="manifest.json: unreadable: (not an ordinary file|Is a directory)"):
        read_manifest(tmp_path)


def test_a_changed_configuration_is_found():
    config = {"train": {"seed": 1}}
    text = json.dumps(manifest(config={"train": {"seed": 2}}, config_sha256=config_hash(config)))
    with pytest.raises(CheckpointError, match="configuration has changed"):
        parse_manifest(text.encode(), "m")
    assert config_hash({"a": 1, "b": 2}) == config_hash({"b": 2, "a": 1}) != config_hash({"a": 1, "b": 3})


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: p.write_bytes(CONTENTS[:-1]), r"11 bytes instead of 12"),
        (lambda p: p.write_bytes(b"some WEIGHTS"), rf"sha256 is \w+, expected {ENTRY['sha256']}"),
        (lambda p: p.unlink(), "missing"),
        (lambda p: (p.unlink(), p.mkdir()), "not an ordinary file"),
        (lambda p: (p.unlink(), os.mkfifo(p)), "not an ordinary file"),
    ],
)
def test_a_refusal_names_the_file_and_what_was_expected(tmp_path, damage, message):
    folder = write_checkpoint(tmp_path / "c")
    damage(folder / "a.pt")
    with pytest.raises(CheckpointError, match=rf"a\.pt: .*{message}"):
        verify(folder)


def test_links_are_not_followed_even_to_the_right_contents(tmp_path):
    folder = write_checkpoint(tmp_path / "c")
    outside = tmp_path / "outside"
    (folder / "a.pt").rename(outside)
    (folder / "a.pt").symlink_to(outside)
    with pytest.raises(CheckpointError, match="links are not followed"):
        verify(folder)


def test_differences_name_the_key_and_both_values():
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == ["a.c was 2, is 3"]
    assert differences({"a": [1]}, {"a": [1]}) == []
