"""Lightning: the loss in a LightningModule. With devices=2, group="world" makes it the loss of the whole batch."""

import lightning
import torch
from torch import nn

import tclr_kernels as tk


class SimCLR(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 64))
        self.loss = tk.NTXentLoss(temperature=0.1, group="world")

    def training_step(self, batch, step):
        a, b = (self.net(batch + 0.3 * torch.randn_like(batch)) for _ in range(2))
        loss = self.loss(a, b)
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


if __name__ == "__main__":
    torch.manual_seed(0)
    samples = torch.randn(512, 32)
    batches = [samples[torch.randperm(512)[:128]] for _ in range(61)]
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = lightning.Trainer(accelerator="cpu", devices=1, max_epochs=1, **quiet)
    trainer.fit(SimCLR(), torch.utils.data.DataLoader(batches, batch_size=None))
