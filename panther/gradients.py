"""How the model's output reacts to errors of each layer's output, from backward passes without labels.

For outputs y of a layer and o of the model, G = E[J^T J] with J = do/dy. A random projection of o is differentiated,
whose squared gradient has G as its mean, so that one backward pass serves all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from panther.answers import answers_of
from panther.batches import Call, device_of, run, scale_of
from panther.factors import dense_weight
from panther.products import add_gram, mirrored, product
from panther.spec import LayerSpec

CHUNK = 8  # samples a backward pass, at most: its activations are held, unlike those of a forward pass
HELD_BYTES = 200_000_000  # of activations, as far as the layers' outputs tell
MOST_HELD_BYTES = 4_000_000_000  # of a single sample; above it the gradients are not worth the risk
HELD_PER_OUTPUT = 4  # activations held for each output of a dense layer: norms, attention, residuals, nonlinearities
POSITIONS = 64  # of a convolution's output that are looked at in each sample


@dataclass
class _Sum:
    """Sum of g g^T over rows, or of (W^T g)(W^T g)^T where the layer has fewer inputs than outputs."""

    spec: LayerSpec
    weight: Tensor
    generator: torch.Generator  # its own, so that which layers are watched together changes nothing
    products: Tensor | None = None  # on and below the diagonal
    energy: float = 0.0  # sum of |g|^2

    def add(self, gradient: Tensor) -> None:
        with torch.autocast(gradient.device.type, enabled=False):
            self._add(self._rows(gradient.float()))

    def _add(self, rows: Tensor) -> None:
        self.energy += float(rows.square().sum())
        if self.spec.kind == "linear" and self.spec.out_features > self.spec.in_features:
            rows = product(rows, self.weight.float())
        if self.products is None:
            self.products = rows.new_zeros(rows.shape[1], rows.shape[1])
        add_gram(self.products, rows)

    def _rows(self, gradient: Tensor) -> Tensor:
        if self.spec.kind == "linear":
            return gradient.reshape(-1, gradient.shape[-1])
        flat = gradient.unsqueeze(0) if gradient.dim() == len(self.spec.kernel_size) + 1 else gradient
        flat = flat.flatten(2)
        if flat.shape[2] > POSITIONS:
            chosen = torch.randperm(flat.shape[2], generator=self.generator)[:POSITIONS]
            flat = flat[:, :, chosen.to(flat.device)]
        return flat.transpose(1, 2).reshape(-1, flat.shape[1])

    def scaled(self) -> Tensor | None:
        """The mean, scaled so that G has a mean diagonal of one; None when the output does not react at all."""
        if self.products is None or self.energy <= 0 or not bool(torch.isfinite(self.products).all()):
            return None
        return mirrored(self.products.double().cpu()).mul_(self.spec.out_features / self.energy)


class Reactions:
    """Runs calls forward and backward, and sums up the gradients at every layer while it is entered."""

    def __init__(self, model: nn.Module, specs: Sequence[LayerSpec], seed: int, chunk: int = CHUNK) -> None:
        self.model = model
        self.chunk = chunk
        self.generator = torch.Generator().manual_seed(seed)
        self.sums = {
            spec.name: _Sum(spec, dense_weight(model.get_submodule(spec.name)), torch.Generator().manual_seed(seed))
            for spec in specs
        }
        self._zero = torch.zeros((), dtype=torch.float32, requires_grad=True, device=device_of(model))
        self._tensors = {name: t.detach() for name, t in (*model.named_parameters(), *model.named_buffers())}
        self._is_recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for name, total in self.sums.items():
            self._hooks.append(self.model.get_submodule(name).register_forward_hook(self._hook(total), prepend=True))
        return self

    def __exit__(self, *exc: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, total: _Sum) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        def watch(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            if not output.requires_grad:  # the first layers: nothing before them is differentiated
                output = output + self._zero.to(output.dtype)
            elif output._is_view():  # what changes one in place takes it out of the graph, with its hooks
                output = output.clone()
            output.register_hook(total.add)
            return output

        return watch

    def run(self, call: Call) -> None:
        """One call forward and backward.

        Raises: whatever a model raises that cannot be differentiated.
        """
        # cuDNN's recurrent layers refuse a backward pass in evaluation mode; torch's own do not.
        with torch.enable_grad(), torch.backends.cudnn.flags(enabled=not self._is_recurrent):
            # The backward as well: a checkpoint runs parts of the model again there.
            functional_call(_Both(self), {f"model.{name}": t for name, t in self._tensors.items()}, (call,))

    def both_ways(self, call: Call) -> None:
        """The call forward and backward, with the parameters that the model has just now."""
        outputs = answers_of(run(self.model, call))
        _project(outputs, call.to(device_of(self.model)), self.generator).backward()

    def chunks(self, call: Call) -> Iterator[Call]:
        """The call, as many samples at a time as memory allows."""
        for start in range(0, call.batch_size, self.chunk):
            yield call.rows(start, min(start + self.chunk, call.batch_size))

    def found(self) -> dict[str, Tensor]:
        """The sensitivity of every layer that the output reacts to; see panther.sketches.Seen for its form."""
        scaled = {name: total.scaled() for name, total in self.sums.items()}
        return {name: matrix for name, matrix in scaled.items() if matrix is not None}


class _Both(nn.Module):
    """A run forward and backward as a module, in which parameters can be replaced for as long as it takes."""

    def __init__(self, of: Reactions) -> None:
        super().__init__()
        self.of, self.model = of, of.model

    def forward(self, call: Call) -> None:
        self.of.both_ways(call)


def chunk_size(layers: Sequence[LayerSpec], samples: int) -> int:
    """Samples whose activations fit into HELD_BYTES, from the outputs of all layers for this many samples.

    0 when a single one would hold more than MOST_HELD_BYTES.
    """
    held = sum(HELD_PER_OUTPUT * 4 * spec.rows * spec.out_features for spec in layers) // max(1, samples)
    return 0 if held > MOST_HELD_BYTES else max(1, min(CHUNK, HELD_BYTES // max(1, held)))


def _project(outputs: Sequence[Tensor], call: Call, generator: torch.Generator) -> Tensor:
    """A random projection of all outputs, each scaled to unit variance, padded and masked values left out.

    Raises: ValueError when no output is a floating-point tensor that depends on the layers.
    """
    floats = [output for output in outputs if output.requires_grad]
    if not floats:
        raise ValueError("the model returns no floating-point output that depends on its layers")
    total = torch.zeros((), dtype=torch.float32, device=floats[0].device)
    for output in floats:
        noise = torch.randn(output.shape, generator=generator, dtype=torch.float32).to(output.device)
        for shape, mask in call.masks().items():
            if tuple(output.shape[: len(shape)]) == shape:
                noise = noise * mask.reshape(*shape, *(1,) * (output.dim() - len(shape)))
        values = torch.where(torch.isfinite(output.detach()), output.float(), 0.0)
        total = total + (values * noise).sum() / scale_of(output.detach().float())
    return total
