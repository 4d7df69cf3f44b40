"""Recipes: real pretrained models with real data and the figure each is judged by.

A recipe is one file with `build(...) -> Recipe` and one line below. The weights come from packages and are
never part of this repository. Run one from the checkout, `python -m models.minilm`, for its dense figures.
"""

from __future__ import annotations

import importlib
from typing import Any

from models.recipe import Recipe

# Name -> module. Modules and not functions, so that nothing is imported before it is asked for.
RECIPES: dict[str, str] = {
    "minilm": "models.minilm",
    "crepe": "models.crepe",
    "whisper": "models.whisper",
    "efficientnet": "models.efficientnet",
    "craft": "models.craft",
    "crnn": "models.crnn",
}


def build(name: str, **options: Any) -> Recipe:
    """The recipe called `name`; `options` are those of its own `build`.

    Raises: ValueError when there is no such recipe, MissingDataError when a package or data set is not installed.
    """
    if name not in RECIPES:
        raise ValueError(f"no recipe is called {name!r}; there are {', '.join(RECIPES)}")
    recipe: Recipe = importlib.import_module(RECIPES[name]).build(**options)
    return recipe
