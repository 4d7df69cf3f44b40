"""A Hugging Face folder (config.json and weights), read with the transformers package and never over the network."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from panther.converters import state_dict
from panther.converters.files import read_json
from panther.converters.weights import ModelSource
from panther.errors import LoadError

TEXT_LENGTH = 16
TEXT_BATCH = 2
IMAGE_SIZE = 224  # where a convolutional network's config does not say

_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_PICKLE = "pytorch_model.bin"


def read(path: Path | str, *, model: ModelSource | None = None, trust_pickle: bool = False) -> nn.Module:
    """The model of the class that the folder's config names, in eval mode.

    Weights are read from safetensors, or from a pytorch_model.bin of tensors alone; no code of the folder is run,
    whatever `trust_pickle` says. `model` is not needed: the config is the architecture.

    Raises: LoadError when transformers is not installed, when the folder brings code of its own, or when weights are
        missing, damaged or of another architecture.
    """
    folder = Path(path)
    if model is not None:
        raise LoadError(
            f"{folder} is a Hugging Face folder, whose config.json says the architecture: leave model= (--model) out, "
            "or give one of its weight files instead of the folder"
        )
    model_class = _model_class(folder)
    options = {"local_files_only": True, "trust_remote_code": False, "output_loading_info": True}
    with _quiet():
        try:
            if any((folder / name).is_file() for name in _SAFETENSORS):
                loaded, info = model_class.from_pretrained(str(folder), use_safetensors=True, **options)
            else:
                tensors = state_dict.read_tensors(_pickle_of(folder))
                config = _config(folder)
                loaded, info = model_class.from_pretrained(None, config=config, state_dict=tensors, **options)
        except LoadError:
            raise
        except Exception as error:  # transformers raises anything from KeyError to ImportError
            raise LoadError(f"transformers cannot read {folder}: {error}") from error
    _check_complete(folder, model_class, info)
    module: nn.Module = loaded
    return module.eval()


def example_inputs_for(source: nn.Module | Path | str) -> dict[str, Tensor] | None:
    """Inputs that a Hugging Face model (or the model of a folder) takes, made from its config; None when unknown.

    Text: input_ids (2, 16) and attention_mask, the second row padded. Vision: pixel_values (2, channels, height,
    width). Whisper: input_features (2, mel bins, frames). Encoder-decoders also get decoder_input_ids (2, 12), shorter
    than what the encoder reads so that the two lengths are told apart. The numbers are random, the same each time.

    Raises: LoadError as `read`, for a folder only.
    """
    if isinstance(source, nn.Module):
        model_class, config = type(source), getattr(source, "config", None)
    else:
        model_class, config = _model_class(Path(source)), _config(Path(source))
    if config is None or hasattr(config, "vision_config"):
        return None
    make = {"input_ids": _text, "pixel_values": _image, "input_features": _audio}.get(
        getattr(model_class, "main_input_name", "")
    )
    takes = inspect.signature(model_class.forward).parameters
    try:
        inputs = make(config, torch.Generator().manual_seed(0)) if make else None
        if inputs is None:
            return None
        if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
            ids = _tokens(config, torch.Generator().manual_seed(1))
            inputs["decoder_input_ids"] = ids[:, : ids.shape[1] - ids.shape[1] // 4]
    except AttributeError:  # of a config that is made of others
        return None
    return {name: value for name, value in inputs.items() if name in takes}


def _text(config: Any, generator: torch.Generator) -> dict[str, Tensor]:
    ids = _tokens(config, generator)
    mask = torch.ones_like(ids)
    mask[1:, -(ids.shape[1] // 4) :] = 0  # so that masks are exercised
    return {"input_ids": ids, "attention_mask": mask}


def _tokens(config: Any, generator: torch.Generator) -> Tensor:
    length = min(TEXT_LENGTH, getattr(config, "max_position_embeddings", None) or TEXT_LENGTH)
    ids = torch.randint(0, config.vocab_size, (TEXT_BATCH, length), generator=generator)
    # Some models take their positions from where the padding token is not.
    pad = getattr(config, "pad_token_id", None)
    return ids if pad is None else torch.where(ids == pad, (pad + 1) % config.vocab_size, ids)


def _image(config: Any, generator: torch.Generator) -> dict[str, Tensor] | None:
    size = getattr(config, "image_size", IMAGE_SIZE)
    if isinstance(size, dict):
        size = (size.get("height"), size.get("width"))
    height, width = (size, size) if isinstance(size, int) else size
    if not isinstance(height, int) or not isinstance(width, int):
        return None
    shape = (TEXT_BATCH, getattr(config, "num_channels", 3), height, width)
    return {"pixel_values": torch.randn(shape, generator=generator)}


def _audio(config: Any, generator: torch.Generator) -> dict[str, Tensor] | None:
    if not hasattr(config, "num_mel_bins") or not hasattr(config, "max_source_positions"):
        return None
    # Whisper's second convolution halves the frames into positions.
    shape = (TEXT_BATCH, config.num_mel_bins, 2 * config.max_source_positions)
    return {"input_features": torch.randn(shape, generator=generator)}


def _model_class(folder: Path) -> Any:
    """The class of transformers that config.json names; never one that the folder brings along."""
    config = read_json(folder / "config.json")
    if "auto_map" in config:
        raise LoadError(
            f"{folder}/config.json has an auto_map: the model needs Python code from its folder, which panther does "
            "not run. Build the model yourself and pass it to panther.compress(model, ...)."
        )
    transformers = _transformers()
    names = config.get("architectures") or ["AutoModel"]
    name = names[0] if isinstance(names, list) and isinstance(names[0], str) else ""
    found = getattr(transformers, name, None) if name.isidentifier() else None
    bases = (transformers.PreTrainedModel, transformers.AutoModel)
    if not isinstance(found, type) or not issubclass(found, bases):
        raise LoadError(
            f"{folder}/config.json asks for the architecture {str(names)[:80]}, which is no model of transformers "
            f"{transformers.__version__}. Upgrade transformers, or build the model yourself and pass it to "
            "panther.compress(model, ...)."
        )
    return found


def _config(folder: Path) -> Any:
    transformers = _transformers()
    try:
        return transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # as in `read`
        raise LoadError(f"transformers cannot read {folder}/config.json: {error}") from error


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise LoadError(
            "a Hugging Face folder needs the transformers package: pip install 'panther-compress[huggingface]'"
        ) from error


def _pickle_of(folder: Path) -> Path:
    if (folder / _PICKLE).is_file():
        return folder / _PICKLE
    raise LoadError(
        f"{folder} has no weights that panther reads: expected {_SAFETENSORS[0]} (or its shards with "
        f"{_SAFETENSORS[1]}) or {_PICKLE}. Convert others with model.save_pretrained(folder)."
    )


def _check_complete(folder: Path, model_class: Any, info: dict[str, Any]) -> None:
    """Raise LoadError when transformers filled a weight with random numbers, which it only logs."""
    bad = sorted(map(str, info.get("missing_keys") or ())) + sorted(map(str, info.get("mismatched_keys") or ()))
    if bad:
        raise LoadError(
            f"{folder} lacks {len(bad)} weights of {model_class.__name__} ({', '.join(bad[:5])}), which would be "
            "random. Build the model that the weights belong to yourself and pass it to panther.compress(model, ...)."
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bar and its table of keys, which `_check_complete` reads."""
    logging = _transformers().utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
