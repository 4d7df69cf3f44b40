"""A run that ends in the middle of its training, as with kill -9: nothing in panther catches it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from panther.healers import training


class KilledError(BaseException):
    pass


@contextmanager
def killed_at_step(number: int) -> Iterator[None]:
    """Every run in here ends at this step, and has to get there."""
    steps, real = [0], training._step

    def step(*given: Any) -> bool:
        steps[0] += 1
        if steps[0] == number:
            raise KilledError
        return real(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_step", step)
        with pytest.raises(KilledError):
            yield
