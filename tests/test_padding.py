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

    def __init__(self, *, positions=0, honours=True, length=None, least=0):
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.places = nn.Embedding(positions, WIDTH) if positions else None
        self.first, self.second = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.honours, self.length, self.least = honours, length, least

    def forward(self, input_ids, attention_mask):
        if self.length not in (None, input_ids.shape[1]):
            raise ValueError(f"{input_ids.shape[1]} tokens: expected {self.length}")
        if input_ids.shape[1] < self.least:
            raise ValueError(f"{input_ids.shape[1]} tokens: expected {self.least} at least")
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
    """Two sequences, of which the second may have a mask, too."""

    def __init__(self):
        super().__init__()
        self.reader = Reader()

    def forward(self, input_ids, attention_mask, decoder_input_ids, decoder_attention_mask=None):
        weights = attention_mask.unsqueeze(-1).float()
        read = (self.reader(input_ids, attention_mask) * weights).sum(1) / weights.sum(1)
        if decoder_attention_mask is None:
            decoder_attention_mask = torch.ones_like(decoder_input_ids)
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


def translations(**options):
    """Texts, each with another of as many words for every sample."""
    found = []
    for index, batch in enumerate(batches(width=40)):
        other = texts([30] * 8, seed=100 + index)
        other["input_ids"][:, 0] = batch["attention_mask"].sum(1)
        kept = {name: value for name, value in other.items() if name in options.get("of", other)}
        found.append({**batch, **{f"decoder_{name}": value for name, value in kept.items()}})
    return found


def test_a_second_sequence_without_a_mask_goes_with_its_text():
    after, note = without_padding(of(model_of(Translator), translations(of=["input_ids"])))
    assert note is not None
    for call in after:
        assert call.kwargs["input_ids"].shape[1] <= 25
        assert call.kwargs["decoder_input_ids"].shape == (8, 30)
        assert torch.equal(call.kwargs["attention_mask"].sum(1), call.kwargs["decoder_input_ids"][:, 0])


class Seeing(Reader):
    def forward(self, input_ids, attention_mask, picture):
        return super().forward(input_ids, attention_mask) + picture.mean((1, 2))[:, None, None]


def test_texts_beside_large_pictures_are_cut_off_where_they_are():
    data = [{**batch, "picture": torch.randn(8, 64, 64)} for batch in batches(width=40)]
    after, note = without_padding(of(model_of(Seeing), data))
    assert note is not None
    for call, given in zip(after, data, strict=False):
        longest = int(given["attention_mask"].sum(1).max())
        assert call.kwargs["picture"] is given["picture"]
        assert torch.equal(call.kwargs["input_ids"], given["input_ids"][:, :longest])


def test_batches_of_several_sizes_leave_no_more_positions_than_they_had():
    data = [texts([20 + i % 5] * 4, seed=i) for i in range(4)] + [texts([3] * 40, width=16, seed=9)]
    data += [texts([2, 4] * 4, width=30, seed=10)] * 2
    before = of(model_of(), data)
    after, note = without_padding(before)
    assert note is not None
    assert samples(after) == samples(before)
    assert sorted(c.batch_size for c in after) == sorted(c.batch_size for c in before)
    assert positions(after) < positions(before)


def test_what_is_cut_off_can_be_viewed_as_the_batch_could():
    data = batches(width=40)
    data[0]["attention_mask"][0, 5] = 0  # of which no side can be told
    data[0]["attention_mask"][1, 0] = 0
    after, note = without_padding(of(model_of(), data))
    assert note is not None
    assert all(tensor.is_contiguous() for call in (*after, *after.held_out) for tensor in call.leaves())


def test_the_first_batch_is_of_a_middle_length():
    model, data = model_of(), batches(32, width=40)
    after, _ = without_padding(of(model, data))
    lengths = [call.kwargs["input_ids"].shape[1] for call in after]
    assert sorted(lengths)[4] < lengths[0] < sorted(lengths)[-4]
    assert lengths[:14] != lengths[16:30]


def test_data_without_a_mask_are_read_no_further_than_their_first_batch():
    read = []

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 64

        def __getitem__(self, index):
            read.append(index)
            return torch.ones(3)

    before = of(nn.Linear(3, 2), DataLoader(Rows(), batch_size=4))
    read.clear()
    assert without_padding(before)[0] is before
    assert read == [0, 1, 2, 3]


# --- what stays ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "data"),
    [
        pytest.param(model_of(honours=False), batches(width=40), id="a model that reads its padding"),
        pytest.param(model_of(positions=64), batches(side="left", width=40), id="positions that would be others"),
        pytest.param(model_of(length=40), batches(width=40), id="a model of one length"),
        pytest.param(model_of(), [texts([20] * 8, seed=i) for i in range(4)], id="no padding"),
        pytest.param(model_of(), [texts([20] * 7 + [19], seed=i) for i in range(4)], id="hardly any"),
        pytest.param(model_of(Translator), translations(), id="masks of two lengths"),
        pytest.param(model_of(least=8), batches(width=40), id="a model that takes no short texts"),
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
