"""Photographs of Debian's tuxpaint-stamps-default with ImageNet's names, and other photographs to calibrate on.

Stamps are cut-outs with an alpha channel; they are laid on white. The photographs with a name are for checks alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.data import debian_path, package_folder

STAMPS = "usr/share/tuxpaint/stamps"
STAMPS_PACKAGE = "tuxpaint-stamps-default"
SAMPLES = "scikit-image==0.26.0"
LICENCE = "photos: GPL-2 (tuxpaint-stamps, Debian) and scikit-image's sample images"

SIZE = 224  # pixels a side that the network sees
INNER = 200  # pixels of a stamp's longer side: a little white around it
SMALLEST = 60  # pixels of a calibration photo's longer side
MEAN, DEVIATION = 127.0, 128.0  # of a colour, as the network was trained

# Photographs whose subject has a class in ImageNet, by what the stamp shows (never by what a network says of it): path
# without .png -> the classes of that name. A name that is wider than a class ("a dog") takes all of its kinds. Drawings
# are left out.
NAMED: dict[str, tuple[int, ...]] = {
    "animals/amphibians/frog": (30, 31, 32),
    "animals/amphibians/frog-1": (30, 31, 32),
    "animals/birds/chicken_profile": (7, 8),
    "animals/birds/crowned_crane": (134,),
    "animals/birds/drake": (97,),
    "animals/birds/duck": (97, 98),
    "animals/birds/gander": (99,),
    "animals/birds/hen": (8,),
    "animals/birds/magpie": (18,),
    "animals/birds/ostrich": (9,),
    "animals/birds/owl": (24,),
    "animals/birds/peacock": (84,),
    "animals/birds/pelican": (144,),
    "animals/birds/penguin": (145,),
    "animals/birds/pink_flamingo": (130,),
    "animals/birds/rainbow-lorikeet": (90,),
    "animals/birds/rooster": (7,),
    "animals/birds/tucan": (96,),
    "animals/birds/vulture": (23,),
    "animals/fish/clownfish": (393,),
    "animals/fish/lionfish": (396,),
    "animals/fish/lobster": (122, 123),
    "animals/insects/Brown_slug": (114,),
    "animals/insects/Woodlouse": (126,),
    "animals/insects/fly": (308,),
    "animals/insects/grasshopper": (311,),
    "animals/insects/mantis": (315,),
    "animals/lizards/iguana": (39,),
    "animals/mammals/apes/chimp": (367,),
    "animals/mammals/apes/gorilla": (366,),
    "animals/mammals/aquatic/orca": (148,),
    "animals/mammals/aquatic/otter": (360,),
    "animals/mammals/aquatic/sea_lion": (150,),
    "animals/mammals/badger": (362,),
    "animals/mammals/bears/bear": (294, 295, 296, 297),
    "animals/mammals/bears/european-bear": (294,),
    "animals/mammals/bovines/bison": (347,),
    "animals/mammals/bovines/bull": (345,),
    "animals/mammals/bovines/ram": (348,),
    "animals/mammals/bovines/sheep": (348,),
    "animals/mammals/camel/camel": (354,),
    "animals/mammals/camel/dromedary": (354,),
    "animals/mammals/cats/lion": (291,),
    "animals/mammals/cats/lion-2": (291,),
    "animals/mammals/cats/tiger": (292,),
    "animals/mammals/cats/tiger_sumatran": (292,),
    "animals/mammals/dogs/dingo": (273,),
    "animals/mammals/dogs/dog": tuple(range(151, 269)),
    "animals/mammals/dogs/fox": (277, 278, 280),
    "animals/mammals/echidna": (102,),
    "animals/mammals/elephant": (101, 385, 386),
    "animals/mammals/equines/horse": (339,),
    "animals/mammals/equines/zebra": (340,),
    "animals/mammals/ferret": (358, 359),
    "animals/mammals/hippopotamus": (344,),
    "animals/mammals/pig": (341,),
    "animals/mammals/pig_golden": (341,),
    "animals/mammals/pig_golden2": (341,),
    "animals/mammals/rabbit_little": (330, 331, 332),
    "animals/mammals/rodents/beaver": (337,),
    "animals/mammals/rodents/marmot": (336,),
    "animals/mammals/rodents/rabbit": (330, 331, 332),
    "animals/mammals/rodents/rabbit-2": (330, 331, 332),
    "animals/mammals/rodents/squirrel": (335,),
    "animals/mammals/wildboar": (342,),
    "animals/marsupials/koala": (105,),
    "animals/marsupials/wombat": (106,),
    "food/fruit/Strawberry2": (949,),
    "food/fruit/apple_granny_smith": (948,),
    "food/fruit/banana": (954,),
    "food/fruit/cherimoya": (956,),
    "food/fruit/lemon": (951,),
    "food/fruit/orange": (950,),
    "food/fruit/pineapple": (953,),
    "food/fruit/pomegranate": (957,),
    "food/fruit/sliced_orange": (950,),
    "food/fruit/strawberry": (949,),
    "food/vegetables/broccoli": (937,),
    "food/vegetables/corn": (987, 998),
    "food/vegetables/mushroom": (947,),
    "food/vegetables/pepper": (945,),
    "food/vegetables/yellowpepper": (945,),
    "hobbies/binoculars": (447,),
    "hobbies/camera_35mm": (759,),
    "hobbies/music/brass/trumpet": (513,),
    "hobbies/music/percussion/drum_tomtom_floor": (541,),
    "hobbies/music/percussion/drumkit": (541,),
    "hobbies/music/string/cello": (486,),
    "hobbies/music/string/guitar2": (546,),
    "hobbies/music/string/guitar_classical": (402,),
    "hobbies/music/string/guitar_electric": (546,),
    "hobbies/music/string/guitar_electric_bass": (546,),
    "hobbies/music/string/violin": (889,),
    "hobbies/music/wind/bassoon": (432,),
    "household/dishes/mug": (504,),
    "household/dishes/pitcher_small": (725,),
    "household/dishes/teapot": (849,),
    "household/garbagecan": (412,),
    "household/toilet": (861,),
    "household/tools/hammer": (587,),
    "household/tools/paintbrush_large": (696,),
    "household/wheelie_bin": (412,),
    "medical/bandage_adhesive": (419,),
    "medical/stethoscope": (823,),
    "medical/syringe": (845,),
    "military/paratrooper": (701,),
    "military/vehicles/f22_raptor": (895,),
    "plants/mushrooms/cep": (997,),
    "plants/mushrooms/cep-1": (997,),
    "plants/mushrooms/cep-2": (997,),
    "sports/basketball": (430,),
    "sports/tennis_ball": (852,),
    "sports/tennis_racket": (752,),
    "town/uk_post_box": (637,),
    "vehicles/auto/truck": (717,),
    "vehicles/cycle/pink_tricycle": (870,),
    "vehicles/emergency/firetruck": (555,),
    "vehicles/flight/balloon360": (417,),
    "vehicles/flight/planes/747": (404,),
    "vehicles/garbagetruck": (569,),
    "vehicles/masstransit/green_korean_bus": (654, 779, 874),
    "vehicles/race/indycar": (751,),
}

# Folders of stamps that are photographs for the most part, and sample images of scikit-image that show real things.
FOLDERS = ("animals", "clothes", "food", "hobbies", "household", "medical", "military", "plants", "sports", "vehicles")
DRAWN = ("cartoon", "symbols")
SAMPLE_IMAGES = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "color.png", "grass.png"),
    *("gravel.png", "motorcycle_left.png", "rocket.jpg"),
)


def named_photos() -> tuple[Tensor, list[tuple[int, ...]]]:
    """The photographs with a name, (photos, 3, 224, 224) as the network takes them, and the classes of each.

    Raises: MissingDataError when the stamps or Pillow are missing.
    """
    folder = debian_path(STAMPS, STAMPS_PACKAGE)
    photos = [_on_white(_open(folder / f"{name}.png")) for name in NAMED]
    return torch.stack([_as_input(photo) for photo in photos]), list(NAMED.values())


def calibration_photos(count: int, seed: int) -> tuple[Tensor, int]:
    """`count` cuts of the photographs without a name, and from how many photographs they are.

    Each is laid on white or on a cut of another such photograph, at a random place, size, brightness and side.
    Shapes: -> (count, 3, 224, 224).
    Raises: MissingDataError when the stamps, scikit-image's wheel or Pillow are missing.
    """
    stamps = [_open(path) for path in unnamed_stamps(debian_path(STAMPS, STAMPS_PACKAGE))]
    stamps = [stamp for stamp in stamps if max(stamp.size) >= SMALLEST]
    folder = package_folder("skimage", SAMPLES) / "data"
    scenes = [_open(folder / name).convert("RGB") for name in SAMPLE_IMAGES]
    random = Random(seed)
    order = [*range(len(stamps) + len(scenes))]
    cuts: list[Tensor] = []
    while len(cuts) < count:
        if len(cuts) % len(order) == 0:  # every photograph once before any is used again
            random.shuffle(order)
        chosen = order[len(cuts) % len(order)]
        is_scene = chosen >= len(stamps)
        cut = _scene(scenes[chosen - len(stamps)], random) if is_scene else _laid(stamps[chosen], scenes, random)
        cuts.append(_as_input(cut, random.uniform(0.75, 1.25)))
    return torch.stack(cuts), len(order)


def unnamed_stamps(folder: Path) -> list[Path]:
    """The files of the photographs without a name, in order; the mirror image of a named one has that name too."""
    found = (path for part in FOLDERS for path in sorted((folder / part).rglob("*.png")))
    return [path for path in found if not _is_named(path.relative_to(folder)) and not set(DRAWN) & set(path.parts)]


def _is_named(path: Path) -> bool:
    return path.with_suffix("").as_posix().removesuffix("_mirror").removesuffix("_flip") in NAMED


def _open(path: Path) -> Any:
    """An image with an alpha channel. Any, since Pillow is imported where it is used."""
    package_folder("PIL", "pillow")
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGBA")


def _resized(image: Any, longer: int) -> Any:
    scale = longer / max(image.size)
    return image.resize(tuple(max(1, round(side * scale)) for side in image.size), 3)  # 3: bicubic


def _canvas(colour: tuple[int, int, int] = (255, 255, 255)) -> Any:
    from PIL import Image

    return Image.new("RGB", (SIZE, SIZE), colour)


def _on_white(stamp: Any) -> Any:
    stamp, canvas = _resized(stamp, INNER), _canvas()
    canvas.paste(stamp, tuple((SIZE - side) // 2 for side in stamp.size), stamp)
    return canvas


def _laid(stamp: Any, scenes: Sequence[Any], random: Random) -> Any:
    """A stamp on white or on a scene; it may reach over the edge by a third."""
    stamp = _mirrored(_resized(stamp, random.randint(120, 260)), random)
    canvas = _canvas() if random.random() < 0.5 else _scene(random.choice(scenes), random)
    place = tuple(
        random.randint(min(0, SIZE - side) - side // 6, max(0, SIZE - side) + side // 6) for side in stamp.size
    )
    canvas.paste(stamp, place, stamp)
    return canvas


def _scene(image: Any, random: Random) -> Any:
    """A square cut of 40 to 100 % of the shorter side."""
    side = round(min(image.size) * random.uniform(0.4, 1.0))
    left, top = (random.randint(0, whole - side) for whole in image.size)
    return _mirrored(image.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), 3), random)


def _mirrored(image: Any, random: Random) -> Any:
    return image.transpose(0) if random.random() < 0.5 else image  # 0: left to right


def _as_input(image: Any, brightness: float = 1.0) -> Tensor:
    colours = np.clip(np.asarray(image, dtype=np.float32) * brightness, 0, 255)
    return torch.from_numpy((colours - MEAN) / DEVIATION).permute(2, 0, 1).contiguous()
