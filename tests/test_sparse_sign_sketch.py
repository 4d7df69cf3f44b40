"""sparse_sign_sketch: the map it applies, the same bits however it is called, its refusals; and its random numbers."""

import itertools
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from panther.ops import OPS, sparse_sign_sketch
from panther.ops._philox import philox
from tests.kernels import COMPILED, needs_kernels

REFERENCE = OPS["sparse_sign_sketch"].reference

# Of Random123, the library of the authors of Philox: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return tuple(int(word, 16) for word in text.split())


def sketched(x, size, *, first_row=0, seed=0, nonzeros=4):
    sketch = torch.zeros(size, x.shape[1], dtype=x.dtype)
    sparse_sign_sketch(x, sketch, first_row=first_row, seed=seed, nonzeros=nonzeros)
    return sketch


@pytest.mark.parametrize("nonzeros", [1, 4, 8])
@pytest.mark.parametrize("rows", [0, 1, 30])
def test_torch_counts_the_additions(rows, nonzeros):
    with FlopCounterMode(display=False) as counter:
        sketched(torch.randn(rows, 7), 13, nonzeros=nonzeros)
    assert counter.get_total_flops() == nonzeros * rows * 7


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_gives_the_known_words(counter, key, result):
    tensors = tuple(torch.tensor([word]) for word in words(counter))
    assert tuple(int(word) for word in philox(tensors, words(key))) == words(result)


@pytest.mark.parametrize("nonzeros", range(1, 9))
@pytest.mark.parametrize("size", [8, 13, 64])
def test_a_row_goes_to_one_row_of_each_part_with_equal_weight(nonzeros, size):
    omega = sketched(torch.eye(200), size, nonzeros=nonzeros)  # (size, 200): a column for each row of x
    starts = [part * size // nonzeros for part in range(nonzeros + 1)]
    for start, end in itertools.pairwise(starts):
        assert torch.equal((omega[start:end] != 0).sum(0), torch.ones(200, dtype=torch.int64))
    assert set(omega[omega != 0].abs().tolist()) == {torch.tensor(1 / math.sqrt(nonzeros)).item()}


def test_signs_and_targets_are_even():
    rows, size, nonzeros = 2000, 40, 4
    omega = sketched(torch.eye(rows), size, seed=3, nonzeros=nonzeros)
    counts, mean = (omega != 0).sum(1), rows * nonzeros / size
    assert bool(((counts - mean).abs() < 5 * math.sqrt(mean)).all())  # five standard deviations of a binomial number
    assert bool((omega.sum(1).abs() * math.sqrt(nonzeros) < 5 * math.sqrt(mean)).all())


@pytest.mark.parametrize("nonzeros", [1, 4, 8])
def test_products_of_the_sketch_are_on_average_those_of_the_rows(nonzeros):
    x, size, seeds = torch.randn(50, 6, dtype=torch.float64), 16, 500
    products = [s.T @ s for s in (sketched(x, size, seed=seed, nonzeros=nonzeros) for seed in range(seeds))]
    norms = x.norm(dim=0)
    # The variance of an entry is at most (|a|^2 |b|^2 + <a, b>^2) / size, and six deviations are never seen.
    bound = 6 * math.sqrt(2 / (size * seeds)) * torch.outer(norms, norms)
    assert bool(((torch.stack(products).mean(0) - x.T @ x).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (7, 5, 3), (129, 65, 33), (300, 24, 40)], ids=str)
@pytest.mark.parametrize("nonzeros", [1, 3, 4, 5, 8])
def test_kernel_and_reference_give_the_same_bits(sizes, nonzeros, dtype):
    rows, n, size = sizes
    x, own = torch.randn(rows, n, dtype=dtype), torch.randn(max(size, nonzeros), n, dtype=dtype)
    known = own.clone()
    sparse_sign_sketch(x, own, first_row=2**33 + 5, seed=-7, nonzeros=nonzeros)
    REFERENCE(known, x, 2**33 + 5, -7, nonzeros)
    assert torch.equal(own, known)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [1, 7, 8, 9, 100])
@pytest.mark.usefixtures("scalar_kernels")
def test_scalar_kernel_gives_the_same_bits(n, dtype):
    x = torch.randn(77, n, dtype=dtype)
    scalar = sketched(x, 20)
    COMPILED.set_instruction_set(COMPILED.build_info()["instruction_sets"][-1])
    assert torch.equal(sketched(x, 20), scalar)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_it_adds_what_its_reference_adds_bit_for_bit(dtype):
    for sketch, *others in OPS["sparse_sign_sketch"].samples(dtype):
        own, known = sketch.clone(), sketch.clone()
        OPS["sparse_sign_sketch"](own, *others)
        REFERENCE(known, *others)
        assert torch.equal(own, known)


@pytest.mark.parametrize("step", [1, 2, 17, 64, 200])
def test_batching_of_the_rows_changes_no_bit(step):
    x = torch.randn(201, 19)
    sketch = torch.zeros(32, 19)
    for first in range(0, len(x), step):
        sparse_sign_sketch(x[first : first + step], sketch, first_row=first, seed=0)
    assert torch.equal(sketch, sketched(x, 32))


def test_number_of_threads_changes_no_bit(threads):
    x = torch.randn(2000, 259)  # large enough to be shared, in ranges of odd length
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(sketched(x, 64))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_every_part_of_seed_and_row_number_matters():
    x = torch.eye(50)
    maps = [sketched(x, 64, seed=seed) for seed in (0, 1, 2**32, -1)]
    maps += [sketched(x, 64, first_row=first) for first in (50, 2**32, 2**62)]
    assert all(not torch.equal(one, other) for i, one in enumerate(maps) for other in maps[:i])


def test_gradients_are_not_recorded():
    x, sketch = torch.randn(5, 3, requires_grad=True), torch.zeros(8, 3)
    sparse_sign_sketch(x, sketch, first_row=0, seed=0)
    assert not sketch.requires_grad


BAD = {
    "widths differ": (
        (torch.ones(8, 4), torch.ones(5, 3), 0, 0, 4),
        "expected the shapes sketch (l, n), x (rows, n); got (8, 4), (5, 3)",
    ),
    "x of three dimensions": ((torch.ones(8, 4), torch.ones(2, 5, 4), 0, 0, 4), "got (8, 4), (2, 5, 4)"),
    "sketch of one dimension": ((torch.ones(4), torch.ones(5, 4), 0, 0, 1), "got (4), (5, 4)"),
    "dtypes differ": (
        (torch.ones(8, 4), torch.ones(5, 4).double(), 0, 0, 4),
        "expected float32 or float64 for both sketch and x; got float32, float64",
    ),
    "half precision": ((torch.ones(8, 4).half(), torch.ones(5, 4).half(), 0, 0, 4), "got float16, float16"),
    "whole numbers": ((torch.ones(8, 4).long(), torch.ones(5, 4).long(), 0, 0, 4), "got int64, int64"),
    "row below zero": ((torch.ones(8, 4), torch.ones(5, 4), -1, 0, 4), "expected first_row of at least 0; got -1"),
    "no nonzeros": (
        (torch.ones(8, 4), torch.ones(5, 4), 0, 0, 0),
        "expected nonzeros of at least 1 and at most 8 and the 8 rows of sketch; got 0",
    ),
    "too many nonzeros": ((torch.ones(20, 4), torch.ones(5, 4), 0, 0, 9), "the 20 rows of sketch; got 9"),
    "more nonzeros than rows": ((torch.ones(3, 4), torch.ones(5, 4), 0, 0, 4), "the 3 rows of sketch; got 4"),
}


@pytest.mark.parametrize(("inputs", "says"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_in_the_same_words_with_and_without_kernel(inputs, says):
    messages = []
    for function in (OPS["sparse_sign_sketch"], REFERENCE):
        with pytest.raises(ValueError, match=r"^sparse_sign_sketch: ") as refusal:
            function(*inputs)
        messages.append(str(refusal.value))
    assert says in messages[0]
    assert messages[0] == messages[1]


def test_inputs_on_two_devices_are_refused_with_their_devices():
    with pytest.raises(ValueError, match="expected one device for sketch, x; got cpu, meta"):
        REFERENCE(torch.ones(8, 4), torch.ones(5, 4, device="meta"), 0, 0, 4)
