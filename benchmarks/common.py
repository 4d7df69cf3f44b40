"""What the scripts share: panther's stages one by one, so that rows differ in one thing only, and the printing.

Every row of a script sees the same calibration inputs and the same held-out data, keeps the same share of the same
layers, in ranks of the same steps, and nothing is trained afterwards.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as changed
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import nn

import panther
from models.recipe import Recipe
from panther.allocate import allocate, in_file, resolve
from panther.allocators import Options
from panther.allocators.base import total
from panther.batches import Call, as_call, batch_call
from panther.chains import CHANNELS, LINEAR, PACKINGS, TWO_GEMM
from panther.channels import kept_of, narrow, narrowable, share_for
from panther.decompose import candidates, decompose
from panther.errors import PantherError
from panther.factors import Factors, dense_weight
from panther.gradients import chunk_size
from panther.importance import Importance, affordable_samples, importance, reference
from panther.measure import affordable_gradients, measure, passes
from panther.pack import pack
from panther.replace import replace
from panther.spec import Budget, Capture, Plan, Target
from panther.verify import environment

ONE_SCHEME = (
    LINEAR,
    "output_channel",
)  # a convolution seen as the matrix (outputs, everything else), as plain SVD does
PACKAGES = ("numpy", "onnxruntime", "transformers")


@dataclass(frozen=True)
class Decomposition:
    """How layers are decomposed: with which sketch, in which schemes, and what it may know of the data."""

    sketch: str
    schemes: tuple[str, ...] = ()  # empty: all that apply, the best of each layer at equal cost
    sees_data: bool = True
    sees_gradients: bool = False
    channels: bool = False  # whether layers may have fewer channels between them, where ranks are by importance


@dataclass(frozen=True)
class Method:
    """One row of a table."""

    label: str
    how: Decomposition
    search: str = "uniform"
    packings: tuple[str, ...] = PACKINGS


PANTHER = Decomposition("auto", sees_gradients=True, channels=True)

METHODS = (
    Method("plain SVD", Decomposition("data_free", ONE_SCHEME, sees_data=False), packings=(TWO_GEMM,)),
    Method("whitened SVD", Decomposition("whitened", ONE_SCHEME), packings=(TWO_GEMM,)),
    Method("panther, uniform ranks", PANTHER),
    Method("panther, the default", PANTHER, "sensitivity"),
)

LEGEND = (
    "plain SVD: of the weights alone; whitened SVD: SVD-LLM's, made stronger by centring and corrected biases",
    "panther.compress keeps a tenth of its batches aside for its own report; here every row is fitted to all",
)


@dataclass(frozen=True)
class Subject:
    """A recipe's model, its layers and its calibration inputs, ready for any method."""

    model: nn.Module
    found: Capture
    calls: tuple[Call, ...]
    example: Call

    @property
    def samples(self) -> int:
        return sum(call.batch_size for call in self.calls)

    @property
    def sketchable_params(self) -> int:
        return sum(spec.params for spec in self.found.sketchable)


@dataclass(frozen=True)
class Row:
    """A method's task figures and plans by budget; the dense model has the same figures at each, and no plan."""

    label: str
    data: str  # what it was given of the calibration inputs, in words
    figures: Mapping[float, Mapping[str, float]]
    plans: Mapping[float, Plan] = field(default_factory=dict)


Format = Callable[[Mapping[str, float]], str]


def subject(recipe: Recipe, exclude: Sequence[Any] | None = None) -> Subject:
    """The recipe's model with the layers that every row replaces: all that can be sketched, but for `exclude`."""
    example = as_call(recipe.example_inputs)
    found = panther.analyze(recipe.model, recipe.example_inputs, exclude=exclude)
    return Subject(
        recipe.model, found, tuple(batch_call(batch, example, recipe.model) for batch in recipe.batches), example
    )


def factors_of(of: Subject, how: Decomposition, seed: int) -> dict[str, Factors]:
    """Every layer that can be sketched, measured and decomposed; statistics are freed layer by layer.

    Raises: PantherError when backward passes are asked for and the model allows none.
    """
    found: dict[str, Factors] = {}
    pairs = narrowable(of.found.sketchable, of.found.followers) if how.channels else {}
    for part in passes(of.found.sketchable, pairs):
        profiles = {}
        if how.sees_data:
            backward = affordable_gradients(of.samples) if how.sees_gradients else 0
            chunk = max(1, chunk_size(of.found.layers, of.example.batch_size))
            measured = measure(
                of.model,
                part,
                of.calls,
                samples=of.samples,
                channels_of=pairs,
                gradient_samples=backward,
                chunk=chunk,
                seed=seed,
            )
            if measured.not_differentiated is not None:
                raise PantherError(f"no backward pass, so this would be another method: {measured.not_differentiated}")
            profiles = measured.profiles
        for spec in part:
            module = of.model.get_submodule(spec.name)
            profile, pair = profiles.pop(spec.name, None), pairs.get(spec.name)
            whole = decompose(module, spec, profile, sketch=how.sketch, seed=seed, pair=pair)
            found[spec.name] = _only(whole, how.schemes)
    return {spec.name: found[spec.name] for spec in of.found.sketchable}


def _only(factors: Factors, schemes: Sequence[str]) -> Factors:
    if not schemes:
        return factors
    kept = (*schemes, CHANNELS)  # which are there only where they were asked for
    return changed(factors, schemes={name: d for name, d in factors.schemes.items() if name in kept})


def plans_of(
    of: Subject,
    factors: Mapping[str, Factors],
    searches: Sequence[str],
    keeps: Sequence[Any],
    seed: int,
    packings: Sequence[str] = PACKINGS,
) -> Iterator[tuple[str, Any, Plan]]:
    """One plan for each search and budget, which is anything that Budget.parse takes.

    Importance is measured once, when a search first asks for it.

    Raises: PantherError when a plan keeps more than it may.
    """
    dtype_bytes = {name: dense_weight(f.module).element_size() for name, f in factors.items()}
    options = {name: candidates(f, dtype_bytes[name], packings=packings) for name, f in factors.items()}
    against = reference(of.model, of.calls, affordable_samples(of.found, of.example))

    @functools.cache
    def importances() -> dict[str, Importance]:
        say(f"measuring the importance of {len(factors)} layers")
        return importance(against, factors, options)

    evaluate = functools.partial(against.divergence, factors)
    for search, keep in itertools.product(searches, keeps):
        target = resolve(Budget.parse(keep), of.found, dtype_bytes)

        def solved(options: Options, target: Target = target, search: str = search, keep: Any = keep) -> Plan:
            return allocate(
                in_file(options, of.found),
                target,
                of.found,
                search=search,
                divergence=lambda layer, error: importances()[layer].divergence(error),
                evaluate=evaluate,
                budget=str(keep),
                seed=seed,
            )

        plan, dense = solved(options), total([choices[-1] for choices in options.values()])
        share = share_for(kept_of(target, dense)) if search == "sensitivity" else None
        if share is not None and any(known.pair for known in factors.values()):
            fewer = narrow(of.model, factors, options, importances(), share, dtype_bytes, seed=seed)
            plans = [plan] if fewer is None else [plan, solved(fewer.options)]
            plan = min(plans, key=lambda one: evaluate(one.choices))
        if not target.is_met_by(plan.cost):
            kept = ", ".join(
                f"{getattr(plan.cost, name):,} {'weights' if name == 'params' else name} and may keep {limit:,}"
                for name, limit in target.limits().items()
            )
            raise PantherError(f"{search} ranks keep {kept}")
        yield search, keep, plan


def compressed(
    of: Subject, methods: Sequence[Method], keeps: Sequence[float], seed: int
) -> Iterator[tuple[Method, float, Plan, nn.Module]]:
    """A compressed model for every method and budget; neighbours with the same decomposition share it."""
    for (how, packings), group in itertools.groupby(methods, key=lambda method: (method.how, method.packings)):
        by_search = {method.search: method for method in group}
        factors = factors_of(of, how, seed)
        for search, keep, plan in plans_of(of, factors, tuple(by_search), keeps, seed, packings):
            yield by_search[search], keep, plan, built(of, factors, plan)


def built(of: Subject, factors: Mapping[str, Factors], plan: Plan) -> nn.Module:
    """The model that a plan makes, replaced and packed."""
    return pack(replace(of.model, factors, plan), plan, of.found.followers)


def rows_of(
    recipe: Recipe, of: Subject, methods: Sequence[Method], keeps: Sequence[float], seed: int, unit: str
) -> list[Row]:
    """The dense row and one for each method; what is being measured is told on stderr."""
    say(f"{recipe.name}: dense")
    dense = recipe.metrics(of.model)
    rows = [Row("dense", "", dict.fromkeys(keeps, dense))]
    figures: dict[str, dict[float, Mapping[str, float]]] = {method.label: {} for method in methods}
    plans: dict[str, dict[float, Plan]] = {method.label: {} for method in methods}
    for method, keep, plan, model in compressed(of, methods, keeps, seed):
        say(f"{recipe.name}: {method.label} at keep {keep}")
        plans[method.label][keep] = plan
        figures[method.label][keep] = recipe.metrics(model)
    return rows + [Row(m.label, data_used(m, of, unit), figures[m.label], plans[m.label]) for m in methods]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def data_used(method: Method, of: Subject, unit: str) -> str:
    """How much data a row was given, in words."""
    if not method.how.sees_data:
        return "none"
    samples = of.samples
    parts = [f"{samples} {unit}"]
    if method.how.sees_gradients:
        parts.append(f"{min(samples, affordable_gradients(samples))} also backward")
    if method.search != "uniform":
        parts.append(f"{min(samples, affordable_samples(of.found, of.example))} for the ranks")
    return ", ".join(parts)


def comparison(rows: Sequence[Row], keeps: Sequence[float], formats: Mapping[str, Format]) -> str:
    """The rows as one table: for every budget a column for each of `formats`, name -> how it reads."""
    columns = ["", "calibration data", *(f"keep {keep}: {name}" for keep in keeps for name in formats)]
    lines = [
        [row.label, row.data, *(read(row.figures[keep]) for keep in keeps for read in formats.values())] for row in rows
    ]
    return table(columns, lines)


def kept_line(of: Subject, rows: Sequence[Row], keeps: Sequence[float]) -> str:
    """What the rows really keep: ranks come in steps, so that no row uses its budget up exactly."""
    layers = len(of.found.sketchable)
    parts = []
    for keep in keeps:
        shares = [row.plans[keep].cost.params / of.sketchable_params for row in rows if keep in row.plans]
        parts.append(f"{min(shares):.4f} to {max(shares):.4f} at keep {keep}")
    return f"share kept of the {of.sketchable_params:,} weights of {layers} layers: {', '.join(parts)}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that also reads well as it is: the first column to the left, the others to the right."""
    widths = [max(3, *(len(line[index]) for line in [columns, *rows])) for index in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(columns), line(rule), *map(line, rows)])


def report(
    recipe: Recipe,
    of: Subject,
    rows: Sequence[Row],
    keeps: Sequence[float],
    formats: Mapping[str, Format],
    calibration: str,
    seed: int,
    notes: Sequence[str] = (),
) -> str:
    """Header, table, and what the rows keep: all that a script prints."""
    what = [f"{recipe.name}: {recipe.notes}", f"calibration: {calibration}; no row is trained afterwards"]
    closing = [kept_line(of, rows, keeps), *LEGEND, *notes]
    return "\n".join([header([recipe], what, seed), "", comparison(rows, keeps, formats), "", *closing])


def header(recipes: Sequence[Recipe], what: Sequence[str], seed: int) -> str:
    """What a reader needs to know beside the figures, and to measure them again."""
    where = {"panther": panther.__version__, **environment(recipes[0].model, seed)}
    where |= {package: _version(package) for package in PACKAGES}
    licences = [f"licence of {recipe.name}: {recipe.licence}" for recipe in recipes]
    measured = "measured with: " + ", ".join(f"{name} {value}" for name, value in where.items())
    return "\n".join([*what, f"command: {command()}", measured, *licences])


def command() -> str:
    """What was typed to start this script."""
    spec = sys.modules["__main__"].__spec__
    return " ".join(["python", *(["-m", spec.name] if spec else sys.argv[:1]), *sys.argv[1:]])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
