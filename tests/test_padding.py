"""Calibration batches without their padding: the same samples, the same answers, fewer positions."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import panther
from panther.batches import CHUNK, Call, as_call, calibration, run
from panther.padding import TOLERANCE, without_padding

WORDS, WIDTH = 50, 16


class Reader(nn.Module):
    """Attention over what counts, (batch, length) -> (batch, length, width); `positions` as BERT has them, or none."""

    def __init__(self, *, positions=0, honours=True, length=None):
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.places = nn.Embedding(positions, WIDTH) if positions else None
        self.first, self.second = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.honours, self.length = honours, length

    def forward(self, input_ids, attention_mask):
        if self.length not in (None, input_ids.shape[1]):
            raise ValueError(f"{input_ids.shape[1]} tokens: expected {self.length}")
        x = self.words(input_ids)
        if self.places is not None:
            x = x + self.places(torch.arange(input_ids.shape[1]))
        mask = attention_mask.bool() if self.honours else torch.ones_like(attention_mask, dtype=torch.bool)
        scores = (x @ x.mT).masked_fill(~mask.unsqueeze(1), -torch.inf)
        return self.second(torch.relu(self.first(scores.softmax(-1) @ x)))


class Torch(nn.Module):
    """The same with torch's own names and kinds of mask, pooled."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True)

    def forward(self, words, key_padding_mask):
        y = self.layer(self.words(words), src_key_padding_mask=key_padding_mask)
        counts = (key_padding_mask == 0).unsqueeze(-1)
        return (y * counts).sum(1) / counts.sum(1)


class Translator(nn.Module):
    """Two sequences, each with a mask of its own."""

    def __init__(self):
        super().__init__()
        self.reader = Reader()

    def forward(self, input_ids, attention_mask, decoder_input_ids, decoder_attention_mask):
        weights = attention_mask.unsqueeze(-1).float()
        read = (self.reader(input_ids, attention_mask) * weights).sum(1) / weights.sum(1)
        return self.reader(decoder_input_ids, decoder_attention_mask) + read.unsqueeze(1)


def texts(lengths, *, side="right", width=None, seed=0):
    """One padded batch; every sample's words are its own."""
    width = width or max(lengths)
    draw = torch.Generator().manual_seed(seed)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        at = slice(0, length) if side == "right" else slice(width - length, width)
        ids[row, at] = torch.randint(1, WORDS, (length,), generator=draw)
        mask[row, at] = 1
    return {"input_ids": ids, "attention_mask": mask}


def batches(count=12, size=8, *, side="right", width=None):
    draw = torch.Generator().manual_seed(7)
    lengths = torch.randint(2, 25, (count, size), generator=draw).tolist()
    return [texts(of, side=side, width=width, seed=seed) for seed, of in enumerate(lengths)]


def of(model, data):
    return calibration(data, as_call(first(data)), model)


def first(data):
    return data if isinstance(data, dict) else next(iter(data))


def samples(calls):
    """What every sample says, padding left out, in any order."""
    return sorted(
        tuple(ids[mask.bool()].tolist())
        for call in calls
        for ids, mask in zip(call.kwargs["input_ids"], call.kwargs["attention_mask"], strict=True)
    )


def positions(calls):
    return sum(call.kwargs["attention_mask"].numel() for call in calls)


def model_of(kind=Reader, **options):
    torch.manual_seed(0)
    return kind(**options).eval()


# --- what is left out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("width", [None, 64])
def test_the_same_samples_come_in_as_many_batches_with_fewer_positions(side, width):
    model, data = model_of(), batches(side=side, width=width)
    before = of(model, data)
    after, note = without_padding(before)
    assert samples(after) == samples(before)
    assert [c.batch_size for c in after] == [c.batch_size for c in before]
    assert len(after) == len(before)
    counted = sum(int(c.kwargs["attention_mask"].sum()) for c in before)
    assert positions(after) < 1.2 * counted < positions(before)
    assert note is not None
    assert "padding" in note


@pytest.mark.parametrize("side", ["right", "left"])
def test_every_sample_is_answered_as_before(side):
    model, data = model_of(), batches(side=side, width=40)

    def answers(calls):
        found = []
        for call in calls:
            mask = call.kwargs["attention_mask"].bool()
            found += [y[m].flatten() for y, m in zip(run(model, call), mask, strict=True)]
        return sorted(found, key=lambda y: (len(y), y.tolist()))

    before = of(model, data)
    after, _ = without_padding(before)
    with torch.no_grad():
        for y, z in zip(answers(before), answers(after), strict=True):
            torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-5)


def test_what_is_held_out_stays_apart_and_is_cut_off():
    model, data = model_of(), batches(width=64)
    before = of(model, data)
    after, _ = without_padding(before)
    assert [samples([c]) for c in after.held_out] == [samples([c]) for c in before.held_out]
    assert not set(samples(after)) & set(samples(after.held_out))
    assert all(c.kwargs["input_ids"].shape[1] < 64 for c in after.held_out)
    assert after.is_held_out


def test_a_loader_is_read_as_it_goes_and_gives_the_same_each_time():
    rows = [texts([2 + i % 20], width=64, seed=i) for i in range(100)]
    loader = DataLoader(
        rows, batch_size=4, collate_fn=lambda many: {n: torch.cat([one[n] for one in many]) for n in many[0]}
    )
    data, _ = without_padding(of(model_of(), loader))
    assert not isinstance(data.source, list)
    once, again = list(data), list(data)
    assert len(once) == len(data)
    assert all(torch.equal(a.kwargs["input_ids"], b.kwargs["input_ids"]) for a, b in zip(once, again, strict=True))
    assert samples([*once, *data.held_out]) == samples(map(as_call, loader))


def test_one_batch_and_one_tensor_of_many_samples():
    model = model_of()
    draw = torch.Generator().manual_seed(3)
    lengths = torch.randint(2, 25, (3 * CHUNK,), generator=draw).tolist()
    for data in (texts(lengths, width=64), [texts(lengths, width=64)]):
        before = of(model, data)
        after, _ = without_padding(before)
        assert samples([*after, *after.held_out]) == samples([*before, *before.held_out])
        assert positions(after) < 0.5 * positions(before)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_of_torchs_kind_are_made_longer_by_what_masks(dtype):
    data = []
    for batch in batches(width=40):
        padded = batch["attention_mask"] == 0
        mask = padded if dtype is torch.bool else torch.zeros(padded.shape).masked_fill(padded, -torch.inf)
        data.append({"words": batch["input_ids"], "key_padding_mask": mask})
    model = model_of(Torch)
    after, note = without_padding(of(model, data))
    assert note is not None
    with torch.no_grad():
        before = torch.cat([run(model, call) for call in of(model, data)])
        found = torch.cat([run(model, call) for call in after])
    places = torch.cdist(found, before).argmin(1)
    assert sorted(places.tolist()) == list(range(len(before)))
    torch.testing.assert_close(found, before[places], rtol=1e-4, atol=1e-5)


def test_two_sequences_are_cut_each_by_its_own_mask():
    data = []
    for index, batch in enumerate(batches(width=40)):
        lengths = batch["attention_mask"].sum(1).tolist()
        other = texts([1 + n // 2 for n in lengths], width=30, seed=100 + index)
        data.append({**batch, **{f"decoder_{name}": value for name, value in other.items()}})
    after, note = without_padding(of(model_of(Translator), data))
    assert note is not None
    for call in after:
        shapes = {name: tuple(value.shape) for name, value in call.kwargs.items()}
        assert shapes["input_ids"] == shapes["attention_mask"]
        assert shapes["decoder_input_ids"] == shapes["decoder_attention_mask"]
        assert shapes["decoder_input_ids"][1] < shapes["input_ids"][1] <= 25
    whole = sorted(int(n) for c in of(model_of(Translator), data) for n in c.kwargs["decoder_attention_mask"].sum(1))
    assert sorted(int(n) for c in after for n in c.kwargs["decoder_attention_mask"].sum(1)) == whole


# --- what stays ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "data"),
    [
        pytest.param(model_of(honours=False), batches(width=40), id="a model that reads its padding"),
        pytest.param(model_of(positions=64), batches(side="left", width=40), id="positions that would be others"),
        pytest.param(model_of(length=40), batches(width=40), id="a model of one length"),
        pytest.param(model_of(), [texts([20] * 8, seed=i) for i in range(4)], id="no padding"),
        pytest.param(model_of(), [texts([20] * 7 + [19], seed=i) for i in range(4)], id="hardly any"),
        pytest.param(nn.Linear(3, 2), [torch.randn(8, 3) for _ in range(4)], id="no mask"),
    ],
)
def test_data_that_would_not_do_stay_as_they_are(model, data):
    before = of(model, data)
    after, note = without_padding(before)
    assert after is before
    assert note is None


def test_positions_at_the_start_of_each_text_are_no_hindrance():
    before = of(model_of(positions=64), batches(width=40))
    assert without_padding(before)[0] is not before


def test_a_batch_with_a_sample_that_is_all_masked_stays_as_it_is():
    data = batches(width=40)
    data[3]["attention_mask"][2] = 0
    after, note = without_padding(of(model_of(), data))
    assert note is not None
    assert list(after)[3].kwargs["input_ids"].shape == (8, 40)


class Described(Reader):
    def forward(self, input_ids, attention_mask, features):
        return super().forward(input_ids, attention_mask) + features.sum(1)[:, None, None]


def test_features_that_are_as_many_as_the_positions_of_a_batch_are_not_cut():
    data = [{**batch, "features": torch.randn(8, 33)} for batch in batches(width=40)]
    odd = data[3]
    for name in ("input_ids", "attention_mask"):
        odd[name] = odd[name][:, :33]
    after, note = without_padding(of(model_of(Described), data))
    assert note is not None
    assert all(call.kwargs["features"].shape[1] == 33 for call in after)


def test_samples_keep_what_belongs_to_them_beside_the_text():
    data = [{**b, "features": b["attention_mask"].sum(1, keepdim=True).float()} for b in batches(width=40)]
    after, note = without_padding(of(model_of(Described), data))
    assert note is not None
    for call in after:
        assert torch.equal(call.kwargs["attention_mask"].sum(1, keepdim=True).float(), call.kwargs["features"])


def test_a_model_in_half_precision_is_judged_by_its_own_rounding():
    model = model_of().to(torch.bfloat16)
    before = of(model, batches(width=40))
    assert without_padding(before)[0] is not before
    assert TOLERANCE < 2**-8  # which this model could not meet


# --- in the whole ----------------------------------------------------------------------------------------------------


def test_compress_says_so_and_finds_the_same():
    model, data = model_of(), batches(24, width=40)
    found, _ = without_padding(of(model, data))
    plain = [dict(call.kwargs) for call in (*found, *found.held_out)]
    results = [
        panther.compress(model, 0.5, example_inputs=data[0], calib_data=given, heal="refit") for given in (data, plain)
    ]
    texts_said = ["\n".join(map(str, result.report.notes)) for result in results]
    assert "padding" in texts_said[0]
    assert "padding" not in texts_said[1]
    call = as_call(data[-1])
    mask = call.kwargs["attention_mask"].bool()
    with torch.no_grad():
        first_answer, second_answer = (run(result.model, call)[mask] for result in results)
    assert (first_answer - second_answer).norm() < 0.05 * first_answer.norm()


def test_heal_says_so():
    model, data = model_of(), batches(24, width=40)
    student = panther.compress(model, 0.5, example_inputs=data[0], calib_data=data, heal="none").model
    done = panther.heal(model, student, data, data[0], panther.Heal("distill", steps=2))
    assert any("padding" in note for note in done.notes)


def test_a_call_that_cannot_be_cut_is_left_alone():
    calls = [Call((), {**batch, "more": [torch.zeros(8)]}) for batch in batches(width=40)]
    model = model_of()
    before = calibration(calls, calls[0], model)
    assert without_padding(before)[0] is before
