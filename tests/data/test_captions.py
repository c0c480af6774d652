import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albef_ds.data.captions import clean_caption


@pytest.mark.parametrize(
    "raw, clean",
    [
        ("A dog's ball.", "a dogs ball"),
        ('"Hello," he said: (yes!) *now* #1; ~x?', "hello he said yes now 1 x"),
        ("black-and-white / colour", "black and white colour"),
        ("<PERSON> and <person>s", "person and persons"),
        ("  two   spaces \t\n here \n", "two spaces here"),
        ("one\ttab stays", "one\ttab stays"),  # only runs of whitespace are joined, as in the reference
        ("line\n", "line"),
        ("tab\t", "tab\t"),
        ("\nline", "\nline"),
        ("...", ""),
        ("", ""),
        ("ÉCOLE 狗 🐕", "école 狗 🐕"),
        ("nul\x00byte", "nul\x00byte"),
    ],
)
def test_cleaning(raw, clean):
    assert clean_caption(raw) == clean


def test_words_are_cut_at_the_limit():
    assert clean_caption("a b c d", max_words=3) == "a b c"
    assert clean_caption("word " * 10_000) == " ".join(["word"] * 30)


@settings(deadline=None)
@given(st.text(alphabet=st.one_of(st.characters(), st.sampled_from(" \t\n-/.,'<>pers"))), st.integers(1, 40))
def test_nothing_that_should_go_remains(text, max_words):
    clean = clean_caption(text, max_words)
    assert not set(clean) & set(",.'!?\"()*#:;~-/")
    assert "  " not in clean and "\n\n" not in clean
    assert clean == clean.strip(" ")
    assert len(clean.split(" ")) <= max_words
