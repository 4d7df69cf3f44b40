"""Searches for the best parameters of any function: sizes of sketches, learning rates, whole plans."""

from panther.errors import ExhaustedError, JournalError, TunerError
from panther.tuner.pruning import PrunedError, report
from panther.tuner.space import Category, Float, Integer, Space
from panther.tuner.trial import Goal, Limit, Trial
from panther.tuner.tuner import SkAutoTuner, StopTuning

__all__ = [
    "Category",
    "ExhaustedError",
    "Float",
    "Goal",
    "Integer",
    "JournalError",
    "Limit",
    "PrunedError",
    "SkAutoTuner",
    "Space",
    "StopTuning",
    "Trial",
    "TunerError",
    "report",
]
