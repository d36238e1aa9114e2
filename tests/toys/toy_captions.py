"""A module that learns something about captions, for runs on real shards."""

import lightning.pytorch as pl
import torch


class CaptionToy(pl.LightningModule):
    """Fits one number to the lengths of the captions that are valid."""

    def __init__(self, lr: float = 0.01):
        super().__init__()
        self.lr = lr
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def loss(self, batch):
        lengths = torch.tensor([float(len(caption)) for caption in batch["captions"]])
        return ((self.weight - lengths).square() * batch["valid"]).mean()

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)
