"""SkAutoTuner.from_model: the search of compress(search="tuned"), to be driven by hand.

The tuner knows nothing of models and imports none of this; its `from_model` looks this module up by name when it is
called. So whoever only tunes a function of numbers pays for nothing here, and imports still go one way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from torch import nn

from panther.allocate import resolve
from panther.allocators.base import total
from panther.allocators.tuned import (
    BEYOND,
    TRIALS,
    Key,
    Problem,
    Tried,
    key_of,
    plan_of,
    roles_of,
    space_of,
    starting_points,
    with_groups,
)
from panther.batches import as_call, inference, weights_may_change
from panther.compress import Result, prepared_for, request_for, solved
from panther.errors import PantherError
from panther.prepared import Prepared
from panther.progress import Progress
from panther.request import check_arguments, parse_budget, parse_seed
from panther.solve import search_plan
from panther.spec import Budget, Choice, Heal, Plan
from panther.trials import as_plan, can_score, identity, problem_for, student_of
from panther.tuner.trial import Params, Trial
from panther.tuner.tuner import SkAutoTuner

INITIAL = 10  # of the trials that compress makes


class ModelTuner(SkAutoTuner):
    """An SkAutoTuner over the knobs of one model's plan: a point is a plan within the budget.

        tuner = SkAutoTuner.from_model(model, 0.5, example_inputs=x, calib_data=batches, eval_fn=accuracy)
        params, score = tuner.optimize()
        result = tuner.result()                       # as from compress: the model, its report and its plan
        other = tuner.result({"floor": 0.5, "attention": 1.0})

    Knobs: "floor", the share of its uniform size that each layer keeps (1 is the uniform plan); "power", on the
    predicted divergence of a layer; "depth", and one for each group of layers: how often what its errors cost is
    doubled. A knob that is left out changes nothing. Everything else is as for any SkAutoTuner.
    """

    prepared: Prepared
    problem: Problem
    budget: Budget

    def choices(self, params: Params | None = None) -> list[Choice]:
        """What becomes of each layer at these parameters; at the best ones without any.

        Raises: ValueError for a knob that there is not.
        """
        params = self.best_params if params is None else params
        for name in params:
            if name not in self.space.parameters:
                knobs = self.space.parameters
                close = "".join(f"; did you mean {found!r}?" for found in get_close_matches(name, knobs, 1))
                raise ValueError(f"{name!r} is no knob of this model, which has {', '.join(knobs)}{close}")
        return plan_of(self.problem, params)

    def plan(self, params: Params | None = None) -> Plan:
        """The plan of these parameters, or of the best ones."""
        chosen = dict(self.best_params if params is None else params)
        tried = Tried(Trial(0, chosen), tuple(self.choices(chosen)))
        return as_plan(self.prepared, self.problem, self.budget, tried)

    @weights_may_change()
    def result(self, params: Params | None = None) -> Result:
        """The compressed model of these parameters, or of the best ones: healed, packed and checked."""
        return solved(self.prepared, self.budget, self.plan(params))

    def _header(self) -> dict[str, Any]:
        """Scores in a journal are of one model, its data and its budget."""
        return {**super()._header(), **identity(self.prepared, self.budget)}


@weights_may_change()
def from_model(
    model: nn.Module,
    budget: Any,
    *,
    example_inputs: Any,
    calib_data: Any = None,
    eval_fn: Callable[[nn.Module], Any] | None = None,
    include: Sequence[Any] | None = None,
    exclude: Sequence[Any] | None = None,
    heal: str | Heal = "none",
    finer: bool = False,
    seed: int = 0,
    progress: bool = False,
    verify: bool = True,
    n_initial_points: int = INITIAL,
    n_iterations: int = TRIALS - INITIAL,
    **options: Any,
) -> ModelTuner:
    """A tuner whose points are plans for this model, scored by eval_fn on their models, neither healed nor packed.

    The model is measured and decomposed here, once. The first points are the sensitivity plan and one of even ranks;
    where that plan has layers with fewer channels, all plans have them. The arguments up to `heal` are those of
    panther.compress; `heal` and `verify` are for `result`.
    eval_fn: takes a model and answers a number, higher is better, or with `objectives=` a number for each by name.
        Without it the negative divergence from the dense model's answers is the score.
    finer: with knobs for roles of layers ("encoder.*.query"), or for single layers where names tell none.
    options: those of SkAutoTuner: strategy, objectives, journal, timeout, patience, callbacks, ...

    Raises: as panther.compress; ValueError for a budget of max_drop alone, which fixes no size.
    """
    wanted, seed = parse_budget(budget, eval_fn), parse_seed(seed)
    check_arguments(model=model, search="tuned", n_trials=None, timeout=None, dtypes=("float32",), inplace=False)
    if not wanted.limits_size or wanted.latency_ms is not None or wanted.peak_memory_mb is not None:
        raise ValueError(
            f"budget={wanted}: every plan of this tuner is within it before it is evaluated, which params, flops and "
            'size_mb allow; for other limits call panther.compress(..., search="tuned")'
        )
    request = request_for(
        model,
        as_call(example_inputs),
        budget=wanted,
        calib_data=calib_data,
        eval_fn=eval_fn,
        include=include,
        exclude=exclude,
        plan=None,
        search="tuned",
        heal=Heal.parse(heal),
        checkpoint=None,
        seed=seed,
        progress=Progress(progress),
        verify=verify,
    )
    prepared = prepared_for(request)
    if not can_score(prepared):
        raise ValueError("the model gives no numbers to compare: pass eval_fn=your_function to score it")
    target = resolve(wanted, prepared.found, prepared.dtype_bytes, prepared.dense.measured(wanted))
    start = search_plan(prepared, wanted, target, [], tunes=False).plan
    problem = problem_for(prepared, wanted, target, start)
    if finer:
        problem = with_groups(problem, roles_of(problem))
    tuner = ModelTuner(
        space_of(problem).parameters,
        Scorer(prepared, problem),
        n_initial_points,
        n_iterations,
        seed=seed,
        progress=progress,
        **options,
    )
    tuner.prepared, tuner.problem, tuner.budget = prepared, problem, wanted
    tuner.try_first(*(params for params, _ in starting_points(problem, start.choices)))
    return tuner


@dataclass
class Scorer:
    """What a point's model is worth: the objective of a ModelTuner. Equal plans are scored once."""

    prepared: Prepared
    problem: Problem
    known: dict[Key, Any] = field(default_factory=dict, repr=False)

    def __call__(self, **knobs: Any) -> Any:
        """Raises: PantherError for a plan beyond the limits, which only several tight ones at once bring about."""
        choices = plan_of(self.problem, knobs)
        key = key_of(choices)
        if key not in self.known:
            if not self.problem.target.is_met_by(total(choices)):
                raise PantherError(BEYOND)
            self.known[key] = self._answer(choices)
        return self.known[key]

    @weights_may_change()
    def _answer(self, choices: Sequence[Choice]) -> Any:
        request = self.prepared.request
        if request.eval_fn is None:
            return -self.prepared.divergence(choices)
        student = student_of(self.prepared, choices)
        with inference(student):
            return request.eval_fn(student)
