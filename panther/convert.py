"""The command line: `python -m panther.convert model.pt` writes a smaller, checked ONNX file beside the model.

Written: NAME.onnx, NAME.panther/ (for panther.load), NAME.plan.json, NAME.report.txt and NAME.report.json; all of them
as NAME.over-budget.* when the budget could not be met. Results go to stdout, progress and errors to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import itertools
import json
import os
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, TextIO, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from panther import __version__
from panther.allocators import ALLOCATORS
from panther.allocators.tuned import TRIALS
from panther.batches import CHUNK, Call, as_call, batch_call, runs
from panther.chains import CHANNELS, PIVOTED
from panther.compress import Result, analyze, compress
from panther.converters import WRITERS, ExportReport, huggingface, pt2, read
from panther.converters.compressed import check_can_be_saved
from panther.converters.files import staging
from panther.converters.inputs import dynamic_axes, flatten, resized, sizes
from panther.converters.onnx import check_ready
from panther.errors import CaptureError, PantherError, one_line
from panther.nn import SketchedLayer
from panther.report import RENDERERS, html
from panther.request import MAX_SEED
from panther.spec import BITS, DTYPES, MODES, TIME_LIMIT, Budget, Choice, Heal, Plan, to_data
from panther.trials import trials_file
from panther.verify import medians_in_turn

T = TypeVar("T")

DONE, UNEXPECTED, USAGE, OVER_BUDGET, PARITY_FAILED, INTERRUPTED = 0, 1, 2, 3, 4, 130
BENCHMARK_BATCHES = (1, 32)
REPORT_FORMS = (".txt", ".json", ".html")

# Functions of panther whose ValueError or TypeError is about what was typed; any other one is an unexpected fault.
ARGUMENT_CHECKS = frozenset(
    {
        "Budget.parse",
        "Budget.from_fields",
        "as_call",
        "batch_call",
        "calibration",
        "refuse_non_finite",
        "selected",  # include and exclude
        "parse_budget",
        "Dense.metric",  # eval_fn on the dense model
        "_check_opset",
    }
)


class UsageError(Exception):
    """What was typed cannot be done; the text says what to type instead."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code.

    0 done, 1 unexpected or no ONNX file, 2 usage, 3 budget not met (files are still written, named *.over-budget.*),
    4 the ONNX file does not agree with the model (also when the budget is not met), 130 interrupted.
    """
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
    except UsageError as error:
        return _complain(error, USAGE)
    except SystemExit as stop:  # --help and --version
        return int(stop.code or 0)
    _module_from_file.cache_clear()  # files may have changed since an earlier call
    try:
        with _importable(Path.cwd()), _plain_warnings(arguments.verbose):
            return _run(arguments)
    except SystemExit as stop:  # of code that was named by a flag, or that the model runs
        _show_traceback(arguments.verbose)
        return _complain(f"code that was run ended the process: sys.exit({stop.code!r}) (-v shows where)", UNEXPECTED)
    except KeyboardInterrupt:
        again = f"Run the same command again{_resuming(arguments)}."
        return _complain(f"interrupted; every file that is there is whole. {again}", INTERRUPTED)
    except Exception as error:  # the last handler there is: one line, and how to see more
        _show_traceback(arguments.verbose)
        if isinstance(error, UsageError | PantherError) or _is_about_arguments(error):
            return _complain(error, USAGE)
        return _complain(_unexpected(error), UNEXPECTED)


def _is_about_arguments(error: Exception) -> bool:
    """Whether one of ARGUMENT_CHECKS raised this, and not the work itself."""
    if not isinstance(error, ValueError | TypeError):
        return False
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    own = [frame.f_code.co_qualname for frame in frames if frame.f_globals.get("__name__", "").startswith("panther.")]
    return not ARGUMENT_CHECKS.isdisjoint(own)


def _unexpected(error: Exception) -> str:
    return f"{type(error).__name__}: {error} (run again with -v for the traceback)"


def _complain(error: object, code: int) -> int:
    _say("error: " + " ".join(str(error).split()), sys.stderr)
    return code


def _say(text: object, stream: TextIO | None = None) -> None:
    """One text and a line end; "?" for what the stream's encoding does not have."""
    stream = stream or sys.stdout
    encoding = stream.encoding or "utf-8"  # None of an io.StringIO
    try:
        stream.write(f"{text}\n".encode(encoding, "replace").decode(encoding))
        stream.flush()
    except BrokenPipeError:  # nobody reads on, as behind `| head`: what is written to files stays what it is
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _show_traceback(verbose: bool) -> None:
    if verbose:
        traceback.print_exc()


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Modules in the folder can be imported, as they can be from `python -m`."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))


@contextlib.contextmanager
def _plain_warnings(verbose: bool) -> Iterator[None]:
    """panther's own warnings as one line on stderr; those of other packages only with -v."""
    own = str(Path(__file__).parent)

    def show(message: Warning | str, category: type[Warning], filename: str, *_: object, **__: object) -> None:
        if verbose or filename.startswith(own):
            _say("warning: " + " ".join(str(message).split()), sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = show
        yield


# Flags ----------------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see python -m panther.convert --help")


def _parser() -> _Parser:
    parser = _Parser(
        prog="python -m panther.convert",
        description="Compress a pretrained PyTorch model and export it to ONNX, with both checked and measured.",
        epilog="exit codes: 0 done, 1 unexpected or no ONNX file, 2 usage, 3 budget not met (files are still written, "
        "named *.over-budget.*), 4 the ONNX file does not agree with the model",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("path", nargs="?", metavar="MODEL", help=".pt, .pth, .pt2 or .safetensors file, or a Hugging Face folder")
    add("-o", "--output", metavar="DIR", help="where to write (default: beside the model)")
    add("--model", metavar="MODULE:NAME", help="what builds the model, when the file holds weights only")
    add("--trust-pickle", action="store_true", help="load a whole pickled module: this runs code from the file")
    add("--input-shape", action="append", metavar="SHAPE", help=_SHAPE_HELP)
    add("--calib", metavar="DATA", help="unlabelled inputs: data.npz, or my.py:loader (or a function that returns one)")
    add("--budget", metavar="BUDGET", help=_BUDGET_HELP)
    add("--eval", metavar="FUNCTION", help="my.py:evaluate, which takes a model and gives one number, higher is better")
    add("--max-drop", metavar="X", help="by how much that number may fall; alone: the smallest model that holds it")
    add("--include", action="append", metavar="PATTERN", help='only these layers: name, glob or "re:..."; repeatable')
    add("--exclude", action="append", metavar="PATTERN", help="not these layers; repeatable")
    add("--plan", metavar="FILE", help="a saved plan instead of a search")
    add("--search", default="sensitivity", metavar="NAME", help=f"{', '.join(ALLOCATORS)} (default: sensitivity)")
    add("--trials", type=int, metavar="N", help=f"plans that --search tuned evaluates with --eval (default: {TRIALS})")
    add("--timeout", type=float, metavar="SECONDS", help="of --search tuned, which then ends with the best so far")
    add("--bfloat16", action="store_true", help="store weights in bfloat16, alone or as factors: half of the bytes")
    add("--int8", action="store_true", help="store weights in 8 bits, alone or as factors")
    add("--int4", action="store_true", help="store them in 4 bits; with --int8 in whichever suits each layer")
    add("--int3", action="store_true", help="store them in 3 bits; beside the others for small files")
    add("--heal", metavar="WAY", help=f"without labels: {', '.join(MODES)} (default: auto; needs --calib)")
    add("--time-limit", type=float, metavar="SECONDS", help=f"of training, at most (default: {TIME_LIMIT:.0f})")
    add("--steps", type=int, metavar="N", help="training steps, instead of as many as fit into the time")
    add("--learning-rate", type=float, metavar="X", help=f"of the training (default: {Heal.learning_rate:g})")
    add("--checkpoint", metavar="FILE", help="save healing here as it goes; the file is removed at the end")
    add("--resume", action="store_true", help="go on from --checkpoint, with the same flags as then")
    add("--seed", type=int, default=0, metavar="N")
    add("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 (default: where the model is)")
    add("--round-inputs", action="store_true", help="int8 layers of the ONNX file round their inputs too: faster")
    add("--opset", type=int, metavar="N", help="ONNX opset (default: the exporter's own)")
    add("--no-verify", action="store_true", help="do not measure agreement, latency and memory")
    add("--benchmark", action="store_true", help="time the dense and the compressed ONNX file at batch 1 and 32")
    add("--config", metavar="FILE", help="flags from a YAML file; the command line wins")
    add("--save-config", metavar="FILE", help="write this run's flags to a YAML file")
    add("--dry-run", action="store_true", help="print the target and the plan, write nothing")
    add("--list-layers", action="store_true", help="print what would be compressed, what not and why")
    add("--json", action="store_true", help="print the report as JSON")
    add("--report", metavar="FILE", help="write the report here too (.txt, .json or .html)")
    add("-v", "--verbose", action="store_true", help="tracebacks, and the warnings of other packages")
    add("-q", "--quiet", action="store_true", help="no progress, and only the paths on stdout")
    add("--version", action="version", version=f"panther {__version__}")
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of a command line, filled up from its --config.

    Raises: UsageError for a flag that does not exist or has a wrong value.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.config:
        recipe = _recipe_flags(Path(arguments.config), vars(arguments))
        blank = argparse.Namespace(**dict.fromkeys(vars(arguments)))  # without defaults only what was typed is set
        typed = {name: value for name, value in vars(parser.parse_args(argv, blank)).items() if value is not None}
        arguments = argparse.Namespace(**{**vars(parser.parse_args(recipe)), **typed})
    _check(arguments)
    return arguments


def _check(arguments: argparse.Namespace) -> None:
    if arguments.path is None:
        raise UsageError("no model given: python -m panther.convert model.pt; see python -m panther.convert --help")
    _check_search(arguments)
    if not 0 <= arguments.seed <= MAX_SEED:
        raise UsageError(f"--seed {arguments.seed}: expected an integer from 0 to 2**63 - 1")
    if arguments.report and Path(arguments.report).suffix not in REPORT_FORMS:
        raise UsageError(f"--report {arguments.report}: expected a name ending in {', '.join(REPORT_FORMS)}")


def _dtypes(arguments: argparse.Namespace) -> tuple[str, ...]:
    """What weights are stored in: as they are unless a flag asks for something else."""
    return tuple(name for name in BITS if getattr(arguments, name)) or DTYPES[:1]


def _check_search(arguments: argparse.Namespace) -> None:
    if arguments.search not in ALLOCATORS:
        close = "".join(f"; did you mean {found!r}?" for found in get_close_matches(arguments.search, ALLOCATORS, 1))
        raise UsageError(f"--search {arguments.search}: expected one of {', '.join(ALLOCATORS)}{close}")
    given = [f"--search {arguments.search}"] if arguments.search != "sensitivity" else []
    given += [f"--{name}" for name in BITS if getattr(arguments, name)]
    if arguments.plan and given:
        raise UsageError(
            f"--plan says what becomes of each layer and what it is stored in: leave {given[0]} out, or --plan"
        )
    flags = [flag for flag in ("trials", "timeout") if getattr(arguments, flag) is not None]
    if flags and arguments.search != "tuned":
        raise UsageError(f"--{flags[0]} belongs to --search tuned: add that, or leave --{flags[0]} out")
    if arguments.trials is not None and arguments.trials < 1:
        raise UsageError(f"--trials {arguments.trials}: expected a number of plans, 1 or more")
    if arguments.timeout is not None and not arguments.timeout > 0:
        raise UsageError(f"--timeout {arguments.timeout:g}: expected seconds, above 0")


def _yaml() -> ModuleType:
    try:
        return importlib.import_module("yaml")
    except ImportError:
        raise UsageError("--config and --save-config need PyYAML: pip install 'panther-compress[yaml]'") from None


def _recipe_flags(path: Path, known: Mapping[str, Any]) -> list[str]:
    """The command line that a YAML recipe stands for; keys are flags without the dashes, and `path` the model."""
    yaml = _yaml()
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except Exception as error:  # PyYAML lets an IndexError, KeyError or AttributeError of a strange value through
        raise UsageError(f"--config {path} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(recipe, dict):
        raise UsageError(f"--config {path} holds {type(recipe).__name__}: expected lines such as budget: 0.5")
    allowed = sorted(name.replace("_", "-") for name in known if name not in ("config", "save_config"))
    flags: list[str] = []
    for name, value in recipe.items():
        key = str(name).replace("_", "-")
        if key not in allowed:
            close = get_close_matches(key, allowed, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(allowed)}"
            raise UsageError(f"--config {path}: unknown key {str(name)!r}; {hint}")
        if key == "path":
            flags += [] if value is None else [str(value)]
            continue
        try:
            flags += _flag(key, value)
        except ValueError as error:
            raise UsageError(f"--config {path}: {error}") from error
    return flags


def _flag(key: str, value: Any) -> list[str]:
    """One entry of a recipe as flags: true is a switch, a list repeats, a mapping is name=value,...

    Raises: ValueError where true or false is not what the flag takes.
    """
    is_switch = key in _switches()
    if value is None or (value is False and is_switch):
        return []
    if value is False and key == "heal":  # as YAML reads off and no
        return ["--heal=none"]
    if isinstance(value, bool) and not is_switch:
        raise ValueError(
            f"{key} is {str(value).lower()}, as YAML reads yes, no, on and off: write a value, or quote it"
        )
    if value is True:
        return [f"--{key}"]
    items = value if isinstance(value, list) else [value]
    if key == "input-shape" and items and all(isinstance(size, int) for size in items):
        items = [items]  # input-shape: [1, 3, 224, 224]
    return [f"--{key}={_spelled(item)}" for item in items]


def _spelled(value: Any) -> str:
    if isinstance(value, Mapping):
        return ",".join(f"{name}={number}" for name, number in value.items())
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _switches() -> set[str]:
    """Flags without a value."""
    return {flag.lstrip("-") for action in _parser()._actions if action.nargs == 0 for flag in action.option_strings}


def _save_recipe(arguments: argparse.Namespace) -> None:
    """Write what differs from the defaults, so that --config gives the same run."""
    defaults = vars(_parser().parse_args([]))
    chosen = {
        name.replace("_", "-") if name != "path" else name: value
        for name, value in vars(arguments).items()
        if value != defaults[name] and name not in ("config", "save_config", "resume")
    }
    path = Path(arguments.save_config)
    _write_texts(path.parent, {path.name: _yaml().safe_dump(chosen, sort_keys=True)})


# What the flags mean --------------------------------------------------------------------------------------------------

_BUDGET_HELP = (
    "what to KEEP: 0.5 (the default), 50%%, or limits that all hold: params=0.5,flops=50%%,size_mb=20,latency_ms=50%%,"
    "peak_memory_mb=80"
)


def _budget(text: str) -> Budget:
    """0.5, 50% or params=0.5,size_mb=20 as a Budget.

    Raises: ValueError as Budget.parse.
    """
    if "=" in text:
        pairs = [part.partition("=") for part in text.split(",")]
        names = [name.strip() for name, _, _ in pairs]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UsageError(f"--budget {text}: {twice} is given twice")
        return Budget.from_fields({name.strip(): value.strip() for name, _, value in pairs})
    value: int | float | str = text
    for number in (float, int):  # the narrowest that fits: 1 is a count, 1.0 a fraction
        with contextlib.suppress(ValueError):
            value = number(text)
    return Budget.parse(value)


def _named_object(flag: str, spec: str) -> Any:
    """What pkg.mod:name or my.py:name stands for; importing the module runs it.

    Raises: UsageError when the module or the name is not there, or the module fails.
    """
    source, _, name = spec.rpartition(":")
    if spec.endswith(".npy"):
        wanted = "a file that numpy.savez('calib.npz', array) wrote"
        raise UsageError(f"{flag} {spec}: an array alone has no name; give {wanted}")
    if not source or not name:
        raise UsageError(f"{flag} {spec}: expected MODULE:NAME, as in {flag} pkg.mod:name or {flag} my.py:name")
    try:
        is_file = source.endswith(".py")
        module = _module_from_file(Path(source)) if is_file else importlib.import_module(source)
    except (Exception, SystemExit) as error:  # the user's module may raise anything
        where = "" if source.endswith(".py") else f" from {Path.cwd()}"
        raise UsageError(f"{flag} {spec}: importing {source}{where} failed: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        close = ", ".join(get_close_matches(name, dir(module), 3)) or "none"
        raise UsageError(f"{flag} {spec}: {source} has no {name!r}; nearest: {close}")
    return getattr(module, name)


@functools.lru_cache
def _module_from_file(path: Path) -> ModuleType:
    """A user's file, run once however many flags name it."""
    spec = importlib.util.spec_from_file_location(f"panther_user_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _evaluation(spec: str | None) -> Callable[[nn.Module], Any] | None:
    """The function that --eval names.

    Raises: UsageError when it is not there or not a function.
    """
    if spec is None:
        return None
    found = _named_object("--eval", spec)
    if not callable(found):
        raise UsageError(f"--eval {spec} is {type(found).__name__}: expected a function of a model that gives a number")
    return cast(Callable[[nn.Module], Any], found)


def _device(name: str | None) -> torch.device | None:
    if name is None:
        return None
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises each of them for some name
        raise UsageError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise UsageError(f"--device {name} cannot be used here: it holds no numbers; give cpu, cuda or cuda:1")
    return device


# Inputs ---------------------------------------------------------------------------------------------------------------

_SHAPE_HELP = (
    "1,3,224,224 or 1,16:int64, once for each argument; or by name, input_ids=1,16:int64. Floats are random, integers "
    "0, masks 1"
)
_SHAPE = re.compile(r"(?:(?P<name>\w+)=)?(?P<sizes>[1-9]\d*(?:,[1-9]\d*)*)(?::(?P<dtype>\w+))?")
_USUAL_SIZES: dict[type[nn.Module], str] = {nn.Conv1d: "16000", nn.Conv2d: "224,224", nn.Conv3d: "16,112,112"}


def _from_shapes(shapes: Sequence[str], model: nn.Module, seed: int) -> Call:
    """The call that the --input-shape flags describe."""
    generator = torch.Generator().manual_seed(seed)
    args: list[Tensor] = []
    kwargs: dict[str, Tensor] = {}
    for text in shapes:
        found = _SHAPE.fullmatch(text.replace(" ", ""))
        dtype = getattr(torch, found["dtype"], None) if found and found["dtype"] else _float_dtype(model)
        if found is None or not isinstance(dtype, torch.dtype):
            raise UsageError(f"--input-shape {text}: expected sizes, as in 1,3,224,224 or 1,16:int64 or ids=1,16:int64")
        try:
            made = _filled(found["name"] or "", [int(size) for size in found["sizes"].split(",")], dtype, generator)
        except (RuntimeError, OverflowError, TypeError) as error:  # torch's, where there is no memory for so many
            raise UsageError(f"--input-shape {text}: {one_line(error)}") from error
        if found["name"]:
            kwargs[found["name"]] = made
        else:
            args.append(made)
    return Call(tuple(args), kwargs)


def _filled(name: str, sizes: list[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if "mask" in name or dtype == torch.bool:
        return torch.ones(sizes, dtype=dtype)
    if dtype.is_floating_point:
        return torch.randn(sizes, generator=generator).to(dtype)
    return torch.zeros(sizes, dtype=dtype)  # 0 is an index into any table


def _float_dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _required(model: nn.Module) -> list[str]:
    """Names of the arguments that forward must be given."""
    parameters = inspect.signature(model.forward).parameters
    return [name for name in _positional(model) if parameters[name].default is inspect.Parameter.empty]


def _positional(model: nn.Module) -> list[str]:
    """Names of the arguments that forward takes by their place."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [name for name, p in inspect.signature(model.forward).parameters.items() if p.kind in kinds]


def _from_first_layer(model: nn.Module) -> Call:
    """One sample for a model whose first layer says what it takes: a Linear, sketched or not.

    Raises: UsageError with the flag to add for every other model.
    """
    with_own = [m for m in model.modules() if any(True for _ in m.parameters(recurse=False))]
    first = next((m for m in with_own if isinstance(m, SketchedLayer) or not any(m.children())), model)
    required = _required(model) or _positional(model)[:1]
    if len(required) != 1:
        parameters = inspect.signature(model.forward).parameters
        keyed = [name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
        takes = f"{len(required)} arguments" if required else ", ".join(parameters) or "nothing"
        flags = " ".join(f"--input-shape {name}=1,16" for name in required or keyed) or "--input-shape 1,16"
        raise UsageError(
            f"cannot tell the inputs of {type(model).__name__}, which takes {takes}: add {flags} (with your sizes)"
        )
    kind = first.DENSE if isinstance(first, SketchedLayer) else type(first)
    if kind is nn.Linear:
        row = torch.randn(1, cast(nn.Linear, first).in_features, generator=torch.Generator().manual_seed(0))
        return Call((row.to(_float_dtype(first)),))
    shape, what = "1,3,224,224", type(first).__name__
    if kind in _USUAL_SIZES:
        channels = cast(nn.Conv2d, first).in_channels
        shape = f"1,{channels},{_USUAL_SIZES[kind]}"
        what = f"{what} with {channels} channels, which takes any size"
    elif isinstance(first, nn.Embedding):
        shape, what = "1,16:int64", f"{what}, which takes any length"
    raise UsageError(
        f"cannot tell the input shape of {type(model).__name__}: its first layer is {what}. "
        f"Add --input-shape {shape} (with your sizes)"
    )


def _calibration(spec: str | None, model: nn.Module) -> Any:
    """What --calib names, as compress takes it; None without the flag."""
    if spec is None:
        return None
    if spec.endswith(".npz"):
        return _from_npz(Path(spec), model)
    data = _named_object("--calib", spec)
    if callable(data) and not isinstance(data, nn.Module):
        try:
            data = data()
        except (Exception, SystemExit) as error:  # the user's function may raise anything
            raise UsageError(f"--calib {spec} failed: {type(error).__name__}: {error}") from error
    if not any(hasattr(type(data), name) for name in ("__iter__", "__getitem__")):
        said = "None: does it end without a return?" if data is None else type(data).__name__
        raise UsageError(f"--calib {spec} gives {said}; expected batches to iterate over, or one tensor")
    return data


def _from_npz(path: Path, model: nn.Module) -> Any:
    """The arrays of an .npz file: by name where forward has such arguments, else by position."""
    import numpy as np

    try:
        # Opened here, for NumPy does not close what it finds damaged.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    except Exception as error:  # NumPy, zipfile and zlib have kinds of their own for damage
        raise UsageError(f"--calib {path} cannot be read as arrays of numbers: {one_line(error)}") from error
    if not arrays or len({array.shape[:1] for array in arrays.values()}) != 1 or next(iter(arrays.values())).dim() == 0:
        found = ", ".join(f"{name} {tuple(array.shape)}" for name, array in arrays.items()) or "nothing"
        raise UsageError(f"--calib {path} holds {found}: expected arrays with one sample a row, as many rows in each")
    dtype = _float_dtype(model)
    tensors = {name: array.to(dtype) if array.is_floating_point() else array for name, array in arrays.items()}
    takes = inspect.signature(model.forward).parameters
    if set(tensors) & set(takes):
        return tensors
    if len(tensors) == 1:
        return next(iter(tensors.values()))
    takes_any = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in takes.values())
    if not takes_any and any(not re.fullmatch(r"arr_\d+", name) for name in tensors):  # as NumPy calls unnamed arrays
        raise UsageError(
            f"--calib {path} holds arrays called {', '.join(tensors)}; {type(model).__name__}.forward takes "
            f"{', '.join(takes)}: give them these names, or none, in this order"
        )
    return list(zip(*(tensor.split(CHUNK) for tensor in tensors.values()), strict=True))


def _first_batch(data: Any) -> tuple[Any, Any]:
    """The first batch, and data that still has it; no more is taken of a generator, which may have no end."""
    if isinstance(data, Tensor | Mapping):
        return data, data
    batch = next(iter(data), None)
    if batch is None:
        raise UsageError("--calib has no batches: give at least one")
    return batch, itertools.chain([batch], data) if isinstance(data, Iterator) else data


def _first_sample(batch: Any, model: nn.Module) -> Call:
    """One sample of a calibration batch, to trace the model with; a dict as a whole where forward takes one as such."""
    required = _required(model)
    takes_it = len(required) == 1 and required[0] not in batch if isinstance(batch, Mapping) else False
    if takes_it and not set(batch) & set(inspect.signature(model.forward).parameters):
        whole = Call((batch,))
        if runs(model, whole):
            return whole
    return batch_call(batch, Call((None,) * len(_required(model))), model).rows(0, 1)


def _example(arguments: argparse.Namespace, model: nn.Module, data: Any) -> tuple[Call, str, Any]:
    """The inputs to trace with, how they were found (flags, the file, calibration data, first layer), and the data."""
    if arguments.input_shape:
        return _from_shapes(arguments.input_shape, model, arguments.seed), "--input-shape", data
    exported = pt2.example_inputs_of(model)
    if exported is not None:
        return Call(*exported), "the exported program", data
    made = huggingface.example_inputs_for(model)
    if made is not None:
        return as_call(made), "the Hugging Face config", data
    if data is not None:
        batch, data = _first_batch(data)
        return _first_sample(batch, model), "the first sample of --calib", data
    return _from_first_layer(model), "the first layer", data


# The run --------------------------------------------------------------------------------------------------------------


def _run(arguments: argparse.Namespace) -> int:
    budget, plan = _goal(arguments)
    healing, checkpoint = _healing(arguments), _checkpoint(arguments)
    device = _device(arguments.device)
    source = Path(arguments.path)
    folder = Path(arguments.output) if arguments.output else source.absolute().parent
    writes = not (arguments.dry_run or arguments.list_layers)
    if writes:
        check_ready(arguments.opset)
        _check_writable(folder, "-o DIR")
        if arguments.report:
            _check_writable(Path(arguments.report).parent, "--report FILE")
    if arguments.save_config:
        _save_recipe(arguments)
    evaluate = _evaluation(arguments.eval)
    factory = None if arguments.model is None else _named_object("--model", arguments.model)
    model = read(source, model=factory, trust_pickle=arguments.trust_pickle)
    note = _computes_in_float32(model)
    if writes:
        check_can_be_saved(model, folder / f"{_stem(source)}.panther")
    data = _calibration(arguments.calib, model)
    example, found_by, data = _example(arguments, model, _in_float32(data) if note else data)
    layers = {"example_inputs": example, "include": arguments.include, "exclude": arguments.exclude}
    options: dict[str, Any] = {"verify": False} if arguments.no_verify else {}
    try:
        if arguments.list_layers:
            found = analyze(model, **layers)
            _say(json.dumps(to_data(found), indent=1) if arguments.json else found)
            return DONE
        result = compress(
            model,
            budget,
            calib_data=data,
            eval_fn=evaluate,
            plan=plan,
            search=arguments.search,
            dtypes=_dtypes(arguments),
            n_trials=arguments.trials,
            timeout=arguments.timeout,
            heal=healing,
            checkpoint=checkpoint,
            seed=arguments.seed,
            device=device,
            progress=not arguments.quiet,
            **layers,
            **options,
        )
    except CaptureError as error:
        if arguments.input_shape or "does not run" not in str(error):
            raise
        raise CaptureError(f"{error} The inputs came from {found_by}: say them with --input-shape.") from error
    if note:
        report = dataclasses.replace(result.report, notes=(*result.report.notes, note))
        result = dataclasses.replace(result, report=report)
    if arguments.dry_run:
        _say(_plan_text(result, as_json=arguments.json))
        return DONE if result.budget_met else _over_budget(arguments, result, "nothing was written (--dry-run)")
    return _deliver(arguments, result, model, example, folder, source)


def _computes_in_float32(model: nn.Module) -> str:
    """Makes bfloat16 weights float32, and says so; nothing to say where there are none."""
    if all(tensor.dtype != torch.bfloat16 for tensor in (*model.parameters(), *model.buffers())):
        return ""
    model.float()
    note = (
        "the weights are bfloat16 in the file and float32 here, for onnxruntime has no bfloat16 kernels on a CPU: "
        "sizes, budgets and speeds are those of float32"
    )
    warnings.warn(note, UserWarning, stacklevel=1)
    return note


def _in_float32(data: Any) -> Any:
    """Calibration data whose bfloat16 numbers become float32, as those of the model did."""

    def cast(batch: Any) -> Any:
        return tree_map(lambda value: value.float() if _is_bfloat16(value) else value, batch)

    return cast(data) if data is None or isinstance(data, Tensor | Mapping) else map(cast, data)


def _is_bfloat16(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16


def _goal(arguments: argparse.Namespace) -> tuple[Budget, Plan | None]:
    """The budget, and the plan of --plan; a plan brings its own budget when none is typed."""
    plan = None
    if arguments.plan:
        try:
            plan = Plan.from_json(Path(arguments.plan).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--plan {arguments.plan} cannot be read: {error}") from error
    return _limits(arguments, plan), plan


def _limits(arguments: argparse.Namespace, plan: Plan | None) -> Budget:
    """What --budget and --max-drop hold together; half of the weights when neither they nor a plan say anything."""
    limits: dict[str, Any] = {}
    if arguments.budget is not None or arguments.max_drop is None or plan is not None:
        keeps_drop = arguments.eval is not None and arguments.max_drop is None
        text = arguments.budget if arguments.budget is not None else _budget_of(plan, keeps_drop=keeps_drop) or "0.5"
        limits = {name: limit for name, limit in vars(_budget(text)).items() if limit is not None}
    if arguments.max_drop is not None:
        if "max_drop" in limits:
            raise UsageError(f"--max-drop {arguments.max_drop} and --budget {arguments.budget}: give the drop once")
        limits["max_drop"] = arguments.max_drop
    budget = Budget.from_fields(limits)
    if budget.max_drop is not None and arguments.eval is None:
        raise UsageError(
            f"a drop of at most {budget.max_drop:g} needs something that falls: add --eval my.py:evaluate, a function "
            "that takes a model and gives one number, higher is better"
        )
    return budget


def _healing(arguments: argparse.Namespace) -> Heal:
    """What --heal and its limits say; a dry run heals nothing.

    Raises: UsageError for a way that does not exist, and for what it cannot do.
    """
    given = {name: getattr(arguments, name) for name in ("time_limit", "steps", "learning_rate")}
    limits = {name: value for name, value in given.items() if value is not None}
    mode = arguments.heal or "auto"
    if mode not in MODES:
        close = "".join(f"; did you mean {found!r}?" for found in get_close_matches(mode, MODES, 1))
        raise UsageError(f"--heal {mode}: expected one of {', '.join(MODES)}{close}")
    if arguments.heal not in (None, "none") and arguments.calib is None:
        raise UsageError(f"--heal {mode} needs inputs to heal with: add --calib data.npz or --calib my.py:loader")
    flags = ", ".join("--" + name.replace("_", "-") for name in limits)
    if limits and mode in ("none", "refit"):
        raise UsageError(f"{flags}: --heal {mode} has no training to limit; use --heal blocks, distill or auto")
    if limits and arguments.calib is None:
        raise UsageError(f"{flags}: there is no training without inputs: add --calib data.npz or --calib my.py:loader")
    try:
        return Heal("none" if arguments.dry_run else mode, **limits)
    except ValueError as error:
        raise UsageError(f"--time-limit, --steps and --learning-rate: {error}") from error


def _checkpoint(arguments: argparse.Namespace) -> Path | None:
    """The file of --checkpoint, which is there exactly when --resume says so.

    Raises: UsageError with the ways out.
    """
    if arguments.checkpoint is None:
        if arguments.resume:
            raise UsageError("--resume needs the file to go on from: add --checkpoint FILE, as in the run before")
        return None
    path = Path(arguments.checkpoint)
    is_there = _is_kept(path)
    if is_there and not arguments.resume:
        raise UsageError(
            f"--checkpoint {path} is there already: add --resume to go on from it, or delete it (or give another name) "
            "to begin anew"
        )
    if arguments.resume and not is_there:
        raise UsageError(
            f"--resume: there is no {path} to go on from (a run that ends removes its checkpoint): leave --resume out "
            "to begin anew"
        )
    if arguments.dry_run or arguments.list_layers:
        return None
    _check_writable(path.parent, "--checkpoint FILE")
    if path.is_dir():
        raise UsageError(f"--checkpoint {path} is a folder: give the name of a file")
    return path


def _is_kept(checkpoint: Path) -> bool:
    return checkpoint.exists() or trials_file(checkpoint).exists()


def _resuming(arguments: argparse.Namespace) -> str:
    """What differs in the command that goes on after Ctrl-C."""
    is_kept = arguments.checkpoint is not None and _is_kept(Path(arguments.checkpoint))
    if is_kept == arguments.resume:
        return ""
    return " with --resume" if is_kept else " without --resume"


def _budget_of(plan: Plan | None, *, keeps_drop: bool) -> str:
    """The budget that a plan was made for, all of the model where it says none.

    keeps_drop: not without --eval, nor where another drop takes its place.
    """
    if plan is None:
        return ""
    parts = [part for part in plan.budget.split(", ") if keeps_drop or not part.startswith("max_drop=")]
    return ", ".join(parts) if any(part and not part.startswith("of=") for part in parts) else "1.0"


def _stem(source: Path) -> str:
    """What the names of the files begin with."""
    return source.resolve().name if source.is_dir() else source.stem


def _check_writable(folder: Path, flag: str) -> None:
    """Raise UsageError before the work, and not after it, when nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}; choose another folder with {flag}") from error


def _plan_text(result: Result, *, as_json: bool) -> str:
    if as_json:
        return result.plan.to_json()
    rows = [f"  {choice.layer}  {_choice_text(choice)}" for choice in result.plan.choices]
    return "\n".join([f"target: {result.target.text}", *rows])


def _choice_text(choice: Choice) -> str:
    """ "linear, rank 24, int4, groups of 32, 96 channels"."""
    if choice.is_dense:
        return f"dense: {choice.reason}"
    fewer = f"{choice.channels} channels" if choice.channels else ""
    if choice.scheme == CHANNELS:
        return fewer
    rank = f"rank {' x '.join(map(str, choice.ranks))}" if choice.ranks else ""
    return ", ".join(filter(None, [choice.scheme, rank, _stored_as(choice), fewer]))


def _stored_as(choice: Choice) -> str:
    """ "pivoted, int8"; what is not pivoted only says its grid."""
    if choice.grid is None:
        return choice.packing
    return f"{choice.packing}, {choice.grid}" if choice.packing == PIVOTED else str(choice.grid)


def _over_budget(arguments: argparse.Namespace, result: Result, where: str) -> int:
    broken = next((note for note in result.report.notes if note.startswith("budget not met")), "budget not met")
    advice = "Ask for a larger --budget, or let more layers take part."
    if arguments.plan and arguments.budget is None and arguments.max_drop is None:
        advice = f"{arguments.plan} was made for that budget: once it is edited, say with --budget what it has to hold."
    return _complain(f"{broken}; {where}. {advice}", OVER_BUDGET)


@dataclass(frozen=True)
class _Delivery:
    """What was written and measured besides the compression's own report."""

    result: Result
    export: ExportReport | None = None
    benchmark: tuple[str, ...] = ()

    def text(self) -> str:
        report = RENDERERS["text"](self.result.report)
        return report if self.export is None else "\n\n".join([report, "\n".join([str(self.export), *self.benchmark])])

    def html(self) -> str:
        lines = [] if self.export is None else [*str(self.export).splitlines(), *self.benchmark]
        return html.render(self.result.report, lines)

    def json(self, paths: Sequence[Path] = ()) -> str:
        data = json.loads(RENDERERS["json"](self.result.report))
        export = None if self.export is None else json.loads(self.export.to_json())
        data |= {"onnx": export, "benchmark": list(self.benchmark)}
        return json.dumps({**data, "files": [str(path) for path in paths]} if paths else data, indent=1)


def _deliver(
    arguments: argparse.Namespace, result: Result, model: nn.Module, example: Call, folder: Path, source: Path
) -> int:
    """Write everything, print the results, and say how it went. What cannot be written does not stop the rest."""
    base = _stem(source) if result.budget_met else f"{_stem(source)}.over-budget"
    options: dict[str, Any] = {} if arguments.opset is None else {"opset": arguments.opset}
    failures: dict[str, None] = {}
    attempt = functools.partial(_attempt, failures, arguments.verbose)
    saved = attempt(lambda: result.save(folder / f"{base}.panther"))
    delivery = _Delivery(result)
    texts = dict.fromkeys(_write_reports(arguments, delivery, folder, base, attempt))
    path, rounds = folder / f"{base}.onnx", arguments.round_inputs
    export: ExportReport | None = attempt(lambda: result.export_onnx(path, **options, round_inputs=rounds))
    if export is not None:
        timed = _benchmark(model, export, example, options) if arguments.benchmark else ()
        delivery = _Delivery(result, export, tuple(timed))
        texts |= dict.fromkeys(_write_reports(arguments, delivery, folder, base, attempt))
    written = [made for made in (saved, None if export is None else export.path) if made is not None]
    _say_delivered(arguments, delivery, [*written, *texts])
    code, failed = DONE, export is None or not export.ok
    stale = f". {path} is of an earlier run" if failed and path.exists() else ""
    if failures:
        code = _complain(_unwritten(list(failures), saved, export) + stale, UNEXPECTED)
    if export is not None and not export.ok:
        advice = "try another --opset" if export.rounding is None else "leave out --round-inputs"
        instead = f"use the model in {saved} (panther.load), and {advice}" if saved else advice
        code = _complain(
            f"the ONNX file does not agree with the model and is kept as {export.path}; {instead}{stale}", PARITY_FAILED
        )
    if code or export is None:
        return code
    if result.budget_met:
        return DONE
    return _over_budget(arguments, result, f"the best that was found is in {export.path}")


def _unwritten(reasons: Sequence[str], saved: Path | None, export: ExportReport | None) -> str:
    if saved is None or export is not None:
        return f"not everything could be written: {'; '.join(reasons)}"
    return (
        f"the compressed model was saved, but not as ONNX: {'; '.join(reasons)}. "
        f"Load it with panther.load({str(saved)!r}, model=...)"
    )


def _attempt(failures: dict[str, None], verbose: bool, write: Callable[[], T]) -> T | None:
    """What a write gives; None, and its reason among the failures, when it does not succeed."""
    try:
        return write()
    except Exception as error:  # exporting runs the model's code; what is written already must not go unsaid
        _show_traceback(verbose)
        is_plain = isinstance(error, PantherError) or _is_about_arguments(error)
        failures[(str(error) if is_plain else _unexpected(error)).rstrip(".")] = None
        return None


def _write_reports(
    arguments: argparse.Namespace, delivery: _Delivery, folder: Path, base: str, attempt: Callable[..., Any]
) -> list[Path]:
    """The plan, the report in both forms, and the copy that --report asks for."""
    texts = {
        f"{base}.plan.json": delivery.result.plan.to_json(),
        f"{base}.report.txt": delivery.text(),
        f"{base}.report.json": delivery.json(),
    }
    paths: list[Path] = attempt(lambda: _write_texts(folder, texts)) or []
    if arguments.report:
        extra = Path(arguments.report)
        text = delivery.html() if extra.suffix == ".html" else texts[f"{base}.report{extra.suffix}"]
        copy = {extra.name: text}
        paths += attempt(lambda: _write_texts(extra.parent, copy)) or []
    return paths


def _say_delivered(arguments: argparse.Namespace, delivery: _Delivery, paths: Sequence[Path]) -> None:
    if arguments.json:
        _say(delivery.json(paths))
        return
    if not arguments.quiet:
        _say(delivery.text() + "\n")
    _say("\n".join(f"wrote {path}" for path in paths))


def _write_texts(folder: Path, texts: Mapping[str, str]) -> list[Path]:
    """Text files, each whole or not there."""
    with staging(folder, ", ".join(texts)) as stage:
        for name, text in texts.items():
            (stage / name).write_text(text + "\n", encoding="utf-8")
        return [(stage / name).replace(folder / name) for name in texts]


def _benchmark(model: nn.Module, export: ExportReport, example: Call, options: Mapping[str, Any]) -> list[str]:
    """The dense and the compressed ONNX file in turn in onnxruntime, one line a batch size."""
    inputs = flatten(model, example, torch.device("cpu"))
    axes = dynamic_axes(inputs)
    present = sizes(inputs, axes)
    batches = BENCHMARK_BATCHES if "batch" in export.dynamic else (example.batch_size,)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            dense = WRITERS["onnx"](model, Path(folder) / "dense.onnx", example, **options)
            sessions = [_session(path) for path in (dense.path, export.path)]
            for batch in batches:
                case = resized(inputs, axes, {**present, "batch": batch})
                feed = {name: tensor.numpy() for name, tensor in zip(case.names, case.tensors, strict=True)}
                lines.append(_ratio(batch, *medians_in_turn([_bound(session, feed) for session in sessions])))
        except Exception as error:  # a benchmark that fails must not cost the report
            lines.append(f"benchmark: could not be run: {type(error).__name__}: {error}")
    return lines


def _ratio(batch: int, dense: float, compressed: float) -> str:
    return (
        f"onnxruntime, batch {batch}, {torch.get_num_threads()} threads: dense {dense * 1e3:.3f} ms, "
        f"compressed {compressed * 1e3:.3f} ms, ratio {dense / compressed:.2f}x"
    )


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _bound(session: Any, feed: Mapping[str, Any]) -> Callable[[], object]:
    """One run of a session; an exporter may have dropped an input that changes nothing."""
    used = {value.name for value in session.get_inputs()}
    return functools.partial(session.run, None, {name: array for name, array in feed.items() if name in used})


if __name__ == "__main__":
    sys.exit(main())
