"""The fuzz targets with valid files that are cut, changed and joined: quick, and the same every time."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.seeds import seeds, words
from tests.fuzz.targets import TARGETS, run


@st.composite
def changed(draw, target: str) -> bytes:
    """A valid input with up to four changes: bytes replaced, removed or doubled, a word put in, another's end."""
    every = seeds(target)
    data = draw(st.sampled_from(every))
    for _ in range(draw(st.integers(1, 4))):
        at, length = draw(st.integers(1, len(data))), draw(st.integers(0, 24))
        before, between, after = data[:at], data[at : at + length], data[at + length :]
        between = draw(
            st.sampled_from([b"", between * 2, b"0"])
            | st.binary(min_size=1, max_size=4)
            | st.sampled_from(words(target))
            | st.sampled_from(every).map(lambda other: other[1:][-200:])
        )
        data = before + between + after
    return data


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", TARGETS)
def test_changed_files_are_read_or_refused(target, tmp_path):
    run(target, seeds(target)[0], tmp_path)  # what is imported late is imported now

    @given(data=changed(target))
    @settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=[*HealthCheck])
    def reads(data):
        run(target, data, tmp_path)

    reads()
