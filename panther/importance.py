"""How much each layer's error hurts the model's output, measured without labels.

A layer is truncated at two sizes (one where its shape allows no more), the model runs on a few samples, and the
divergence D of its outputs is fitted as D = a E^b, where E is the share of the layer's own output that was lost.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import log_softmax

from panther.answers import answers_of, class_divergence, named_logits
from panther.batches import Call, inference, masked_rows, run, runs, squared_error, unchanged
from panther.factors import Factors
from panther.products import fast_layers
from panther.progress import Progress
from panther.replay import HELD_BYTES, Record, record
from panther.spec import Capture, Choice

SAMPLES = 32  # at most
LEAST_SAMPLES = 4
# Plans are told apart by luck on few samples: Whisper tiny.en at an eighth of its bytes, plans that differ in the first
# convolution only: .019 and .034 on four. The best few are looked at on so many times as many.
CLOSER = 4
FLOPS = 2e12  # of all truncations together, which fewer samples keep to: 10 to 30 seconds on two cores
KEPT = (0.5, 0.25)  # sizes at which a layer is truncated, as a share of its weights
LEAST_ERROR = 1e-6  # of a truncation that tells anything: what is below is rounding, in the error and in the output
CHECKED = 11  # of so many layers one is measured in a whole run, too: a prime, so that each place in a block comes up
B_RANGE = (0.5, 2.0)  # a slope outside of this comes from noise: divergence is about linear in the lost energy


@dataclass(frozen=True)
class Importance:
    """D = a E^b for one layer."""

    a: float
    b: float

    def divergence(self, error: float) -> float:
        return float(self.a * error**self.b) if error > 0 else 0.0  # an infinite `a` leaves the dense layer at 0


@dataclass(frozen=True)
class Reference:
    """A few samples and what the dense model answers to them."""

    model: nn.Module
    calls: tuple[Call, ...]
    outputs: tuple[tuple[Tensor, ...], ...]
    scores: int | None = None  # which of the outputs are scores of classes by their name

    @property
    def is_comparable(self) -> bool:
        """Whether the model answers with any number that could be compared."""
        return any(answers for answers in self.outputs)

    def records(self) -> list[Record]:
        """What the dense model's modules answer to each call."""
        with inference(self.model), fast_layers():
            return [record(self.model, call, HELD_BYTES / len(self.calls)) for call in self.calls]

    def divergence(
        self, factors: Mapping[str, Factors], choices: Sequence[Choice], records: Sequence[Record] = ()
    ) -> float:
        """Mean squared error of the model's outputs when these layers are what the choices say.

        In units of each output's variance; padded positions of (batch, length, ...) outputs are left out. What is named
        logits counts by the divergence of its probabilities, in units of that of a constant answer.

        records: of each call, where what comes before the first of these layers is not to be computed again.
        """
        tensors: dict[str, Tensor] = {}
        gained: dict[nn.Module, Tensor] = {}
        for choice in choices:
            if not choice.is_dense:
                weight, bias = factors[choice.layer].dense_equivalent(choice)
                tensors[f"{choice.layer}.weight"] = weight.contiguous()  # from which torch takes the layout of outputs
                module = factors[choice.layer].module
                if bias is not None and getattr(module, "bias", None) is not None:
                    tensors[f"{choice.layer}.bias"] = bias
                elif bias is not None:
                    gained[module] = bias.reshape(-1, *(1,) * len(factors[choice.layer].spec.kernel_size))
        lost, count = 0.0, 0
        changed = [self.model.get_parameter(name) for name in tensors]
        with inference(self.model), fast_layers(), _with_biases(gained):
            for call, answers, known in itertools.zip_longest(self.calls, self.outputs, records):
                output = _answered(self.model, call, tensors, changed, known)
                for place, (answer, got) in enumerate(
                    itertools.zip_longest(answers, answers_of(output)[: len(answers)])
                ):
                    lost += (_class_error if place == self.scores else squared_error)(answer, got, call)
                    count += answer.numel()
        return lost / max(1, count)


def _answered(
    model: nn.Module, call: Call, tensors: Mapping[str, Tensor], changed: Collection[Tensor], known: Record | None
) -> Any:
    """What a model answers with other tensors; from a record of it as far as that goes."""
    if known is not None and known.answers:
        with contextlib.suppress(Exception), unchanged(model), known.replayed(changed):
            return run(model, call, tensors=tensors)
    with unchanged(model):  # which says what the model raises
        return run(model, call, tensors=tensors)


def _class_error(answer: Tensor, got: Tensor | None, call: Call) -> float:
    """The divergence of class probabilities, times the numbers that it is of."""
    if got is None or got.shape != answer.shape:
        return float(answer.numel())
    masks = call.masks()
    lost = class_divergence(*(log_softmax(masked_rows(scores, masks).float(), -1) for scores in (got, answer)))
    return float(lost) * answer.numel() if math.isfinite(float(lost)) else math.inf


@contextlib.contextmanager
def _with_biases(gained: Mapping[nn.Module, Tensor]) -> Iterator[None]:
    """Layers without a bias add one to their outputs, as their sketched forms do."""
    hooks = [
        module.register_forward_hook(lambda _module, _args, output, bias=bias: output + bias, prepend=True)
        for module, bias in gained.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def affordable_samples(found: Capture, example: Call) -> int:
    """How many samples every layer can be truncated on within FLOPS."""
    one_run = sum(spec.flops for spec in found.layers) / max(1, example.batch_size)
    everything = one_run * len(found.sketchable) * len(KEPT)
    return max(LEAST_SAMPLES, min(SAMPLES, int(FLOPS / max(1.0, everything))))


def reference(model: nn.Module, calls: Sequence[Call], samples: int = SAMPLES) -> Reference:
    """The dense model's answers on the first `samples` samples of the calls."""
    chosen: list[Call] = []
    left = samples
    for call in calls:
        if left <= 0:
            break
        chosen.append(call)
        left -= call.batch_size
    if left < 0 and runs(model, last := chosen[-1].rows(0, chosen[-1].batch_size + left)):
        chosen[-1] = last
    found = []
    with inference(model), fast_layers():
        for call in chosen:
            with unchanged(model):
                found.append(run(model, call))
    outputs = tuple(tuple(answers_of(output)) for output in found)
    named = named_logits(found[0]) if found else None
    scores = next((place for place, answer in enumerate(outputs[0] if outputs else ()) if answer is named), None)
    return Reference(model, tuple(chosen), outputs, scores)


def importance(
    against: Reference,
    factors: Mapping[str, Factors],
    options: Mapping[str, Sequence[Choice]],
    *,
    progress: Progress | None = None,
) -> dict[str, Importance]:
    """D = a E^b for every layer, from at most two truncations.

    Cost: for each a run of the model from that layer on, and for the layers of `_checked` a whole one.
    """
    records = against.records() if len(options) > 1 else []
    probes = {name: _probes(choices) for name, choices in options.items()}
    lost: dict[str, list[float]] = {}
    for name in (progress or Progress(False)).track(options, "importance", len(options)):
        lost[name] = [against.divergence(factors, [choice], records) for choice in probes[name]]
    checked = _checked([name for name in probes if probes[name]]) if any(r.answers for r in records) else []
    if any(against.divergence(factors, probes[name][:1]) != lost[name][0] for name in checked):
        lost = {name: [against.divergence(factors, [choice]) for choice in found] for name, found in probes.items()}
    return {
        name: fit([(choice.error, d) for choice, d in zip(found, lost[name], strict=True)])
        for name, found in probes.items()
    }


def _checked(names: Sequence[str]) -> list[str]:
    """The last layer, one in the middle, and every so many: most comes from memory there, whole blocks or parts."""
    places = {len(names) - 1, len(names) // 2, *range(len(names) - 1, -1, -CHECKED)}
    return [names[place] for place in sorted(places) if 0 <= place < len(names)]


def _probes(options: Sequence[Choice]) -> list[Choice]:
    """The options at which a layer is judged: the best within KEPT, else the one that loses most.

    Else: where the best lose nothing, or there are none; a layer of two outputs keeps half of its numbers at rank 1.
    """
    best = [choice for kept in KEPT if (choice := best_within(options, kept)) and choice.error > LEAST_ERROR]
    worst = max(options, key=lambda choice: choice.error)
    return best or ([worst] if worst.error > 0 else [])


def best_within(options: Sequence[Choice], kept: float) -> Choice | None:
    """The option that loses least among those that keep at most this share of the weights."""
    dense = options[-1].cost.params
    inside = [c for c in options if not c.is_dense and c.cost.params <= kept * dense]
    return min(inside, key=lambda c: c.error, default=None)


def fit(points: Sequence[tuple[float, float]]) -> Importance:
    """a and b of D = a E^b through one or two points (error, divergence); b is 1 where the data cannot tell.

    Of a layer that no point judges, any error counts without limit.
    """
    usable = [(e, d) for e, d in points if e > 0 and 0 < d < math.inf]
    if not usable:
        return Importance(0.0 if points and all(d == 0 for _, d in points) else math.inf, 1.0)
    (e_low, d_low), (e_high, d_high) = usable[0], usable[-1]
    b = 1.0
    if e_high > e_low * 1.05 and d_high > d_low:
        b = min(B_RANGE[1], max(B_RANGE[0], math.log(d_high / d_low) / math.log(e_high / e_low)))
    middle = math.exp(sum(math.log(d) - b * math.log(e) for e, d in usable) / len(usable))
    return Importance(middle, b)
