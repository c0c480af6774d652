"""Host memory that training has freed, given back to the system."""

from __future__ import annotations

import ctypes


def give_back() -> None:
    """To be called every few steps: it takes milliseconds.

    glibc keeps what is freed between blocks in use. Batches of ever other lengths leave more such holes with every
    hour, until a rank holds a gigabyte that nobody uses. Another C library gives back by itself or has no such call.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
