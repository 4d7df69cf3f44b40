"""Who gets which rank: ONE file and ONE line each. Allocators see options and limits, never a model.

`options` holds for every layer what it could become (Choices with cost and error, the dense layer last), `target`
the limits. An allocator answers with one Choice a layer; it may ask `evaluate` what a whole set of choices does to
the model's output. It never raises when the limits cannot be met: it answers with the smallest it can.
"""

from panther.allocators.base import Allocator, Evaluate, Options
from panther.allocators.sensitivity import sensitivity
from panther.allocators.tuned import tuned
from panther.allocators.uniform import uniform

ALLOCATORS: dict[str, Allocator] = {
    "uniform": uniform,
    "sensitivity": sensitivity,
    "tuned": tuned,
}

__all__ = ["ALLOCATORS", "Allocator", "Evaluate", "Options", "sensitivity", "tuned", "uniform"]
