"""A small shapes world that the data tests share."""

import pytest

from albef_ds.data.annotations import read_pairs
from albef_ds.data.shapes_world import write_shapes_world
from albef_ds.data.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return write_shapes_world(tmp_path_factory.mktemp("data") / "shapes", images=60, test_images=12, size=48)


@pytest.fixture(scope="session")
def annotations(world):
    return read_pairs(world.train)


@pytest.fixture(scope="session")
def tokenizer(world):
    return load_tokenizer(world.vocab)
