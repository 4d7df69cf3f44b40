"""A Lightning module as the objective.

    python -m examples.lightning_digits

Accuracy comes from torchmetrics, which is where Lightning's own metrics went.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from functools import partial

import lightning
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import panther as pr
from examples.common import digits, parser, pays
from panther.tuner import SkAutoTuner


class SketchedLightningModule(lightning.LightningModule):
    def __init__(self, num_terms: int = 2, low_rank: int = 64) -> None:
        super().__init__()
        self.save_hyperparameters()
        first = pr.nn.SKLinear(784, 512, num_terms=num_terms, low_rank=low_rank)
        self.model = nn.Sequential(first, nn.ReLU(), nn.Dropout(0.2), nn.Linear(512, 10))
        self.criterion = nn.CrossEntropyLoss()
        self.val_acc = MulticlassAccuracy(num_classes=10, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.flatten(1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = self.criterion(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.val_acc(logits, y)
        self.log("val_loss", self.criterion(logits, y))
        self.log("val_acc", self.val_acc)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class DigitsDataModule(lightning.LightningDataModule):
    def __init__(self, quick: bool, batch_size: int = 64) -> None:
        super().__init__()
        self.data, self.batch_size = digits(quick), batch_size

    def train_dataloader(self) -> DataLoader:
        order = torch.Generator().manual_seed(0)
        return DataLoader(TensorDataset(*self.data.train), self.batch_size, shuffle=True, generator=order)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(*self.data.valid), 256)


def evaluate_lightning_model(num_terms: int, low_rank: int, quick: bool = False) -> float:
    lightning.seed_everything(0, verbose=False)
    trainer = lightning.Trainer(
        max_epochs=1 if quick else 5,
        callbacks=[EarlyStopping(monitor="val_loss", patience=2)],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,  # hundreds of trials would leave hundreds of files
        logger=False,
        log_every_n_steps=1,
    )
    trainer.fit(SketchedLightningModule(num_terms, low_rank), datamodule=DigitsDataModule(quick))
    return trainer.callback_metrics["val_acc"].item()


def main(arguments: Sequence[str] | None = None) -> None:
    quick = parser(__doc__).parse_args(arguments).quick
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # it greets in every trial
    tuner = SkAutoTuner(
        parameter_bounds={"num_terms": (2, 16), "low_rank": (16, 128)},
        objective_function=partial(evaluate_lightning_model, quick=quick),
        n_initial_points=3 if quick else 6,
        n_iterations=2 if quick else 20,
        constraints=[pays],
    )
    with warnings.catch_warnings():
        # The images are in memory already: processes that load them would only cost time.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        # Lightning's own code does what torch deprecates.
        warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", category=FutureWarning)
        best_params, best_score = tuner.optimize()
    print(f"Best parameters: {best_params}, accuracy: {best_score:.4f}")


if __name__ == "__main__":
    main()
