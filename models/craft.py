"""CRAFT, which finds words in pictures: VGG-16 with skips, 20.8 M parameters, all of them in convolutions.

`python -m models.craft` prints the dense figures on drawn pages.
Source: Baek et al., "Character region awareness for text detection" (2019).
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections import OrderedDict
from random import Random

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional

from models.data import MissingDataError
from models.drawn import LICENCE, Box, Page, answers, draw_page, overlap, put_weights, sentences
from models.recipe import Recipe, show

FILE = "craft_mlt_25k.pth"
WORDS = 7  # a page, as far as they find room
PIXEL, CORE = 0.4, 0.7  # a found word: neighbouring places over the one, with one over the other
FEWEST_PLACES = 6
OVERLAP = 0.4  # of a drawn word and its box: intersection over union


def _layers(*sizes: int, kernel: int = 3, first: int = 0, pools: tuple[int, ...] = ()) -> dict[str, nn.Module]:
    """VGG's convolutions with BatchNorm and ReLU, numbered through; max pooling stands before the ones in `pools`."""
    found: list[nn.Module] = []
    for place, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        if place in pools:
            found.append(nn.MaxPool2d(2))
        found += [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.BatchNorm2d(outputs), nn.ReLU()]
    return {str(first + place): layer for place, layer in enumerate(found)}


class _Vgg(nn.Module):
    """VGG-16's convolutions, cut where their results are used as well."""

    def __init__(self) -> None:
        super().__init__()
        last = _layers(512, 512, 512, 512, first=30, pools=(1,))
        del last["39"]  # its ReLU
        self.slice1 = nn.Sequential(OrderedDict(_layers(3, 64, 64, 128, 128, pools=(2,))))
        self.slice2 = nn.Sequential(OrderedDict(_layers(128, 256, 256, first=13, pools=(0,))))
        self.slice3 = nn.Sequential(OrderedDict(_layers(256, 256, 512, 512, first=20, pools=(1,))))
        self.slice4 = nn.Sequential(OrderedDict(last))
        self.slice5 = nn.Sequential(
            nn.MaxPool2d(3, 1, 1), nn.Conv2d(512, 1024, 3, padding=6, dilation=6), nn.Conv2d(1024, 1024, 1)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for part in (self.slice1, self.slice2, self.slice3, self.slice4, self.slice5):
            x = part(x)
            found.append(x)
        return found


class _Up(nn.Module):
    def __init__(self, inputs: int, middle: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(OrderedDict(_layers(inputs, middle, kernel=1) | _layers(middle, outputs, first=3)))

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.conv(x)
        return answer


class Craft(nn.Module):
    """Pictures (N, 3, H, W), H and W multiples of 16 -> scores (N, H/2, W/2, 2): of characters, and of the gaps between
    those of one word."""

    def __init__(self) -> None:
        super().__init__()
        self.basenet = _Vgg()
        self.upconv1, self.upconv2 = _Up(1536, 512, 256), _Up(768, 256, 128)
        self.upconv3, self.upconv4 = _Up(384, 128, 64), _Up(192, 64, 32)
        sizes = [(32, 32, 3), (32, 32, 3), (32, 16, 3), (16, 16, 1), (16, 2, 1)]
        heads = [layer for i, o, k in sizes for layer in (nn.Conv2d(i, o, k, padding=k // 2), nn.ReLU())]
        self.conv_cls = nn.Sequential(*heads[:-1])

    def forward(self, x: Tensor) -> Tensor:
        *skipped, skip, x = self.basenet(x)
        x = self.upconv1(torch.cat([x, skip], 1))
        for skip, up in zip(reversed(skipped), (self.upconv2, self.upconv3, self.upconv4), strict=True):
            x = functional.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False)
            x = up(torch.cat([x, skip], 1))
        scores: Tensor = self.conv_cls(x)
        return scores.permute(0, 2, 3, 1)


def load() -> nn.Module:
    """The network in eval mode. Raises: MissingDataError when the weights' package is not installed."""
    return put_weights(Craft(), FILE)


def found_words(scores: Tensor) -> list[Box]:
    """The boxes that a page's scores (H/2, W/2, 2) make, in pixels of the page."""
    characters, gaps = scores[..., 0].numpy(), scores[..., 1].numpy()
    regions, count = ndimage.label((characters > PIXEL) | (gaps > PIXEL), structure=np.ones((3, 3)))
    boxes = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(regions, count), 1):
        inside = regions[rows, columns] == number
        if inside.sum() >= FEWEST_PLACES and characters[rows, columns][inside].max() >= CORE:
            boxes.append((2 * columns.start, 2 * rows.start, 2 * columns.stop, 2 * rows.stop))
    return boxes


def word_figures(scores: Tensor, pages: list[Page]) -> dict[str, float]:
    """recall: of the drawn words, found; precision: of the boxes, those of a word."""
    hits = drawn = boxes = 0
    for page, of in zip(pages, scores, strict=True):
        found = found_words(of)
        drawn, boxes = drawn + len(page.boxes), boxes + len(found)
        for word in page.boxes:  # a box stands for one word only
            best = max(found, key=functools.partial(overlap, word), default=None)
            if best is not None and overlap(word, best) >= OVERLAP:
                found.remove(best)
                hits += 1
    return {"recall": hits / max(1, drawn), "precision": hits / max(1, boxes)}


def build(calibration: int = 64, held_out: int = 40, *, batch_size: int = 4, seed: int = 0) -> Recipe:
    """CRAFT with `calibration` drawn pages of about six words, and others to be checked on.

    Figures: recall and precision of words, by boxes.
    Raises: ValueError when no page is asked for; MissingDataError when the weights, the corpus or Pillow are missing.
    """
    sides = []
    for side, texts in enumerate(sentences(calibration, held_out, seed)):
        random = Random(2 * seed + side)
        words = [[word for word in (w.strip(",.;:?!\"'()") for w in s.split()) if word.strip("-")] for s in texts]
        sides.append([draw_page(of[:WORDS], random) for of in words])
    fitting, checked = (torch.stack([page.picture for page in pages]) for pages in sides)

    def metrics(candidate: nn.Module) -> dict[str, float]:
        return word_figures(answers(candidate, checked, batch_size), sides[1])

    drawn = sum(len(page.boxes) for page in sides[1])
    notes = f"{drawn} drawn words on {held_out} held-out pages; seed {seed}"
    batches = list(fitting.split(batch_size))
    return Recipe("CRAFT", load(), fitting[:1], batches, list(checked.split(batch_size)), metrics, LICENCE, notes)


def main() -> int:
    try:
        show(build(calibration=4))
    except MissingDataError as error:
        print(f"craft: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
