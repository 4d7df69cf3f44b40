"""panther: compress pretrained PyTorch models by sketched (randomised low-rank) layers.

    result = panther.compress(model, budget=0.5, example_inputs=x, calib_data=loader)
    result.export_onnx("model.onnx")

Importing it initialises no device, compiles nothing and leaves onnx alone.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("panther-compress")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0.0.0"

# Functions named like their module are imported here, so that the name means the function whatever is imported later.
from panther import nn, ops
from panther.build_info import build_info
from panther.compress import Result, analyze, compress
from panther.converters.compressed import load
from panther.errors import CalibrationError, CaptureError, ExportError, LoadError, PantherError, PlanError
from panther.heal import heal
from panther.spec import Budget, Heal, Healed, Plan, Report

__all__ = [
    "Budget",
    "CalibrationError",
    "CaptureError",
    "ExportError",
    "Heal",
    "Healed",
    "LoadError",
    "PantherError",
    "Plan",
    "PlanError",
    "Report",
    "Result",
    "__version__",
    "analyze",
    "build_info",
    "compress",
    "heal",
    "load",
    "nn",
    "ops",
]
