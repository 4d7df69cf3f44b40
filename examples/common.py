"""What the examples share: handwritten digits, training and the accuracy, so that each shows the tuner only."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

Part = tuple[Tensor, Tensor]  # images (n, 784), labels (n,)


@dataclass(frozen=True)
class Data:
    """`valid` is what the tuner looks at; `test` is looked at once, for the parameters that won."""

    train: Part
    valid: Part
    test: Part


@cache
def digits(quick: bool = False) -> Data:
    """The 1,797 digits that come with scikit-learn, 8 x 8 pixels enlarged to MNIST's 28 x 28: 1,100 to train on."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 16
    large = interpolate(small, size=(28, 28), mode="bilinear").flatten(1)
    return split(large.numpy(), labels, train=400 if quick else 1100, valid=300)


def split(images: NDArray[np.float32], labels: NDArray[np.int64], train: int, valid: int) -> Data:
    """The same parts each time, standardised by the training part; what neither part takes is for the test."""
    order = np.random.default_rng(0).permutation(len(images))
    x, y = torch.from_numpy(images[order]).flatten(1), torch.from_numpy(labels[order]).long()
    x = (x - x[:train].mean()) / x[:train].std()
    ends = [train, train + valid]
    pixels, classes = x.tensor_split(ends), y.tensor_split(ends)
    return Data(*zip(pixels, classes, strict=True))


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def batches(part: Part, size: int, generator: torch.Generator | None = None) -> Iterator[Part]:
    x, y = part
    order = torch.randperm(len(x), generator=generator) if generator else torch.arange(len(x))
    for rows in order.split(size):
        yield x[rows].to(device()), y[rows].to(device())


def train_epoch(model: nn.Module, part: Part, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    """Once through the images, in an order that the seed decides."""
    model.train()
    for x, y in batches(part, 64, torch.Generator().manual_seed(seed)):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()


def train(model: nn.Module, part: Part, epochs: int) -> nn.Module:
    model.to(device())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for epoch in range(epochs):
        train_epoch(model, part, optimizer, seed=epoch)
    return model


@torch.no_grad()
def accuracy(model: nn.Module, part: Part) -> float:
    """The share of images that the model gets right."""
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches(part, 256))
    return right / len(part[1])


def pays(num_terms: int, low_rank: int, in_features: int = 784, out_features: int = 512) -> bool:
    """Whether a sketched linear layer holds fewer weights than the dense one: most of the usual boxes do not."""
    return 2 * num_terms * low_rank * (in_features + out_features) < in_features * out_features


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="few evaluations on few images, to see that it runs")
    return made
