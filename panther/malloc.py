"""glibc's malloc, asked to return what it keeps of freed memory."""

from __future__ import annotations

import ctypes


def give_back() -> None:
    """Return to the system what malloc keeps of freed memory, as far as it can be told to; nothing without glibc."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # other systems have no such function, or no such library
        return
