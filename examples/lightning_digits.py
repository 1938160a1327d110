"""Lightning: a small network on scikit-learn's handwritten digits, with fastops as one callback.

    pip install fastops[lightning] scikit-learn
    python examples/lightning_digits.py [--mode replace|fuse|plain] [--trial STEPS]

The callback replaces the layers when fit starts and restores them when it ends. The checkpoint is an ordinary one:
Digits.load_from_checkpoint needs no fastops.
"""

import argparse
import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

try:
    import lightning.pytorch as pl
    from sklearn.datasets import load_digits
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install fastops[lightning] scikit-learn") from None


class Digits(pl.LightningModule):
    def __init__(self, width: int = 64, rate: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(256, width), nn.ReLU(), nn.Linear(width, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("accuracy", (self(x).argmax(1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams.rate, momentum=0.9)


def loaders(batch: int = 64) -> tuple[DataLoader, DataLoader]:
    """1437 images to train on, 360 to validate on."""
    data, order = load_digits(), torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    images, classes = torch.tensor(data.images, dtype=torch.float32)[order, None] / 16, torch.tensor(data.target)[order]
    train, test = TensorDataset(images[:1437], classes[:1437]), TensorDataset(images[1437:], classes[1437:])
    return DataLoader(train, batch, shuffle=True), DataLoader(test, 360)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=["replace", "fuse", "plain"], default="replace")
    parser.add_argument("--trial", type=int, default=20, help="steps to measure on each side, default 20")
    options = parser.parse_args(arguments)
    callbacks = []
    if options.mode != "plain":
        from fastops.lightning import FastOps

        callbacks = [FastOps(options.mode, trial=options.trial)]
    pl.seed_everything(0)
    trainer = pl.Trainer(max_epochs=3, accelerator="cpu", callbacks=callbacks, log_every_n_steps=10)
    trainer.fit(Digits(), *loaders())
    print(f"accuracy {trainer.callback_metrics['accuracy']:.3f}")
    model = Digits.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    print("loaded again:", sum(p.numel() for p in model.parameters()), "parameters")


if __name__ == "__main__":
    main(sys.argv[1:])
