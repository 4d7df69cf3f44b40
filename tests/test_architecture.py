"""Imports go one way, families have one file a member, and importing panther stays light."""

import ast
import importlib
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "panther"

NOUNS = {"errors", "spec", "chains"}
STAGES = {"capture", "measure", "decompose", "importance", "allocate", "replace", "heal", "pack", "verify"}

# Nouns and helpers that several stages share.
HELPERS = {
    "columns",
    "batches",
    "factors",
    "progress",
    "build_info",
    "gradients",
    "sizes",
    "answers",
    "batchnorm",
    "healers",
    "subclasses",
    "followers",
    "latency",
    "limits",
    "mixture",
    "products",
    "quantise",
    "selection",
    "request",
    "opening",
    "padding",
    "replay",
}

# The registry in each family's __init__.py.
FAMILIES = {
    "nn": "LAYERS",
    "sketches": "SKETCHES",
    "allocators": "ALLOCATORS",
    "ops": "OPS",
    "report": "RENDERERS",
    "converters": "READERS",
}

# What each part may import of panther besides itself.
ALLOWED = {
    "errors": set(),
    "spec": {"errors"},
    "chains": {"errors", "spec"},
    "progress": set(),
    "build_info": {"ops"},
    "batches": {"errors"},
    "padding": {"batches"},
    "replay": {"batches"},
    "sizes": {"nn"},
    "ops": set(),
    "quantise": {*NOUNS, "sketches"},
    "nn": {"ops", "quantise", *NOUNS},
    "sketches": {*NOUNS, "products"},
    "mixture": set(),
    "allocators": {*NOUNS, "mixture", "tuner"},
    "products": {"ops"},
    "tuner": {"errors", "progress"},
    "factors": {"nn", "quantise", "sketches", *NOUNS},
    "report": {*NOUNS},
    "healers": {*NOUNS, "answers", "batches", "factors", "nn", "products", "progress", "quantise", "sketches"},
    "limits": {*NOUNS},
    "selection": {*NOUNS},
    "latency": {*NOUNS, "factors", "progress"},
    "opening": {"batches", "nn"},
    "request": {*NOUNS, "allocators", "batches", "nn", "opening", "progress"},
    "prepared": {*STAGES, *HELPERS, *NOUNS, "channels", "nn"},
    "columns": {*NOUNS, "factors", "products", "sketches"},
    "channels": {*STAGES, *HELPERS, *NOUNS, "allocators", "nn", "sketches"},
    "trials": {*STAGES, *HELPERS, *NOUNS, "prepared", "allocators", "tuner"},
    "solve": {*STAGES, *HELPERS, *NOUNS, "channels", "prepared", "trials", "allocators"},
    "compress": {
        *STAGES,
        *HELPERS,
        *NOUNS,
        *("channels", "prepared", "trials", "solve", "allocators", "nn", "ops", "sketches", "converters"),
    },
    "tuning": {*STAGES, *HELPERS, *NOUNS, "prepared", "trials", "solve", "compress", "allocators", "tuner"},
    "converters": {*NOUNS, "batches", "nn", "ops"},
}


def module_name(path):
    """ "panther.nn.base" for panther/nn/base.py; converters/ is installed as panther.converters."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "converters":
        parts.insert(0, "panther")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def sources():
    """Every module of the package by name, with its path."""
    own = [path for path in PACKAGE.rglob("*.py") if "converters" not in path.relative_to(PACKAGE).parts]
    found = {module_name(path): path for path in (*own, *(ROOT / "converters").rglob("*.py"))}
    assert len(found) > 30
    return found


@cache
def imports(name):
    """The full names of all that a module imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(sources()[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part(name):
    """ "nn" for panther.nn.base: the stage, family or noun that a module belongs to."""
    return name.split(".")[1] if "." in name else name


def known_parts(name):
    """The parts of panther that a module imports from, its own left out."""
    inside = {full for full in imports(name) if full.startswith("panther.")}
    return {part(full) for full in inside if part(full) != "__version__"} - {part(name)}


def modules_of(*parts):
    return sorted(name for name in sources() if part(name) in parts)


def test_every_module_has_its_place():
    places = {*ALLOWED, *STAGES, *HELPERS, "convert", "panther"}
    assert {part(name) for name in sources()} <= places


@pytest.mark.parametrize("owner", sorted(ALLOWED))
def test_a_part_knows_only_the_parts_below_it(owner):
    # Drawing a report is asked for by the data itself, in Report.__str__.
    extra = {"report"} if owner == "spec" else set()
    for name in modules_of(owner):
        assert known_parts(name) <= ALLOWED[owner] | extra, name


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_stages_never_import_each_other_or_what_is_above_them(stage):
    unknown = {
        *STAGES,
        "channels",
        "prepared",
        "trials",
        "solve",
        "compress",
        "convert",
        "converters",
        "report",
        "tuning",
    }
    assert not known_parts(f"panther.{stage}") & unknown


@pytest.mark.parametrize("helper", sorted(HELPERS))
def test_helpers_know_no_stage(helper):
    for name in modules_of(helper):
        above = {"prepared", "trials", "solve", "compress", "convert", "converters", "tuning"}
        assert not known_parts(name) & {*STAGES, *above}, name


def test_nobody_imports_the_command_line():
    assert not [name for name in sources() if "convert" in known_parts(name)]


def test_a_stage_is_one_file():
    for stage in (*STAGES, "compress", "convert"):
        assert (PACKAGE / f"{stage}.py").is_file()


@pytest.mark.parametrize("owner", ["errors", "spec", "chains", "allocators", "progress", "limits"])
def test_what_needs_no_tensors_imports_no_torch(owner):
    for name in modules_of(owner):
        assert not {full for full in imports(name) if full.split(".")[0] in ("torch", "numpy")}, name


def test_converters_know_layers_and_ops_and_no_stage():
    for name in modules_of("converters"):
        assert not known_parts(name) & {*STAGES, "compress", "convert", "factors", "sketches", "allocators"}, name


def test_imports_inside_panther_run_in_no_circle():
    """Of modules, at their top: a circle would make what works depend on who is imported first."""
    graph = {name: at_the_top(name) for name in sources() if name != "panther"}
    left = dict(graph)
    while left:
        free = [name for name, wanted in left.items() if not wanted & left.keys()]
        assert free, f"a circle of imports among {sorted(left)}"
        for name in free:
            del left[name]


def at_the_top(name):
    """The modules of panther that a module imports when it is imported."""
    found = set()
    for node in ast.parse(sources()[name].read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in sources() else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return (found & sources().keys()) - {"panther", name}


# --- families --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_member_of_a_registry_has_its_file(family):
    members = getattr(importlib.import_module(f"panther.{family}"), FAMILIES[family])
    assert members
    for key, member in members.items():
        maker = getattr(member, "reference", member)  # an op is data; its formula has the file
        origin = getattr(maker, "__module__", type(maker).__module__)
        home = {family, "spec"} if family == "report" else {family}  # a report writes itself as JSON
        assert origin in sources() and part(origin) in home, f"{family}: {key} comes from {origin}"
        assert sources()[origin].name != "__init__.py"


def test_an_op_has_the_name_of_its_file_in_every_folder():
    from panther.ops import OPS

    for name in OPS:
        assert (PACKAGE / "ops" / f"{name}.py").is_file()
    for kernel in (ROOT / "csrc").glob("c[pu]*/*.*"):
        assert kernel.stem in OPS, f"{kernel.name} implements no op"


def test_core_headers_include_the_standard_library_and_each_other_only():
    headers = sorted((ROOT / "csrc" / "core").iterdir())
    assert headers
    for header in headers:
        for line in header.read_text().splitlines():
            if line.strip().startswith("#include"):
                target = line.split("#include", 1)[1].strip()
                own = target.startswith('"core/')
                standard = target.startswith("<") and "/" not in target and "torch" not in target
                assert own or standard, f"{header.name}: {target}"


# --- importing -------------------------------------------------------------------------------------------------------

HEAVY = ["onnx", "onnxruntime", "onnxscript", "hyperopt", "botorch", "transformers", "rich", "pandas", "matplotlib"]

REPORT = """
import json, sys
import panther
import torch
print(json.dumps([sorted(sys.modules), torch.cuda.is_initialized(), torch.get_num_threads()]))
"""


@cache
def after_import():
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", REPORT], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    return json.loads(run.stdout)


@pytest.mark.parametrize("package", HEAVY)
def test_importing_panther_leaves_heavy_packages_alone(package):
    assert package not in after_import()[0]


def test_importing_panther_initialises_no_gpu():
    assert after_import()[1] is False


def test_importing_panther_does_not_compile():
    assert not {"torch._inductor.compile_fx", "torch.utils.cpp_extension"} & set(after_import()[0])


def test_only_public_names_are_exported():
    import panther

    assert set(panther.__all__) == {name for name in panther.__all__ if hasattr(panther, name)}
    assert not [name for name in panther.__all__ if name.startswith("_") and name != "__version__"]
