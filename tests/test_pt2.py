"""Exported programs become modules of layers again, which compute the same bits and are compressed as others are."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import panther
import panther.convert as cli
from panther.batches import Call
from panther.converters import pt2, read
from panther.errors import LoadError
from panther.nn import SketchedLayer


class Net(nn.Module):
    """Convolutions of each kind, a norm, a tied pair and weights that are no layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(8, 8, 3, padding="same", dilation=2)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.first, self.second = nn.Linear(8, 24), nn.Linear(24, 8, bias=False)
        self.again = nn.Linear(8, 24)
        self.again.weight = self.first.weight
        self.free = nn.Parameter(torch.randn(5, 8))
        self.register_buffer("scale", torch.full((8,), 0.5))

    def forward(self, image: Tensor, shift: Tensor | None = None) -> dict[str, Tensor]:
        x = self.norm(self.stem(image)).relu()
        x = (self.deep(self.wide(x)) + x).mean((2, 3))
        x = self.second(self.first(x).relu() + self.again(x)) * self.scale
        if shift is not None:
            x = x + shift
        return {"out": x, "free": nn.functional.linear(x, self.free)}


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


IMAGE = torch.randn(2, 3, 12, 10, generator=torch.Generator().manual_seed(1))
ANY_BATCH = {"image": {0: Dim.AUTO}}


def written(path: Path, model: nn.Module, args: tuple[Any, ...], **options: Any) -> Path:
    torch.export.save(torch.export.export(model, args, **options), path)
    return path


def layers_of(model: nn.Module) -> dict[str, str]:
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return {name: type(m).__name__ for name, m in model.named_modules() if isinstance(m, kinds)}


def test_layers_have_their_names_geometry_and_bits_again(tmp_path: Path) -> None:
    model = net()
    made = read(written(tmp_path / "net.pt2", model, (IMAGE,), dynamic_shapes=ANY_BATCH), trust_pickle=True)
    names = layers_of(made)
    assert {"stem", "wide", "deep", "second"} <= set(names) and len(names) == 7
    for name in ("stem", "wide", "deep"):
        got, wanted = made.get_submodule(name), model.get_submodule(name)
        assert repr(got) == repr(wanted)
    assert isinstance(made.get_submodule("free_layer"), nn.Linear)
    for images in (IMAGE, torch.randn(5, 3, 12, 10)):
        for name, answer in made(images).items():
            assert torch.equal(answer, model(images)[name])
    assert not any(module.training for module in made.modules())


def test_nothing_is_held_twice_or_kept_that_is_not_read(tmp_path: Path) -> None:
    model = net()
    made = read(written(tmp_path / "net.pt2", model, (IMAGE,)), trust_pickle=True)
    numbers = {id(p): p.numel() for p in made.parameters()}
    assert sum(numbers.values()) == sum(p.numel() for p in model.parameters())
    assert "norm.num_batches_tracked" not in made.state_dict()


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"padding": "same"}, {"stride": 2, "padding": 1, "bias": False}], ids=str)
def test_convolutions_of_any_dimension(dims: int, options: dict[str, Any], tmp_path: Path) -> None:
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    model, given = nn.Sequential(kind(4, 6, 3, **options)), torch.randn(2, 4, *(7,) * dims)
    made = read(written(tmp_path / "conv.pt2", model.eval(), (given,)), trust_pickle=True)
    assert layers_of(made) == {"0": kind.__name__} and repr(made.get_submodule("0")) == repr(model[0])
    assert torch.equal(made(given), model(given))


def test_programs_of_decomposed_operations_have_layers_too() -> None:
    model = net()
    program = torch.export.export(model, (IMAGE,)).run_decompositions()
    made = pt2.module_of(program)
    assert len(layers_of(made)) == 7
    torch.testing.assert_close(made(IMAGE)["free"], model(IMAGE)["free"])


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6))
        self.up = nn.ConvTranspose2d(3, 4, 2)
        self.mine = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).flatten(2).mT
        y = y + self.mine(y, y, y, need_weights=False)[0]
        z = nn.functional.linear(y, self.weight * 2, self.bias)
        return nn.functional.linear(z @ self.weight, self.weight, self.bias)


def test_what_is_no_layer_stays_an_operation(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, given = Odd().eval(), torch.randn(2, 3, 4, 4)
    made = read(written(tmp_path / "odd.pt2", model, (given,)), trust_pickle=True)
    torch.testing.assert_close(made(given), model(given))
    names = layers_of(made)
    assert names and not any(name.startswith("up") for name in names)
    assert torch.equal(made.get_submodule("weight_layer").weight, model.weight)
    options: dict[str, Any] = {"calib_data": [given] * 2, "heal": "none", "progress": False, "verify": False}
    result = panther.compress(made, 0.6, example_inputs=given, **options)
    assert result.model(given).isfinite().all()


class Functions(nn.Module):
    """Products that no layer makes: with a row, with a bias a row, and of a matrix that is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.row, self.matrix, self.biases = (nn.Parameter(torch.randn(*s)) for s in ((6,), (5, 6), (4, 5)))
        self.register_buffer("fixed", torch.randn(7, 6))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        linear = nn.functional.linear
        return linear(x, self.row), torch.addmm(self.biases, x, self.matrix.T), linear(x, self.fixed)


def test_products_with_other_operands_than_a_layer_has() -> None:
    model, given = Functions().eval(), torch.randn(4, 6)
    for program in (torch.export.export(model, (given,)), torch.export.export(model, (given,)).run_decompositions()):
        made = pt2.module_of(program)
        assert layers_of(made) == {"fixed_layer": "Linear"}
        for got, wanted in zip(made(given), model(given), strict=True):
            torch.testing.assert_close(got, wanted)


def test_a_program_is_compressed_saved_loaded_and_exported(tmp_path: Path) -> None:
    path = written(tmp_path / "net.pt2", net(), (IMAGE,), dynamic_shapes=ANY_BATCH)
    made = read(path, trust_pickle=True)
    batches = [torch.randn(16, 3, 12, 10) for _ in range(6)]
    result = panther.compress(
        made, 0.5, example_inputs=IMAGE, calib_data=batches, heal=panther.Heal("distill", steps=6), progress=False
    )
    assert result.budget_met and any(isinstance(m, SketchedLayer) for m in result.model.modules())
    loaded = panther.load(result.save(tmp_path / "small"), model=lambda: read(path, trust_pickle=True))
    for name, answer in loaded(IMAGE).items():
        assert torch.equal(answer, result.model(IMAGE)[name])
    assert result.export_onnx(tmp_path / "small.onnx").ok


def test_the_inputs_of_the_export_are_kept(tmp_path: Path) -> None:
    shift = torch.ones(8)
    made = read(written(tmp_path / "net.pt2", net(), (IMAGE,), kwargs={"shift": shift}), trust_pickle=True)
    found = pt2.example_inputs_of(made)
    assert found is not None and torch.equal(found[0][0], IMAGE) and torch.equal(found[1]["shift"], shift)
    assert Call(*found).batch_size == 1  # the shift has no batch
    assert pt2.example_inputs_of(nn.Linear(2, 2)) is None


def test_from_the_shell_the_program_says_its_inputs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "net.pt2", net(), (IMAGE,), dynamic_shapes=ANY_BATCH)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["net.pt2"]) == cli.USAGE and "--trust-pickle" in capsys.readouterr().err
    assert cli.main(["net.pt2", "--trust-pickle", "-q"]) == cli.DONE
    said = capsys.readouterr().out.replace(f"{tmp_path}/", "").splitlines()
    assert {"wrote net.onnx", "wrote net.panther"} <= set(said)
    assert {"net.onnx", "net.panther", "net.report.txt"} <= {entry.name for entry in tmp_path.iterdir()}


def test_what_stands_between_layers_is_found_as_in_the_model(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(12, 40), nn.GELU()), nn.Linear(40, 12), nn.ReLU(), nn.Linear(12, 3))
    given = torch.randn(6, 12)
    made = read(written(tmp_path / "mlp.pt2", model.eval(), (given,)), trust_pickle=True)
    found, wanted = panther.analyze(made, given), panther.analyze(model, given)
    assert len(wanted.followers) == 2 and found.followers == wanted.followers
    assert wanted.rectified and found.rectified == wanted.rectified


# Refusals


def test_an_archive_that_is_not_trusted_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "net.pt2", net(), (IMAGE,))
    monkeypatch.setattr(torch.export, "load", lambda *_: pytest.fail("opened"))
    with pytest.raises(LoadError, match=r"evaluates text .* --trust-pickle \(trust_pickle=True\)"):
        read(path)


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("program.pt", ["m/archive_format", "m/models/model.json"]),
        ("older.pt", ["serialized_exported_program.json", "version"]),
        ("cut.pt2", []),
    ],
)
def test_archives_are_known_by_what_is_in_them_or_by_their_name(name: str, entries: list[str], tmp_path: Path) -> None:
    if entries:
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for entry in entries:
                archive.writestr(entry, b"{}")
    else:
        (tmp_path / name).write_bytes(b"whatever")
    with pytest.raises(LoadError, match=r"is a torch.export archive.*--trust-pickle"):
        read(tmp_path / name)
    with pytest.raises(LoadError, match=r"cannot be read as a torch.export archive by torch .*export the model again"):
        read(tmp_path / name, trust_pickle=True)


def test_an_architecture_is_not_needed(tmp_path: Path) -> None:
    path = written(tmp_path / "net.pt2", net(), (IMAGE,))
    with pytest.raises(LoadError, match="holds the architecture: leave model="):
        read(path, model=net, trust_pickle=True)


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def without_program(data: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
        for entry in old.namelist():
            new.writestr(entry, b"{}" if entry.endswith("models/model.json") else old.read(entry))
    return made.getvalue()


@pytest.mark.parametrize("damage", [cut, without_program, lambda _: b"not an archive"])
def test_a_damaged_archive_is_refused(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = written(tmp_path / "net.pt2", net(), (IMAGE,))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(LoadError):
        read(path, trust_pickle=True)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(4)])
def test_a_program_of_a_model_in_training_is_refused(layer: nn.Module, tmp_path: Path) -> None:
    path = written(tmp_path / "net.pt2", nn.Sequential(nn.Linear(4, 4), layer).train(), (torch.randn(6, 4),))
    with pytest.raises(LoadError, match=r"exported in training mode .* export model.eval\(\) instead"):
        read(path, trust_pickle=True)
