"""What compress was asked for: its arguments, checked before any work is done."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from panther.allocators import ALLOCATORS, Allocator
from panther.batches import Call
from panther.opening import Opened
from panther.progress import Progress
from panther.spec import BITS, DTYPES, Budget, Grid, Heal, Plan

# Numbers that share a scale, by bits. With eight bits one scale a row loses next to nothing.
GROUPS: dict[int, tuple[int | None, ...]] = {16: (None,), 8: (None,), 4: (None, 128, 32), 3: (None, 128, 32)}

MAX_SEED = 2**63 - 1  # of torch's generators, NumPy's and those of this package's kernels


@dataclass(frozen=True)
class Request:
    """The arguments of compress in the form that the stages want them. `given` is on the device asked for.

    `opened` is the same with the hidden products as layers: what is measured, decomposed and changed.
    """

    given: nn.Module
    opened: Opened
    budget: Budget
    example: Call
    calib_data: Any
    eval_fn: Callable[[nn.Module], Any] | None
    include: Sequence[Any] | None
    exclude: Sequence[Any] | None
    plan: Plan | None
    search: str | Allocator
    heal: Heal
    checkpoint: Path | None
    seed: int
    progress: Progress
    verify: bool
    n_trials: int | None = None
    timeout: float | None = None
    dtypes: Sequence[str] = DTYPES[:1]

    @property
    def model(self) -> nn.Module:
        """The model that the stages work on."""
        return self.opened.model

    @property
    def grids(self) -> tuple[Grid, ...]:
        """What weights may be rounded to."""
        bits = [BITS[name] for name in self.dtypes if name in BITS]
        return tuple(Grid(count, size) for count in bits for size in GROUPS[count])

    @property
    def may_narrow(self) -> bool:
        """Whether there may be fewer channels: not where ranks are to be uniform, or the user's own function's.

        A given plan may have none of them, and still another budget may want some (`Result.resolve`).
        """
        return self.search in ("sensitivity", "tuned")


def check_arguments(
    *,
    model: nn.Module,
    search: str | Allocator,
    n_trials: int | None,
    timeout: float | None,
    dtypes: Sequence[str],
    inplace: bool,
    has_plan: bool = False,
) -> None:
    """Raise TypeError or ValueError for an argument that cannot be honoured."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is {type(model).__name__}: expected a torch.nn.Module (load a state_dict into one first)"
        )
    if isinstance(search, str) and search not in ALLOCATORS:
        raise ValueError(f"search={search!r}: expected one of {', '.join(ALLOCATORS)} or an allocator")
    if has_plan and search != "sensitivity":
        raise ValueError(
            f"search={search!r} is given beside a plan, which leaves nothing to search for: leave out search, n_trials "
            "and timeout, or the plan"
        )
    if search != "tuned" and (n_trials is not None or timeout is not None):
        raise ValueError(
            f'n_trials and timeout belong to search="tuned", and this is search={search!r}: leave them out'
        )
    if n_trials is not None and (isinstance(n_trials, bool) or not isinstance(n_trials, int) or n_trials < 1):
        raise ValueError(f"n_trials={n_trials!r}: expected a number of plans to evaluate, 1 or more")
    if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0):
        raise ValueError(f"timeout={timeout!r}: expected seconds, above 0")
    is_list = isinstance(dtypes, Collection) and not isinstance(dtypes, str)
    if not is_list or not dtypes or not all(isinstance(name, str) and name in DTYPES for name in dtypes):
        raise ValueError(
            f"dtypes={dtypes!r}: expected a sequence of {', '.join(map(repr, DTYPES))}, in which weights may be stored "
            f"({DTYPES[0]!r} stands for each layer's own dtype)"
        )
    if inplace and next(model.children(), None) is None:
        raise ValueError(
            f"inplace=True: {type(model).__name__} is itself the layer, and cannot be another in its own place: "
            "leave inplace out and use the model of the result"
        )


def parse_seed(seed: Any) -> int:
    """The seed that the argument means.

    Raises: TypeError unless it is an integer, ValueError unless random number generators take it.
    """
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise TypeError(f"seed={seed!r} ({type(seed).__name__}): expected an integer from 0 to 2**63 - 1")
    if not 0 <= operator.index(seed) <= MAX_SEED:
        raise ValueError(f"seed={seed!r}: expected an integer from 0 to 2**63 - 1")
    return operator.index(seed)


def parse_budget(budget: Any, eval_fn: Callable[[nn.Module], Any] | None) -> Budget:
    """The Budget that the argument means.

    Raises: ValueError or TypeError as Budget.parse; TypeError for an eval_fn that cannot be called, ValueError for a
        limit on its drop without one.
    """
    wanted = Budget.parse(budget)
    if eval_fn is not None and not callable(eval_fn):
        raise TypeError(f"eval_fn is {type(eval_fn).__name__}: expected a function of a model that gives one number")
    if wanted.max_drop is not None and eval_fn is None:
        raise ValueError(
            f"Budget(max_drop={wanted.max_drop:g}) limits how far eval_fn falls, and there is none: pass "
            "eval_fn=your_function, which takes a model and gives one number, higher is better"
        )
    return wanted
