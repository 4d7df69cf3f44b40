"""What a wheel has to do where it was installed: `python tests/smoke.py`, with the Python of that environment."""

import tempfile
from pathlib import Path

import torch
from torch import nn

import panther

ROOT = Path(__file__).parent.parent


def main():
    info = panther.build_info()
    assert Path(panther.__file__).parent.parent != ROOT, "this is the checkout's panther, not the wheel's"
    assert info.compiled, info.reason

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)).eval()
    inputs = torch.randn(512, 16) @ torch.randn(16, 64)
    result = panther.compress(
        model, 0.5, example_inputs=inputs[:4], calib_data=inputs, heal="none", seed=0, progress=False
    )
    assert result.budget_met
    with tempfile.TemporaryDirectory() as folder:
        result.export_onnx(Path(folder, "small.onnx"))
        result.save(folder)
        again = panther.load(folder, model=model)
    assert torch.equal(again(inputs), result.model(inputs))
    print(f"{info}\ncompressed, exported, saved and loaded")


if __name__ == "__main__":
    main()
