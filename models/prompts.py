"""Telephone prompts with their transcripts, and the word error rate of a transcription.

The prompts are those of Debian's asterisk-core-sounds-en-wav: one voice, 8 kHz, resampled to the 16 kHz that speech
recognisers take.
"""

from __future__ import annotations

import gzip
import re
import wave
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray
from scipy.signal import resample_poly

from models.data import debian_path

SOUNDS = "usr/share/asterisk/sounds/en_US_f_Allison"
TRANSCRIPTS = "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
LICENCE = "prompts: CC-BY-SA-3.0, Allison Smith / Digium"
FEWEST, MOST = 4, 25  # words of a prompt that is used
RATE = 16_000  # Hz

_LINE = re.compile(r"([\w/-]+):\s+(.+)")
_SPEAKABLE = re.compile(r"[A-Za-z0-9 ,.:;!?'\"-]+")  # no [beep], no <tone>, no symbol read aloud
_SOUND = re.compile(r"<.*>|\(.*silence\)|^\[[^]]*\]$")  # a tone or silence instead of words
_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


@dataclass(frozen=True)
class Prompt:
    name: str
    text: str  # what is said
    path: Path

    def samples(self) -> NDArray[np.float32]:
        """The sound at 16 kHz, between -1 and 1.

        Raises: ValueError when the file is not 16-bit mono.
        """
        with wave.open(str(self.path)) as file:
            if (file.getsampwidth(), file.getnchannels()) != (2, 1):
                raise ValueError(f"{self.path}: expected 16-bit mono, got {file.getparams()}")
            rate, data = file.getframerate(), file.readframes(file.getnframes())
        sound = np.frombuffer(data, "<i2").astype(np.float32) / 32768
        resampled: NDArray[np.float32] = resample_poly(sound, RATE, rate).astype(np.float32)
        return resampled


def read_transcripts(text: str) -> dict[str, str]:
    """Prompt name -> words, from lines of "name: words"; lines that start with ";" are comments."""
    matches = (_LINE.fullmatch(line.strip()) for line in text.splitlines() if not line.startswith(";"))
    return {match[1]: match[2] for match in matches if match}


def spoken_prompts() -> list[Prompt]:
    """All prompts of 4 to 25 plain words that have a sound, no two of the same words, in the order of their names.

    Raises: MissingDataError when the Debian packages are neither installed nor fetched.
    """
    return list(_distinct(p for p in _all_prompts() if _is_plain(p.text)).values())


def other_prompts() -> list[Prompt]:
    """The remaining prompts of any words: single ones, long ones and symbols read aloud, whose transcripts are rough.

    Raises: MissingDataError as spoken_prompts.
    """
    plain = _distinct(p for p in _all_prompts() if _is_plain(p.text))
    rest = _distinct(p for p in _all_prompts() if not _SOUND.search(p.text))
    return [prompt for words, prompt in rest.items() if words and words not in plain]


def _all_prompts() -> Iterator[Prompt]:
    folder = debian_path(SOUNDS, "asterisk-core-sounds-en-wav")
    with gzip.open(debian_path(TRANSCRIPTS, "asterisk-core-sounds-en"), "rt", encoding="utf-8") as file:
        texts = read_transcripts(file.read())
    prompts = (Prompt(name, text, folder / f"{name}.wav") for name, text in sorted(texts.items()))
    return (prompt for prompt in prompts if prompt.path.exists())


def _is_plain(text: str) -> bool:
    return FEWEST <= len(spoken_words(text)) <= MOST and bool(_SPEAKABLE.fullmatch(text))


def _distinct(prompts: Iterable[Prompt]) -> dict[tuple[str, ...], Prompt]:
    """By their words; the first of those that say the same."""
    chosen: dict[tuple[str, ...], Prompt] = {}
    for prompt in prompts:
        chosen.setdefault(tuple(spoken_words(prompt.text)), prompt)
    return chosen


def split_prompts(calibration: int, held_out: int, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Two disjoint random sets of prompts; the held-out ones do not depend on the number for calibration.

    Those for calibration are plain prompts as far as there are any left, then the other ones.
    Raises: ValueError when there are not that many.
    """
    prompts, others = spoken_prompts(), other_prompts()
    known = len(prompts) + len(others)
    if calibration + held_out > known or held_out > len(prompts):
        raise ValueError(
            f"{calibration} + {held_out} prompts were asked for, and there are {known}, of which {len(prompts)} can be "
            "held out"
        )
    Random(seed).shuffle(prompts)
    Random(seed).shuffle(others)
    return [*prompts[held_out:], *others][:calibration], prompts[:held_out]


def spoken_words(text: str) -> list[str]:
    """The words as they are said: lower case, no punctuation, whole numbers up to 99 in words, longer ones by digit."""
    plain = re.sub(r"[^a-z0-9' ]", " ", text.lower().replace("\u2019", "'"))
    words = (word.strip("'") for word in re.sub(r"(\d+)", r" \1 ", plain).split())
    return [said for word in words if word for said in (_number(word) if word.isdigit() else [word])]


def _number(digits: str) -> list[str]:
    value = int(digits)
    if len(digits) > 2 or digits != str(value):
        return [_ONES[int(digit)] for digit in digits]
    if value < 20:
        return [_ONES[value]]
    return [_TENS[value // 10], *([_ONES[value % 10]] if value % 10 else [])]


def word_errors(said: list[str], heard: list[str]) -> int:
    """The fewest words to insert, delete or replace that turn one list into the other."""
    row = list(range(len(heard) + 1))
    for i, word in enumerate(said, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(heard, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return row[-1]


def word_error_rate(said: list[str], heard: list[str]) -> float:
    """Errors over all texts, divided by the words that were said; above 1 when more was made up than said.

    Raises: ValueError when nothing was said or the lists differ in length.
    """
    pairs = [(spoken_words(a), spoken_words(b)) for a, b in zip(said, heard, strict=True)]
    words = sum(len(a) for a, _ in pairs)
    if not words:
        raise ValueError("word_error_rate: no words were said, so there is nothing to divide by")
    return sum(word_errors(a, b) for a, b in pairs) / words
