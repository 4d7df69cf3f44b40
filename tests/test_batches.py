"""What counts as a batch, what is kept aside, and which rows a mask leaves out."""

from collections import OrderedDict, UserDict
from dataclasses import make_dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset

from panther import batches
from panther.batches import (
    CHUNK,
    Call,
    as_call,
    batch_call,
    calibration,
    device_of,
    float_outputs,
    inference,
    masked_rows,
    run,
    unchanged,
)
from panther.errors import CalibrationError


class Tokens(nn.Module):
    """Takes what a Hugging Face model takes."""

    def forward(self, input_ids, attention_mask=None, labels=None):
        return input_ids


class Anything(nn.Module):
    def forward(self, **inputs):
        return inputs


class Pair(NamedTuple):
    first: Any
    second: Any


X, Y, TARGET = torch.randn(4, 3), torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
ONE, TWO = Call((torch.zeros(1, 3),)), Call((torch.zeros(1, 3), torch.zeros(1, 5)))
IDS = torch.arange(8).reshape(2, 4)
BY_NAME = Call((), {"input_ids": IDS})
MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])
PACKED = pack_padded_sequence(torch.randn(4, 2, 3), torch.tensor([4, 2]))


# --- one batch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "example", "args"),
    [
        (X, ONE, (X,)),
        ((X,), ONE, (X,)),
        ([X], ONE, (X,)),
        ((X, TARGET), ONE, (X,)),
        ([X, TARGET], ONE, (X,)),
        ((X, TARGET, Y), ONE, (X,)),
        ((X, Y), TWO, (X, Y)),
        ([X, Y, TARGET], TWO, (X, Y)),
        (((X, Y), TARGET), TWO, (X, Y)),
        ([[X, Y], TARGET], TWO, (X, Y)),
        (((X, Y),), TWO, (X, Y)),
        (((X,), TARGET), ONE, (X,)),
        (([X, Y], TARGET), Call(([X, Y],)), ([X, Y],)),
        (([X, Y],), Call(((X, Y),)), ([X, Y],)),
        ({"image": X}, Call(({"image": X},)), ({"image": X},)),
        (({"image": X}, TARGET), Call(({"image": X},)), ({"image": X},)),
        (Call((Y,)), ONE, (Y,)),
        (X, Call((Y, True)), (X, True)),
        ((X, TARGET), Call((Y, True)), (X, True)),
        ((X, False), Call((Y, True)), (X, False)),
        ((X, Y, TARGET), Call((Y, None, X, 2)), (X, None, Y, 2)),
        (X, TWO, (X,)),
        ("b", Call(("a",)), ("b",)),
    ],
)
def test_a_batch_becomes_the_positional_arguments_without_its_target(batch, example, args):
    call = batch_call(batch, example, nn.Identity())
    assert call.kwargs == {}
    assert len(call.args) == len(args)
    assert all(got is wanted or got == wanted for got, wanted in zip(call.args, args, strict=True))


@pytest.mark.parametrize("kind", [dict, OrderedDict, UserDict])
def test_a_mapping_becomes_keyword_arguments_without_labels_and_strangers(kind):
    batch = kind({"input_ids": IDS, "attention_mask": IDS > 0, "labels": TARGET, "index": 7})
    for given in (batch, (batch, TARGET), [batch]):
        call = batch_call(given, BY_NAME, Tokens())
        assert call.args == ()
        assert set(call.kwargs) == {"input_ids", "attention_mask"}


def test_labels_stay_where_the_example_has_them():
    example = Call((), {"input_ids": IDS, "labels": TARGET})
    assert set(batch_call({"input_ids": IDS, "labels": TARGET}, example, Tokens()).kwargs) == {"input_ids", "labels"}


def test_a_forward_that_takes_any_keyword_gets_all_but_targets():
    call = batch_call({"pixels": X, "target": TARGET, "labels": TARGET}, Call((), {"pixels": X}), Anything())
    assert set(call.kwargs) == {"pixels"}


@pytest.mark.parametrize(
    ("batch", "wanted"),
    [
        ((IDS, MASK), {"input_ids": IDS, "attention_mask": MASK}),
        ([IDS, MASK, TARGET], {"input_ids": IDS, "attention_mask": MASK}),
        (((IDS, MASK), TARGET), {"input_ids": IDS, "attention_mask": MASK}),
        (IDS, {"input_ids": IDS}),
        ([IDS], {"input_ids": IDS}),
    ],
)
def test_the_parts_of_a_tuple_go_under_the_names_of_a_dict_example(batch, wanted):
    example = Call((), {"input_ids": IDS[:1], "attention_mask": MASK[:1], "use_cache": False})
    call = batch_call(batch, example, Tokens())
    assert call.args == () and list(call.kwargs) == [*wanted, "use_cache"]
    assert all(call.kwargs[name] is value for name, value in wanted.items())


def test_one_name_takes_the_first_part():
    call = batch_call((X, TARGET), BY_NAME, Tokens())
    assert call.args == () and set(call.kwargs) == {"input_ids"} and call.kwargs["input_ids"] is X


@pytest.mark.parametrize("second", [TARGET, X[:, :, None], torch.randn(4, 3)])
def test_parts_that_do_not_look_like_the_inputs_of_a_dict_example_are_refused(second):
    example = Call((), {"input_ids": IDS, "attention_mask": MASK})
    message = (
        r"has the parts \(2, 4\) int64, .*, the example inputs input_ids \(2, 4\) int64, attention_mask \(2, 3\) int64"
    )
    with pytest.raises(CalibrationError, match=message):
        batch_call((IDS, second), example, Tokens())


class Own:
    """A class that is neither a tensor nor a sequence: a graph, say."""


@pytest.mark.parametrize("value", [PACKED, Own(), Pair(X, Y)], ids=["packed", "own", "named"])
@pytest.mark.parametrize("by_name", [True, False])
def test_a_value_of_the_class_of_the_examples_argument_is_one_argument(value, by_name):
    example = Call((), {"input_ids": value}) if by_name else Call((value,))
    for batch in (value, (value,), [value, TARGET]):
        call = batch_call(batch, example, Tokens())
        assert [id(v) for v in (*call.args, *call.kwargs.values())] == [id(value)]
        assert bool(call.kwargs) is by_name
    assert as_call(PACKED).args == (PACKED,)


@pytest.mark.parametrize(
    ("batch", "example", "message"),
    [
        ((IDS, MASK), Call((), dict.fromkeys("abc", IDS)), r"has 2 parts, the example inputs 3"),
        ({"pixels": X}, BY_NAME, r"has the keys \['pixels'\], and Tokens.forward takes none of them"),
        ({}, BY_NAME, r"has the keys \[\]"),
        ((X,), TWO, r"has 1 parts, the example inputs 2: yield the same arguments"),
        ("text", ONE, "is str: expected a tensor, a tuple"),
        (3.5, ONE, "is float"),
        ((), ONE, "is tuple"),
        ([], ONE, "is list"),
        (X.numpy(), ONE, "is ndarray"),
    ],
)
def test_a_batch_of_no_known_kind_is_refused_with_what_is_expected(batch, example, message):
    with pytest.raises(CalibrationError, match=message):
        batch_call(batch, example, Tokens())


@pytest.mark.parametrize(
    ("example", "args", "names"),
    [(X, 1, set()), ((X, Y), 2, set()), ([X, Y], 2, set()), ({"x": X}, 0, {"x"}), (UserDict({"x": X}), 0, {"x"})],
)
def test_example_inputs_are_read_as_torch_export_reads_them(example, args, names):
    call = as_call(example)
    assert (len(call.args), set(call.kwargs)) == (args, names)
    assert as_call(call) is call


def test_other_example_inputs_are_refused():
    with pytest.raises(TypeError, match="example_inputs is str: expected a tensor, a tuple of arguments or a dict"):
        as_call("cat.png")


# --- the calls -------------------------------------------------------------------------------------------------------


def test_rows_cut_all_tensors_and_nothing_else():
    call = Call((X, 2.5), {"other": Y, "scalar": torch.tensor(1.0)})
    part = call.rows(1, 3)
    assert call.batch_size == 4 and part.batch_size == 2
    assert torch.equal(part.args[0], X[1:3]) and part.args[1] == 2.5
    assert torch.equal(part.kwargs["other"], Y[1:3])
    assert part.kwargs["scalar"].dim() == 0
    assert len(part.tensors()) == 3


@pytest.mark.parametrize("other", [torch.zeros(2, 200), [torch.zeros(4, 1)], {"x": torch.zeros(4)}])
def test_a_call_whose_first_dimensions_differ_or_whose_arguments_are_nested_is_not_cut(other):
    """Edges of a graph, a mask of (length, length): nothing tells which dimension is the batch."""
    call = Call((X, other))
    assert not call.can_be_cut and call.batch_size == 1
    assert call.rows(1, 3) is call


def test_an_endless_stream_is_taken_up_to_a_limit_and_that_is_said():
    def endless():
        while True:
            yield torch.randn(64, 3)

    data = calibration(endless(), as_call(X), nn.Linear(3, 2))
    taken = sum(call.batch_size for call in (*data, *data.held_out))
    assert taken == batches.STORED_SAMPLES
    assert data.note is not None and "first 2,048 samples" in data.note
    assert sum(call.batch_size for call in data.held_out) <= batches.HELD_OUT_SAMPLES


def test_a_stream_of_large_batches_is_taken_up_to_a_limit_of_bytes(monkeypatch):
    monkeypatch.setattr(batches, "STORED_BYTES", 5 * X.numel() * X.element_size())

    def graphs():
        while True:
            yield [X, [Y]]  # which cannot be cut, and counts as one sample

    data = calibration(graphs(), Call((X, [Y])), nn.Identity())
    assert len(data) + len(data.held_out) < 10 and "cannot be walked twice" in data.note


def test_values_that_are_not_finite_and_outputs_that_hardly_differ_do_not_set_the_scale():
    logits = torch.tensor([[1.0, -torch.inf], [3.0, -torch.inf]])
    assert batches.scale_of(logits) == pytest.approx(1.0)
    assert batches.scale_of(5.0 + 1e-7 * torch.randn(8, 4)) == pytest.approx(5e-3, rel=1e-3)


def test_a_call_without_tensors_is_one_sample():
    assert Call((3,)).batch_size == 1


def test_moving_keeps_the_structure_of_the_arguments():
    packed = pack_padded_sequence(torch.randn(4, 2, 3), torch.tensor([4, 2]))
    nested = {"list": [X, (Y, "text")], "named": Pair(X, None), "packed": packed}
    moved = Call((nested,)).to("cpu").args[0]
    assert moved["list"][0] is X and moved["list"][1] == (Y, "text")
    assert isinstance(moved["named"], Pair) and moved["named"].first is X
    assert type(moved["packed"]) is type(packed) and torch.equal(moved["packed"].data, packed.data)
    away = Call((nested,)).to("meta").args[0]
    assert away["list"][0].is_meta and away["list"][1][0].is_meta and away["named"].first.is_meta


def test_a_model_is_run_on_its_own_device():
    class Names(nn.Linear):
        def forward(self, x, scale=1):
            return x.device.type, scale

    assert run(Names(3, 3), Call((X,), {"scale": 2})) == ("cpu", 2)
    assert run(Names(3, 3, device="meta"), Call((X,))) == ("meta", 1)
    assert device_of(nn.ReLU()) == torch.device("cpu")
    assert device_of(nn.BatchNorm1d(2, affine=False, device="meta")).type == "meta"


# --- all batches -----------------------------------------------------------------------------------------------------


def batches_of(count, size=2):
    return [torch.full((size, 3), float(i)) for i in range(count)]


def firsts(calls):
    return [int(call.args[0][0, 0]) for call in calls]


def loader_of(count, **options):
    rows = torch.arange(2 * count)[:, None].expand(-1, 3).float()
    return DataLoader(TensorDataset(rows, torch.arange(2 * count)), batch_size=2, **options)


class Stream(IterableDataset):
    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return iter(batches_of(self.count))


def all_rows(data):
    fitted = [int(v) for call in data for v in call.args[0][:, 0]]
    held = [int(v) for call in data.held_out for v in call.args[0][:, 0]]
    return fitted, held


@pytest.mark.parametrize(("count", "held"), [(2, 1), (3, 1), (10, 1), (14, 1), (16, 2), (20, 2), (37, 4)])
def test_a_tenth_of_the_batches_is_kept_aside(count, held):
    data = calibration(batches_of(count), ONE, nn.Identity())
    assert data.is_held_out and len(data.held_out) == held and len(data) == count - held
    assert firsts(data) == list(range(count - held))
    assert firsts(data.held_out) == list(range(count - held, count))


@pytest.mark.parametrize(
    ("sizes", "held"),
    [
        ([32] * 10 + [1], [32, 1]),
        ([32] * 10 + [31], [31]),
        ([32, 32, 1], [32, 1]),
        ([32] * 3 + [5], [32, 5]),
        ([32, 1], [1]),
        ([512] * 20 + [3], [512, 3]),
        ([100] * 40, [100] * 2),
        ([600, 600], [600]),
        ([1] * 30, [1] * 3),
        ([4000] + [1] * 3, [1] * 3),
    ],
)
def test_a_small_last_batch_is_not_all_that_is_kept_aside(sizes, held):
    rows = [torch.full((size, 3), float(i)) for i, size in enumerate(sizes)]
    data = calibration(rows, ONE, nn.Identity())
    assert [call.batch_size for call in data.held_out] == held
    assert [call.batch_size for call in data] == sizes[: -len(held)]


def test_a_loader_is_walked_once_to_keep_batches_aside():
    class Counted(DataLoader):
        walks = 0

        def __iter__(self):
            self.walks += 1
            return super().__iter__()

    loader = Counted(TensorDataset(torch.randn(321, 3)), batch_size=32)
    data = calibration(loader, ONE, nn.Identity())
    assert loader.walks == 1 and data.source is loader
    assert [call.batch_size for call in data.held_out] == [32, 1] and len(data) == 9


@pytest.mark.parametrize(
    "source",
    [
        lambda: batches_of(20),
        lambda: tuple(batches_of(20)),
        lambda: [(batch, TARGET) for batch in batches_of(20)],
        lambda: (batch for batch in batches_of(20)),
        lambda: iter(batches_of(20)),
        lambda: loader_of(20),
        lambda: loader_of(20, shuffle=True),
        lambda: DataLoader(Stream(20), batch_size=None),
        lambda: Stream(20),
        lambda: torch.arange(20 * CHUNK)[:, None].expand(-1, 3).float(),
    ],
    ids=["list", "tuple", "pairs", "generator", "iterator", "loader", "shuffled", "stream loader", "stream", "tensor"],
)
def test_any_source_is_walked_twice_with_the_same_split(source):
    torch.manual_seed(0)
    data = calibration(source(), ONE, nn.Identity())
    first, held = all_rows(data)
    again, still_held = all_rows(data)
    assert first == again and held == still_held
    assert not set(first) & set(held)
    assert len(data) == 18 and len(data.held_out) == 2


def test_a_batch_sampler_that_shuffles_is_stored_too():
    rows = torch.arange(40)[:, None].expand(-1, 3).float()
    sampler = BatchSampler(RandomSampler(range(40)), batch_size=2, drop_last=False)
    data = calibration(DataLoader(TensorDataset(rows), batch_sampler=sampler), ONE, nn.Identity())
    first, held = all_rows(data)
    assert all_rows(data) == (first, held)
    assert sorted(first + held) == list(range(40))


def test_a_loader_in_fixed_order_is_not_stored():
    loader = loader_of(20)
    assert calibration(loader, ONE, nn.Identity()).source is loader


@pytest.mark.parametrize(
    ("count", "fitted", "held"),
    [
        (CHUNK + 1, [30], [3]),
        (2 * CHUNK, [32, 26], [6]),
        (3 * CHUNK + 8, [32, 32, 30], [10]),
        (1000, [*[32] * 28, 4], [25] * 4),
        (330, [*[32] * 9, 9], [17, 16]),
        (5000, [*[32] * 148, 8], [32] * 8),
    ],
)
def test_one_tensor_is_cut_into_batches_where_what_is_held_out_begins(count, fitted, held):
    data = calibration(torch.arange(count)[:, None].float(), ONE, nn.Identity())
    assert [call.batch_size for call in data] == fitted
    assert [call.batch_size for call in data.held_out] == held
    assert [row for rows in all_rows(data) for row in rows] == list(range(count))


def test_one_mapping_of_tensors_is_cut_into_batches():
    whole = {"input_ids": torch.arange(2 * CHUNK)[:, None].expand(-1, 4), "labels": torch.zeros(2 * CHUNK)}
    data = calibration(whole, BY_NAME, Tokens())
    assert [set(call.kwargs) for call in data] == [{"input_ids"}, {"input_ids"}]
    assert data.held_out[0].kwargs["input_ids"][:, 0].tolist() == list(range(58, 64))


class OfChunks(nn.Module):
    """Is written for as many samples as one tensor is cut into."""

    def forward(self, x):
        return x.view(CHUNK, 3)


def test_one_tensor_is_cut_into_whole_batches_where_the_model_takes_no_others():
    data = calibration(torch.randn(2 * CHUNK, 3), as_call(torch.zeros(CHUNK, 3)), OfChunks())
    assert [call.batch_size for call in (*data, *data.held_out)] == [CHUNK] * 2


@pytest.mark.parametrize(("size", "held"), [(4, 1), (9, 1), (20, 2), (256, 26)])
def test_a_single_batch_is_split_by_its_samples(size, held):
    rows = torch.arange(size)[:, None].float()
    data = calibration([(rows, TARGET)], ONE, nn.Identity())
    assert data.is_held_out and len(data) == 1
    assert all_rows(data) == (list(range(size - held)), list(range(size - held, size)))


@pytest.mark.parametrize("size", [1, 3])
def test_a_batch_too_small_to_split_is_used_for_both_and_says_so(size):
    data = calibration([torch.zeros(size, 3)], ONE, nn.Identity())
    assert not data.is_held_out
    assert len(data) == len(data.held_out) == 1
    assert [call.batch_size for call in data] == [size]


class Graph(nn.Module):
    """Takes the features of all nodes and the edges between them."""

    def forward(self, x, adjacency):
        return adjacency @ x


class Fixed(nn.Module):
    """Is written for sixteen samples."""

    def forward(self, x):
        return x.view(16, 3)


def test_a_single_batch_that_cannot_be_split_is_used_for_both_and_says_so():
    nodes, edges = torch.randn(20, 3), torch.eye(20)
    data = calibration([(nodes, edges)], as_call((nodes, edges)), Graph())
    assert not data.is_held_out
    assert [call.batch_size for call in (*data, *data.held_out)] == [20, 20]
    data = calibration([torch.randn(16, 3)], as_call(torch.zeros(16, 3)), Fixed())
    assert not data.is_held_out and [call.batch_size for call in data] == [16]


@pytest.mark.parametrize(("count", "rest"), [(16, 0), (20, 4), (160, 0), (163, 3)])
def test_one_tensor_is_cut_as_the_example_where_the_model_takes_no_other_size(count, rest):
    data = calibration(torch.randn(count, 3), as_call(torch.zeros(16, 3)), Fixed())
    calls = [*data, *(data.held_out if data.is_held_out else ())]
    assert [call.batch_size for call in calls] == [16] * (count // 16)
    said = f"the last {rest} of {count} samples were left out: the model takes 16 at a time"
    assert data.note == (said if rest else None)


@pytest.mark.parametrize("size", [1, 2, CHUNK])
def test_one_tensor_is_cut_alike_whatever_the_example_where_the_model_takes_any_size(size):
    data = calibration(torch.randn(3 * CHUNK, 3), as_call(torch.zeros(size, 3)), nn.Linear(3, 2))
    assert [call.batch_size for call in (*data, *data.held_out)] == [CHUNK, CHUNK, 22, 10]


@pytest.mark.parametrize(
    "empty",
    [[], (), iter([]), torch.zeros(0, 3), DataLoader(Stream(0), batch_size=None), {"input_ids": torch.zeros(0, 4)}],
    ids=["list", "tuple", "iterator", "tensor", "loader", "mapping"],
)
def test_no_batches_is_an_error_that_says_what_to_give(empty):
    with pytest.raises(CalibrationError, match="calib_data has no batches: give an iterable of inputs"):
        calibration(empty, BY_NAME, Tokens())


def test_a_dataset_is_refused_since_its_items_are_not_batches():
    with pytest.raises(TypeError, match=r"calib_data is a Dataset.*DataLoader\(dataset, batch_size=32\)"):
        calibration(TensorDataset(X), ONE, nn.Identity())


def test_what_cannot_be_iterated_is_refused():
    with pytest.raises(TypeError, match="calib_data is int: expected an iterable of inputs"):
        calibration(7, ONE, nn.Identity())


def test_an_error_inside_the_users_loader_is_the_users():
    def broken():
        yield X
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        calibration(broken(), ONE, nn.Identity())


# --- masks -----------------------------------------------------------------------------------------------------------


def test_padding_masks_are_found_by_name_and_shape():
    call = Call((X,), {"attention_mask": MASK, "decoder_attention_mask": torch.ones(2, 5), "input_ids": IDS})
    masks = call.masks()
    assert set(masks) == {(2, 3), (2, 5)}
    assert masks[2, 3].dtype == torch.bool and masks[2, 3].tolist() == MASK.bool().tolist()


@pytest.mark.parametrize("mask", [torch.tensor([[False, True]]), torch.tensor([[0.0, -torch.inf]])])
def test_torchs_own_padding_masks_are_set_at_padding(mask):
    assert Call((), {"src_key_padding_mask": mask}).masks()[1, 2].tolist() == [[True, False]]


def test_masks_that_do_not_say_what_is_padding_are_left_alone():
    assert Call((), {"attention_mask": torch.ones(2, 1, 3, 3), "mask": MASK, "head_mask": MASK}).masks() == {}
    assert Call((), {"attention_mask": None}).masks() == {}


def test_two_masks_of_one_shape_leave_out_only_what_both_do():
    call = Call((), {"attention_mask": MASK, "decoder_attention_mask": torch.tensor([[1, 0, 0], [1, 1, 0]])})
    assert call.masks()[2, 3].tolist() == [[True, True, True], [True, True, False]]


def test_padded_rows_are_left_out_of_both_shapes_a_token_layer_has():
    masks = {(2, 3): MASK.bool()}
    tensor = torch.arange(24.0).reshape(2, 3, 4)
    wanted = torch.stack([tensor[0, 0], tensor[0, 1], tensor[0, 2], tensor[1, 0]])
    assert torch.equal(masked_rows(tensor, masks), wanted)
    assert torch.equal(masked_rows(tensor.reshape(6, 4), masks), wanted)


@pytest.mark.parametrize("shape", [(2, 4), (2, 5, 4), (3, 2, 4), (2, 2, 3, 4), (4,)])
def test_shapes_that_the_mask_does_not_fit_keep_all_rows(shape):
    tensor = torch.randn(shape)
    assert torch.equal(masked_rows(tensor, {(2, 3): MASK.bool()}), tensor.reshape(-1, 4))


def test_no_mask_and_a_full_mask_keep_all_rows():
    tensor = torch.randn(2, 3, 4)
    for masks in ({}, {(2, 3): torch.ones(2, 3, dtype=torch.bool)}):
        assert torch.equal(masked_rows(tensor, masks), tensor.reshape(6, 4))


def test_the_mask_that_fits_is_taken():
    masks = {(2, 5): torch.zeros(2, 5, dtype=torch.bool), (2, 3): MASK.bool()}
    assert masked_rows(torch.randn(2, 3, 4), masks).shape == (4, 4)
    assert masked_rows(torch.randn(2, 5, 4), masks).shape == (0, 4)


# --- outputs and state -----------------------------------------------------------------------------------------------


def test_floating_outputs_are_found_in_any_structure():
    made = make_dataclass("Output", ["logits", "count"])(X, TARGET)
    output = {"a": X, "b": (Y, TARGET, None), "c": [made, "text"]}
    assert [id(t) for t in float_outputs(output)] == [id(X), id(Y), id(X)]
    assert float_outputs(TARGET) == float_outputs(None) == []


def test_inference_puts_every_training_flag_back():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model.train()
    model[1].eval()
    with inference(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == [True, True, False, False]
    assert torch.is_grad_enabled()


class Merging(nn.Linear):
    """Merges its adapter into the weight on `eval` and takes it out on `train`, as loralib does."""

    def __init__(self):
        super().__init__(8, 8)
        self.up, self.down = (nn.Parameter(torch.randn(shape)) for shape in ((8, 2), (2, 8)))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if self.merged == mode:
            self.merge(-1 if mode else 1)
            self.merged = not mode
        return self

    def merge(self, sign):
        self.weight.data += sign * self.up @ self.down

    def forward(self, x):
        return super().forward(x) + (0 if self.merged else x @ self.down.T @ self.up.T)


class MergingAnew(Merging):
    """The same with another tensor under the parameter."""

    def merge(self, sign):
        self.weight.data = self.weight.data + sign * self.up @ self.down


class MergingNewParameter(Merging):
    def merge(self, sign):
        self.weight = nn.Parameter(self.weight + sign * self.up @ self.down)


@pytest.mark.parametrize("kind", [Merging, MergingAnew, MergingNewParameter])
@pytest.mark.parametrize("training", [True, False])
def test_inference_leaves_weights_that_eval_merges_as_they_were(kind, training):
    model = nn.Sequential(kind(), nn.Dropout()).train(training)
    parameters, x = list(model.parameters()), torch.randn(3, 8)
    kept = [parameter.detach().clone() for parameter in parameters]
    wanted = model[0](x)
    for _ in range(2):
        with inference(model), inference(model):
            assert not any(module.training for module in model.modules())
            assert torch.equal(model(x), wanted)
        assert model.training is model[0].training is training and model[0].merged is not training
        assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))
        assert all(torch.equal(now, then) for now, then in zip(parameters, kept, strict=True))


class Prepares(nn.Linear):
    """Stores on `eval` what its forward reads then, as LeViT does."""

    def train(self, mode=True):
        super().train(mode)
        if mode:
            self.__dict__.pop("stored", None)
        else:
            self.stored = 2 * self.bias.detach()
        return self

    def forward(self, x):
        return x + (2 * self.bias if self.training else self.stored)


def test_what_eval_prepares_is_there_in_inference_and_gone_afterwards():
    model = Prepares(3, 3)
    with inference(model):
        assert torch.equal(model(X), X + 2 * model.bias)
    assert model.training and not hasattr(model, "stored")


def test_inference_keeps_the_hooks_that_were_there():
    model = nn.Linear(3, 3)
    outer = model.register_forward_hook(lambda *_: None)
    with inference(model):
        inner = model.register_forward_hook(lambda *_: None)
        assert len(model._forward_hooks) == 2
        inner.remove()
    assert list(model._forward_hooks) == [outer.id]


class Changes(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("cache", torch.zeros(3))
        self.loose = torch.zeros(3)
        self.list, self.dict, self.set = [1], {"a": 1}, {1}

    def forward(self):
        self.cache += 1
        self.loose.mul_(2).add_(1)
        self.list.append(2)
        self.dict["b"] = 2
        self.set.clear()
        self.new = self.cache
        self.cache = torch.ones(3)


class Spoils(nn.Module):
    def forward(self, x, mask=None):
        x -= 0.5
        return x if mask is None else x * mask.fill_(2)


def test_a_model_that_changes_its_inputs_in_place_gets_copies() -> None:
    x, mask = torch.ones(3, 4), torch.ones(3, 4)
    for model in (Spoils(), Spoils()):
        for _ in range(3):
            assert torch.equal(run(model, Call((x,), {"mask": mask})), torch.ones(3, 4))
    assert torch.equal(x, torch.ones(3, 4)) and torch.equal(mask, torch.ones(3, 4))


def test_a_model_that_changes_only_some_inputs_or_nested_ones_gets_copies_too() -> None:
    class Pads(nn.Module):
        def forward(self, x, mask):
            return x if mask["all"].all() else x.masked_fill_(~mask["all"], 0).add(mask["all"].logical_not_())

    x, model = torch.ones(3, 4), Pads()
    masks = [torch.ones(3, 4).bool(), torch.ones(3, 4).bool().tril()]
    for mask in (*masks, masks[1]):
        kept = mask.clone()
        run(model, Call((x, {"all": mask})))
        assert torch.equal(x, torch.ones(3, 4)) and torch.equal(mask, kept)
    run(model, Call((x, {"all": masks[1]})), shares=True)  # known by now
    assert torch.equal(x, torch.ones(3, 4))


def test_what_is_drawn_follows_from_the_inputs_and_the_users_generator_stays() -> None:
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.randn(x.shape)

    first, second = Call((torch.ones(3, 4),)), Call((torch.zeros(3, 4),))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    noise = [run(Noisy(), call) - call.args[0] for call in (first, second, first)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(run(Noisy(), first) - first.args[0], noise[0])
    assert torch.equal(noise[0], noise[2]) and not torch.allclose(noise[0], noise[1])


def test_unchanged_puts_back_what_a_forward_leaves_behind():
    model = Changes()
    kept = (model.cache, model.loose, model.list, model.dict, model.set)
    with unchanged(model):
        model()
        assert model.new is not None
    assert all(now is then for now, then in zip((model.cache, model.loose, model.list), kept[:3], strict=True))
    assert model.dict is kept[3] and model.set is kept[4]
    assert not model.cache.any() and not model.loose.any()
    assert (model.list, model.dict, model.set) == ([1], {"a": 1}, {1})
    assert not hasattr(model, "new")


SPARSE = [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc]


def sparse(layout):
    blocks = (2, 2) if layout in (torch.sparse_bsr, torch.sparse_bsc) else None
    return torch.eye(4).to_sparse(layout=layout, blocksize=blocks)


@pytest.mark.parametrize("layout", SPARSE)
@pytest.mark.filterwarnings("ignore:Sparse")  # torch calls some of these layouts beta
def test_unchanged_puts_back_sparse_buffers(layout):
    model = nn.ReLU()
    model.register_buffer("edges", sparse(layout))
    with unchanged(model):
        pass
    with unchanged(model):
        model.edges.mul_(2)
    assert model.edges.layout is layout and torch.equal(model.edges.to_dense(), torch.eye(4))


@pytest.mark.parametrize("layout", SPARSE)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_call_with_a_sparse_tensor_is_not_cut(layout):
    call = Call((torch.randn(4, 3), sparse(layout)))
    assert not call.can_be_cut and call.batch_size == 1 and call.rows(0, 2) is call


def test_unchanged_holds_after_an_error():
    def fails(model):
        with unchanged(model), inference(model):
            model()
            raise ZeroDivisionError

    model = Changes()
    with pytest.raises(ZeroDivisionError):
        fails(model)
    assert model.training and torch.is_grad_enabled()
    assert model.list == [1] and not model.cache.any()
