"""CRNN, which reads lines of text: a small VGG, two bidirectional LSTMs and a classifier, 3.8 M parameters.

Of these 1.4 M are in convolutions, 2.1 M in the LSTMs. `python -m models.crnn` prints the dense figures on drawn lines.
Source: Shi, Bai, Yao, "An end-to-end trainable neural network for image-based sequence recognition" (2017).
"""

from __future__ import annotations

import sys
from random import Random

import torch
from torch import Tensor, nn

from models.data import MissingDataError
from models.drawn import LICENCE, answers, draw_line, put_weights, sentences
from models.prompts import word_errors
from models.recipe import Recipe, show

FILE = "english_g2.pth"
# Output 0 is CTC's blank.
ALPHABET = "0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ €ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
LONGEST = 28  # characters of a line


class _Recurrent(nn.Module):
    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(inputs, hidden, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(2 * hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.linear(self.rnn(x)[0])
        return answer


class _Features(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for place, (inputs, outputs) in enumerate([(1, 32), (32, 64), (64, 128), (128, 128), (128, 256), (256, 256)]):
            has_norm = place > 3
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=not has_norm)]
            layers += [nn.BatchNorm2d(outputs)] * has_norm + [nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if place < 2 else [nn.MaxPool2d((2, 1))] if place in (3, 5) else []
        self.ConvNet = nn.Sequential(*layers, nn.Conv2d(256, 256, 2), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.ConvNet(x)
        return answer


class Crnn(nn.Module):
    """Lines of text (N, 1, 64, W) between -1 and 1 -> scores (N, W/4 - 1, 97) of the characters, for CTC."""

    def __init__(self) -> None:
        super().__init__()
        self.FeatureExtraction = _Features()
        self.SequenceModeling = nn.Sequential(_Recurrent(256, 256, 256), _Recurrent(256, 256, 256))
        self.Prediction = nn.Linear(256, 1 + len(ALPHABET))

    def forward(self, x: Tensor) -> Tensor:
        columns = self.FeatureExtraction(x).mean(2).transpose(1, 2)
        answer: Tensor = self.Prediction(self.SequenceModeling(columns))
        return answer


def load() -> nn.Module:
    """The network in eval mode. Raises: MissingDataError when the weights' package is not installed."""
    return put_weights(Crnn(), FILE)


def read(scores: Tensor) -> str:
    """The text of a line's scores (columns, 97): the best of each column, repetitions once, blanks left out."""
    best = torch.unique_consecutive(scores.argmax(1)).tolist()
    return "".join(ALPHABET[place - 1] for place in best if place)


def build(calibration: int = 256, held_out: int = 128, *, batch_size: int = 16, seed: int = 0) -> Recipe:
    """CRNN with `calibration` drawn lines of text, and others to be checked on.

    Figures: character_error, edits as a share of the characters.
    Raises: ValueError when no line is asked for; MissingDataError when the weights, the corpus or Pillow are missing.
    """
    sides = sentences(calibration, held_out, seed)
    lines = [[s[:LONGEST].rpartition(" ")[0] or s[:LONGEST] for s in side] for side in sides]
    fitting, checked = (
        torch.stack([draw_line(line, random) for line in side])
        for side, random in zip(lines, (Random(2 * seed), Random(2 * seed + 1)), strict=True)
    )

    def metrics(candidate: nn.Module) -> dict[str, float]:
        given = [read(scores) for scores in answers(candidate, checked, batch_size)]
        wrong = sum(word_errors(list(line), list(text)) for text, line in zip(given, lines[1], strict=True))
        return {"character_error": wrong / sum(map(len, lines[1]))}

    notes = f"{held_out} held-out lines of up to {LONGEST} characters; seed {seed}"
    batches, held = list(fitting.split(batch_size)), list(checked.split(batch_size))
    return Recipe("CRNN", load(), fitting[:4], batches, held, metrics, LICENCE, notes)


def main() -> int:
    try:
        show(build(calibration=4))
    except MissingDataError as error:
        print(f"crnn: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
