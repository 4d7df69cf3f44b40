"""Sentences read aloud by a synthesiser: unlabelled speech for calibration, where recorded prompts are few.

flite (Debian) has its voices in its libraries. Sounds are written at the 8 kHz of the telephone prompts, and kept.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import wave
from itertools import cycle
from pathlib import Path
from random import Random

import numpy as np
from scipy.signal import resample_poly

from models.data import data_roots, debian_path
from models.prompts import FEWEST, MOST, Prompt, spoken_words
from models.text import brown_documents

FLITE, LIBRARY = "usr/bin/flite", "usr/share/doc/libflite1"
VOICES = ("slt", "rms", "awb")  # a woman and two men, one of them Scottish, made of recordings at 16 kHz
RATE = 8_000  # Hz
SECONDS = 60  # for one sentence, at most
LICENCE = "synthesiser: flite 2.2, BSD-like (Carnegie Mellon University); sentences: Brown corpus"


def read_aloud(count: int, seed: int, folder: Path | None = None) -> list[Prompt]:
    """`count` sentences of the Brown corpus of 4 to 25 words, each in one of three voices.

    folder: where the sounds are kept; the data folder unless told.

    Raises: MissingDataError when the corpus or flite is missing; ValueError when there are not that many sentences.
    """
    texts = [text for document in brown_documents() for text in document if FEWEST <= len(spoken_words(text)) <= MOST]
    if count > len(texts):
        raise ValueError(f"{count} sentences were asked for, and there are {len(texts)}")
    debian_path(LIBRARY, "libflite1")
    flite, kept = debian_path(FLITE, "flite"), (folder or data_roots()[0]) / "read_aloud"
    kept.mkdir(parents=True, exist_ok=True)
    return [
        _read(flite, voice, text, kept)
        for voice, text in zip(cycle(VOICES), Random(seed).sample(texts, count), strict=False)
    ]


def _read(flite: Path, voice: str, text: str, folder: Path) -> Prompt:
    name = f"{voice}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    path = folder / f"{name}.wav"
    if not path.exists():
        written = path.with_suffix(f".{os.getpid()}")
        command = [str(flite), "-voice", voice, "-t", text, "-o", str(written)]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=SECONDS, env=_environment(flite))
            _to_telephone(written)
            written.replace(path)
        finally:
            written.unlink(missing_ok=True)
    return Prompt(f"flite/{name}", text, path)


def _environment(flite: Path) -> dict[str, str]:
    """The libraries of a package that was unpacked and not installed are beside its program."""
    libraries = [str(found.parent) for found in flite.parents[2].glob("usr/lib/*/libflite.so.1")]
    known = [path for path in (os.environ.get("LD_LIBRARY_PATH"),) if path]
    return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join([*libraries, *known])}


def _to_telephone(path: Path) -> None:
    """The same sound with a telephone's bandwidth, in place."""
    with wave.open(str(path)) as file:
        rate, sound = file.getframerate(), np.frombuffer(file.readframes(file.getnframes()), "<i2")
    lower = resample_poly(sound.astype(np.float32), RATE, rate).clip(-32768, 32767)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, len(lower), "NONE", ""))
        file.writeframes(lower.astype("<i2").tobytes())
