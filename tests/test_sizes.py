from __future__ import annotations

import copy
import itertools

import pytest
import torch
from safetensors.torch import save
from torch import nn

from panther.chains import WHOLE
from panther.nn import QUANTISED, SKConv2d, SKLinear
from panther.quantise import to_nearest
from panther.sizes import file_bytes, header_growth, model_params, stored_tensors, tensor_bytes
from panther.spec import Grid


def written(model: nn.Module) -> int:
    return len(save(dict(model.state_dict()), {"format": "pt"}))


def test_file_bytes_is_what_safetensors_writes() -> None:
    model = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 3).to(torch.bfloat16))
    model.register_buffer("héllo", torch.arange(3, dtype=torch.uint8))
    model.register_buffer("scalar", torch.tensor(1.0, dtype=torch.float64))
    assert file_bytes(model) == written(model)


def test_tied_weights_are_counted_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    apart = file_bytes(model)
    model[1].weight = model[0].weight
    assert model_params(model) == 16
    assert list(stored_tensors(model)) == ["0.weight"]
    assert file_bytes(model) < apart - 60


def test_buffers_count_and_those_that_are_not_saved_do_not() -> None:
    model = nn.BatchNorm1d(4)
    assert model_params(model) == 4 * 4 + 1
    model.register_buffer("rebuilt", torch.zeros(100), persistent=False)
    assert model_params(model) == 17


@pytest.mark.parametrize("grid", [Grid(8), Grid(4, 32), Grid(3), Grid(16)])
def test_a_quantised_weight_has_its_numbers_whatever_holds_them(grid: Grid) -> None:
    dense = nn.Linear(45, 7)
    layer = QUANTISED[nn.Linear].from_rounded(dense, WHOLE, [to_nearest(dense.weight.detach(), grid)], dense.bias)
    shared = nn.ModuleList([layer, layer, nn.Linear(3, 2)])
    assert model_params(shared) == 45 * 7 + 7 + 8


@pytest.mark.parametrize("others", range(8))
def test_the_reserve_is_never_less_than_what_sketching_adds_to_the_header(others: int) -> None:
    """Whatever the padding before and after: as many other tensors of growing size as the case says."""
    dense = nn.ModuleDict({"a": nn.Linear(40, 30, bias=False), "ü": nn.Conv2d(8, 6, 3), "z": nn.Linear(9, 1)})
    dense.update({f"b{'o' * i}": nn.BatchNorm1d(10**i % 997) for i in range(others)})
    added = {"a.down": 2, "a.up": 2, "a.bias": 1, "ü.down": 4, "ü.core": 4, "ü.up": 4}
    removed = {"a.weight": (30, 40), "ü.weight": (6, 8, 3, 3)}
    reserve = header_growth(added, removed, largest_size=72, largest_offset=file_bytes(dense))
    for scheme, rank in itertools.product(("output_channel", "input_channel", "spatial", "tucker2"), (1, 2, 4)):
        sketched = copy.deepcopy(dense)
        weights = torch.ones(rank, 40), torch.ones(30, rank)
        sketched["a"] = SKLinear.from_factors(dense["a"], "linear", weights, torch.zeros(30))
        sketched["ü"] = SKConv2d.from_dense(dense["ü"], rank=rank, scheme=scheme)
        grown = header(sketched) - header(dense)
        assert 0 < grown <= reserve < grown + 500


def header(model: nn.Module) -> int:
    return file_bytes(model) - sum(map(tensor_bytes, stored_tensors(model).values()))
