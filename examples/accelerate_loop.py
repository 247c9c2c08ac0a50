"""Accelerate: python examples/accelerate_loop.py, or accelerate launch examples/accelerate_loop.py."""

import torch
from accelerate import Accelerator
from torch import nn

import tclr_kernels as tk

accelerator = Accelerator(cpu=True)  # leave cpu=True out for GPUs
torch.manual_seed(0)
samples = torch.randn(512, 32)
net = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 64))
loss_of = tk.NTXentLoss(temperature=0.1, group="world")  # the loss of the whole batch, also with many processes
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
loader = torch.utils.data.DataLoader(samples, batch_size=128, shuffle=True)
net, optimizer, loader = accelerator.prepare(net, optimizer, loader)

step = 0
for _ in range(16):
    for batch in loader:
        a, b = net(torch.cat([batch + 0.3 * torch.randn_like(batch) for _ in range(2)])).chunk(2)
        loss = loss_of(a, b)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            accelerator.print(f"step {step}: loss {loss.item():.3f}")
        step += 1
