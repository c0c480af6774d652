"""Cleans raw captions before they are tokenised."""

from __future__ import annotations

import re

_REMOVED = ",.'!?\"()*#:;~"
_TABLE = str.maketrans("-/", "  ", _REMOVED)
_WHITESPACE_RUN = re.compile(r"\s{2,}")


def clean_caption(text: str, max_words: int = 30) -> str:
    """Lower-cases, drops punctuation, joins runs of whitespace and keeps the first `max_words` words.

    Hyphens and slashes separate words; the placeholder `<person>` of web captions becomes a word. Only the space
    separates words, as in the reference: a single tab or line break inside the text stays where it is.
    The result may be empty. Same behaviour as `pre_caption` in dataset/utils.py of the reference.
    """
    text = text.lower().translate(_TABLE).replace("<person>", "person")
    text = _WHITESPACE_RUN.sub(" ", text).rstrip("\n").strip(" ")
    words = text.split(" ", max_words)  # at most one piece more than is kept: a 10,000-word text is not cut up in vain
    return " ".join(words[:max_words])


def clean_question(text: str, max_words: int = 30) -> str:
    """As `pre_question` in the same file, which cleans less: spaces are only cut off at the end."""
    return " ".join(text.lower().translate(_TABLE).rstrip(" ").split(" ")[:max_words])
