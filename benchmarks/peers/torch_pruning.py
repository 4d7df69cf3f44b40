"""Torch-Pruning on a recipe's model: whole heads and hidden units of a transformer, channels of a CNN.

Runs in the environment of benchmarks.peers.environment. The options are those of the package's own transformer
example (heads pruned whole, the pooler ignored) and of its documentation; those that can go either way are all tried,
and the best on calibration data is kept.

Source: Fang et al., "DepGraph: Towards Any Structural Pruning" (CVPR 2023).
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from benchmarks.peers.base import CannotError, Compressed, Job, best_of, largest_within, main
from panther.batches import Call, float_outputs, run, scale_of

GRADIENT_SAMPLES = 192  # as panther takes, at most
CHUNK = 8  # samples a backward pass

Gradients = Mapping[str, Tensor]
Score = Callable[[nn.Module], Any]  # makes the package's importance for a copy of the model


@dataclass(frozen=True)
class Scope:
    """What of a model may be pruned."""

    label: str  # goes behind those of the options
    ignored: tuple[str, ...]  # modules whose outputs stay as wide as they are
    heads: Mapping[str, int] = field(default_factory=dict)  # projections of attention, and how many heads they feed
    output: Callable[[Any], Any] | None = None  # a number of the model's answer, from which the package traces back
    finish: Callable[[nn.Module, nn.Module], None] | None = None  # called with the pruned and the dense model
    same_ratio: bool = True  # whether one ratio for all layers is tried, beside a ranking over all


def compress(job: Job, share: float) -> Compressed:
    """The best of the options at this share of the FLOPs."""
    scores = _scores(job)
    options: dict[str, Callable[[], nn.Module]] = {}
    for scope in SCOPES[job.task.model](job):
        if scope.same_ratio:
            same = functools.cache(functools.partial(_size, job, share, scope, _magnitude, False))  # whatever the score
            for name, score in scores.items():
                build = functools.partial(pruned, job, scope, score, False)
                options[f"{name}, the same ratio in each layer{scope.label}"] = functools.partial(_fitted, build, same)
        for name, score in scores.items():
            build = functools.partial(pruned, job, scope, score, True)
            size = functools.partial(_size, job, share, scope, score, True)
            options[f"{name}, ranked over all layers{scope.label}"] = functools.partial(_fitted, build, size)
    return best_of(job, options)


def _size(job: Job, share: float, scope: Scope, score: Score, everywhere: bool) -> float:
    return largest_within(share, job, functools.partial(pruned, job, scope, score, everywhere))


def _fitted(build: Callable[[float], nn.Module], size: Callable[[], float]) -> nn.Module:
    return build(size())


def pruned(job: Job, scope: Scope, score: Score, everywhere: bool, kept: float) -> nn.Module:
    """A copy of the dense model with this share of its heads, hidden units or channels."""
    model = copy.deepcopy(job.of.model).requires_grad_()
    heads = {model.get_submodule(name): count for name, count in scope.heads.items()}
    example = job.of.example
    pruner = tp.pruner.BasePruner(
        model,
        dict(example.kwargs) or example.args,
        importance=score(model),
        global_pruning=everywhere,
        pruning_ratio=1 - kept,
        ignored_layers=[model.get_submodule(name) for name in scope.ignored],
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=1 - kept,
        output_transform=scope.output,
    )
    pruner.step()
    _tell_attention(model, pruner.num_heads)
    if scope.finish is not None:
        scope.finish(model, job.of.model)
    model.zero_grad()
    return model.eval()


def _tell_attention(model: nn.Module, heads: Mapping[nn.Module, int]) -> None:
    """Attention modules keep their sizes in attributes, which a pruner does not know."""
    module: Any
    for module in model.modules():
        query = getattr(module, "query", None)
        if isinstance(query, nn.Linear) and query in heads:
            module.num_attention_heads = heads[query]
            module.attention_head_size = query.out_features // heads[query]
            module.all_head_size = query.out_features


# Importance -----------------------------------------------------------------------------------------------------------


def _scores(job: Job) -> dict[str, Score]:
    """Magnitude, and first and second order of the output's reaction, which needs no labels."""
    summed, squared = _gradients(job)

    def taylor(model: nn.Module) -> Any:
        _put_gradients(model, summed)
        return tp.importance.GroupTaylorImportance()

    def hessian(model: nn.Module) -> Any:
        _put_gradients(model, {name: square.sqrt() for name, square in squared.items()})
        importance = tp.importance.GroupHessianImportance()
        importance.zero_grad()
        importance.accumulate_grad(model)
        return importance

    return {
        "L2 magnitude": _magnitude,
        "Taylor": taylor,
        "Hessian": hessian,
    }


def _magnitude(_: nn.Module) -> Any:
    return tp.importance.GroupMagnitudeImportance(p=2)


def _gradients(job: Job) -> tuple[Gradients, Gradients]:
    """Sums over calibration samples of the gradients of a random projection of the output, and of their squares.

    A distillation loss has no gradient where the student is still the teacher; of such projections the squares have
    the second derivatives of that loss as their mean.
    """
    model = copy.deepcopy(job.of.model).requires_grad_()
    generator = torch.Generator().manual_seed(job.task.seed)
    summed = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    squared = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for call in _chunks(job.of.calls):
        model.zero_grad()
        total = torch.zeros(())
        for output in float_outputs(run(model, call)):
            total = total + (output * torch.randn(output.shape, generator=generator)).sum() / scale_of(output.detach())
        total.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                summed[name] += parameter.grad
                squared[name] += parameter.grad.square()
    return summed, squared


def _chunks(calls: Sequence[Call]) -> list[Call]:
    """The first GRADIENT_SAMPLES samples, a few at a time."""
    parts = [call.rows(at, at + CHUNK) for call in calls for at in range(0, call.batch_size, CHUNK)]
    return parts[: GRADIENT_SAMPLES // CHUNK]


def _put_gradients(model: nn.Module, gradients: Gradients) -> None:
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name].clone()


# Scopes ---------------------------------------------------------------------------------------------------------------


def bert_scopes(job: Job) -> list[Scope]:
    """With the residual stream as wide as it was, and with the stream pruned too, as in the package's BERT example."""
    names = [spec.name for spec in job.of.found.layers]
    ends = (".query", ".key", ".value")
    model: Any = job.of.model
    count = model.config.num_attention_heads
    heads = {name: count for name in names if name.endswith(ends)}
    stream = tuple(name for name in names if name.endswith("output.dense"))

    def output(answer: Any) -> Tensor:
        pooled: Tensor = answer.pooler_output
        return pooled.sum()

    return [
        Scope("", ("pooler", "embeddings", *stream), heads, output),
        Scope(", residual stream pruned", ("pooler",), heads, output, _widened, same_ratio=False),
    ]


def _widened(model: Any, dense: Any) -> None:
    """The last hidden state at its old width again, so that it compares: what was pruned starts as zeros.

    The layer that does so is trained when the model is healed, and its FLOPs count.
    """
    name = f"encoder.layer.{len(model.encoder.layer) - 1}.output.LayerNorm"
    norm, old = model.get_submodule(name), dense.get_submodule(name)
    kept = _kept(torch.stack([norm.weight, norm.bias]), torch.stack([old.weight, old.bias]))
    widen = nn.Linear(len(kept), old.weight.numel())
    with torch.no_grad():
        widen.weight.zero_()[kept, torch.arange(len(kept))] = 1.0
        widen.bias.zero_()
    model.encoder.layer[-1].output.LayerNorm = nn.Sequential(norm, widen)
    model.pooler = copy.deepcopy(dense.pooler)


def _kept(left: Tensor, whole: Tensor) -> Tensor:
    """Which columns of `whole` are left: pruning keeps their order and their numbers.

    Raises: CannotError when they cannot be told.
    """
    found, at = [], 0
    for column in left.T:
        while at < whole.shape[1] and not torch.equal(whole[:, at], column):
            at += 1
        if at == whole.shape[1]:
            raise CannotError("the pruned residual stream cannot be matched with the dense one")
        found.append(at)
        at += 1
    return torch.tensor(found)


def crepe_scopes(job: Job) -> list[Scope]:
    """Channels of all convolutions but the last, whose outputs the model reshapes to a fixed number of features."""
    return [Scope(", outputs of conv6 kept", ("classifier", "conv6"))]


SCOPES: dict[str, Callable[[Job], list[Scope]]] = {"minilm": bert_scopes, "crepe": crepe_scopes}


if __name__ == "__main__":
    sys.exit(main(compress))
