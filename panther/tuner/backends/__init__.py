"""Who proposes the next points: ONE file and ONE line each. A back end is a function from a Question to points.

It answers with as many points as are wanted, or with all that are left: in the box, allowed, of plain Python types,
none of them tried or under way. The same question has the same answer, whatever was asked before.
"""

from panther.tuner.backends.base import Ask, Question
from panther.tuner.backends.gp import gp
from panther.tuner.backends.random import random
from panther.tuner.backends.spread import spread
from panther.tuner.backends.tpe import tpe

BACKENDS: dict[str, Ask] = {
    "random": random,
    "spread": spread,
    "tpe": tpe,
    "gp": gp,
}

__all__ = ["BACKENDS", "Ask", "Question", "gp", "random", "spread", "tpe"]
