"""Records the tables that benchmarks/tuner.py replays: what small real networks score at every point of a grid.

A network with sketched layers is trained on scikit-learn's handwritten digits once for every point and seed, or a
dense one is trained and its layers are cut to the ranks of the point. A table holds each accuracy on digits that were
not trained on, and the share of the dense weights that is kept; the score that is searched for is
accuracy - price * kept, so that larger is not simply better.
"""

from __future__ import annotations

import itertools
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from panther.nn import SKConv2d, SKLinear

TRAINED = 1200  # of the 1797 digits; the others are scored
CLASSES = 10

Point = Mapping[str, int]
Digits = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Recipe:
    """A grid, the network at a point of it, and how long it is trained.

    train: point, data, seed -> accuracy and the share of dense weights kept.
    """

    axes: Mapping[str, Sequence[int]]
    train: Callable[[Point, Digits, int], tuple[float, float]]
    price: float
    seeds: int = 3
    about: str = ""


def digits(samples: int = TRAINED, wrong: float = 0.0) -> Digits:
    """Images (n, 64) and labels to train on and to score with; a share `wrong` of the former's labels is drawn anew."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.data, dtype=torch.float32)[order] / 16
    labels = torch.tensor(data.target)[order]
    trained = labels[:samples].clone()
    generator = torch.Generator().manual_seed(1)
    is_wrong = torch.rand(samples, generator=generator) < wrong
    trained[is_wrong] = torch.randint(CLASSES, (int(is_wrong.sum()),), generator=generator)
    return images[:samples], trained, images[TRAINED:], labels[TRAINED:]


def fitted(make: Callable[[], nn.Module], data: Digits, seed: int, epochs: int) -> tuple[nn.Module, float]:
    """The network after training, and its accuracy."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # some points of a grid are larger than dense
        model = make()
    images, labels, _, _ = data
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3, foreach=True)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimiser.step()
    return model, accuracy(model, data)


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits) -> float:
    model.eval()
    return float((model(data[2]).argmax(1) == data[3]).double().mean())


def numbers(modules: Sequence[nn.Module]) -> int:
    return sum(p.numel() for module in modules for name, p in module.named_parameters() if "bias" not in name)


def sketched(
    layers: Callable[[Point], list[nn.Module]], dense: int, epochs: int, samples: int = TRAINED, wrong: float = 0.0
) -> Callable[[Point, Digits, int], tuple[float, float]]:
    """A network of these layers, ReLU between them and a dense head behind; `dense` numbers where none is sketched."""

    def train(point: Point, _: Digits, seed: int) -> tuple[float, float]:
        made: list[nn.Module] = []

        def make() -> nn.Module:
            made[:] = layers(point)
            return nn.Sequential(*itertools.chain.from_iterable((layer, nn.ReLU()) for layer in made), *head(made[-1]))

        score = fitted(make, digits(samples, wrong), seed, epochs)[1]
        return score, numbers([layer for layer in made if isinstance(layer, SKLinear | SKConv2d)]) / dense

    return train


def head(last: nn.Module) -> list[nn.Module]:
    if isinstance(last, SKLinear):
        return [nn.Linear(last.out_features, CLASSES)]
    return [nn.Flatten(), nn.Linear(32 * 16, CLASSES)]


def convolutional(point: Point) -> list[nn.Module]:
    return [
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        SKConv2d(16, 32, 3, point["num_terms"], point["low_rank"], stride=2, padding=1),
    ]


def cut(widths: Sequence[int], epochs: int) -> Callable[[Point, Digits, int], tuple[float, float]]:
    """A dense network of these widths, trained once a seed, its layers cut to the ranks of the point."""
    known: dict[int, list[tuple[Tensor, Tensor, Tensor, Tensor]]] = {}

    def parts(data: Digits, seed: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        if seed not in known:
            layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
            torch.manual_seed(seed)
            for layer in layers:
                layer.reset_parameters()
            stack = itertools.chain.from_iterable((layer, nn.ReLU()) for layer in layers)
            fitted(lambda: nn.Sequential(*list(stack)[:-1]), data, seed, epochs)
            known[seed] = [
                (*torch.linalg.svd(layer.weight.detach(), full_matrices=False), layer.bias.detach()) for layer in layers
            ]
        return known[seed]

    def train(point: Point, data: Digits, seed: int) -> tuple[float, float]:
        # A seed also draws which half of the held-out digits is looked at.
        chosen = torch.randperm(len(data[3]), generator=torch.Generator().manual_seed(seed))[: len(data[3]) // 2]
        x, kept, whole = data[2][chosen], 0, 0
        layers = parts(data, seed)
        for place, ((u, s, v, bias), rank) in enumerate(zip(layers, point.values(), strict=True)):
            x = x @ ((u[:, :rank] * s[:rank]) @ v[:rank]).T + bias
            x = x if place == len(layers) - 1 else x.relu()
            kept += rank * (u.shape[0] + v.shape[1])
            whole += u.shape[0] * v.shape[1]
        return float((x.argmax(1) == data[3][chosen]).double().mean()), kept / whole

    return train


def grid(**axes: int) -> dict[str, list[int]]:
    """From 1 to each number."""
    return {name: list(range(1, high + 1)) for name, high in axes.items()}


def one(inputs: int = 64, outputs: int = 128, **more: str) -> Callable[[Point], list[nn.Module]]:
    return lambda p: [SKLinear(inputs, outputs, p["num_terms"], p["low_rank"], **more)]  # type: ignore[arg-type]


RECIPES: dict[str, Recipe] = {
    "one_layer": Recipe(grid(num_terms=6, low_rank=12), sketched(one(), 64 * 128, 6), 0.05, about="64-128-10"),
    "one_layer_short": Recipe(
        grid(num_terms=6, low_rank=12), sketched(one(), 64 * 128, 1), 0.05, about="64-128-10, one epoch"
    ),
    "random_basis": Recipe(
        grid(num_terms=6, low_rank=12),
        sketched(one(basis="random"), 64 * 128, 6),
        0.05,
        about="64-128-10, random basis",
    ),
    "few_samples": Recipe(
        grid(num_terms=6, low_rank=12), sketched(one(), 64 * 128, 20, samples=150), 0.05, about="64-128-10, 150 digits"
    ),
    "wrong_labels": Recipe(
        grid(num_terms=6, low_rank=12),
        sketched(one(), 64 * 128, 12, samples=600, wrong=0.4),
        0.0,
        about="64-128-10, 4 of 10 labels drawn anew",
    ),
    "narrow": Recipe(grid(num_terms=6, low_rank=12), sketched(one(64, 24), 64 * 24, 6), 0.02, about="64-24-10"),
    "two_layers_alike": Recipe(
        grid(num_terms=6, low_rank=10),
        sketched(
            lambda p: [
                SKLinear(64, 96, p["num_terms"], p["low_rank"]),
                SKLinear(96, 96, p["num_terms"], p["low_rank"]),
            ],
            64 * 96 + 96 * 96,
            5,
        ),
        0.05,
        about="64-96-96-10, both layers alike",
    ),
    "two_layers": Recipe(
        {"terms_1": [1, 2, 3], "rank_1": list(range(1, 7)), "terms_2": [1, 2, 3], "rank_2": list(range(1, 7))},
        sketched(
            lambda p: [SKLinear(64, 96, p["terms_1"], p["rank_1"]), SKLinear(96, 96, p["terms_2"], p["rank_2"])],
            64 * 96 + 96 * 96,
            4,
        ),
        0.1,
        seeds=2,
        about="64-96-96-10, each layer its own",
    ),
    "convolution": Recipe(
        grid(num_terms=6, low_rank=10),
        sketched(convolutional, 16 * 32 * 9, 2),
        0.05,
        seeds=2,
        about="a 3 x 3 convolution",
    ),
    "cut_two": Recipe(
        grid(rank_1=32, rank_2=10), cut((64, 128, 10), 8), 0.1, seeds=4, about="64-128-10, cut after training"
    ),
    "cut_three": Recipe(
        grid(rank_1=16, rank_2=16, rank_3=10), cut((64, 96, 96, 10), 8), 0.1, about="64-96-96-10, cut after training"
    ),
    "cut_four": Recipe(
        grid(rank_1=10, rank_2=10, rank_3=10, rank_4=9),
        cut((64, 64, 64, 64, 10), 8),
        0.1,
        seeds=2,
        about="64-64-64-64-10, cut after training",
    ),
}


def points(axes: Mapping[str, Sequence[int]]) -> Iterator[dict[str, int]]:
    """The points of a grid, the last axis fastest: the order of a table's rows."""
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def table_of(name: str) -> dict[str, object]:
    """Train a task's networks: its table, ready for JSON."""
    recipe, start = RECIPES[name], time.process_time()
    data = digits()
    rows = [[recipe.train(point, data, seed) for seed in range(recipe.seeds)] for point in points(recipe.axes)]
    return {
        "task": name,
        "about": f"{recipe.about}; accuracy - {recipe.price:g} * share of weights kept, on handwritten digits",
        "axes": {axis: [min(values), max(values)] for axis, values in recipe.axes.items()},
        "price": recipe.price,
        "kept": [round(row[0][1], 5) for row in rows],
        "accuracy": [[round(score, 4) for score, _ in row] for row in rows],
        "networks": math.prod(map(len, recipe.axes.values())) * recipe.seeds,
        "seconds": round(time.process_time() - start, 1),
    }


def record(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """Write each task's table, where there is none yet."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name in names or RECIPES:
        path = folder / f"{name}.json"
        if not path.exists():
            path.write_text(json.dumps(table_of(name)) + "\n", encoding="utf-8")
            yield path
