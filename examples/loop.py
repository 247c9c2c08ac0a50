"""A plain training loop: SimCLR's NT-Xent on two noisy views of each sample."""

import torch
from torch import nn

import tclr_kernels as tk

torch.manual_seed(0)
samples = torch.randn(512, 32)
net = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 64))
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)

for step in range(61):
    batch = samples[torch.randperm(512)[:128]]
    a, b = (net(batch + 0.3 * torch.randn_like(batch)) for _ in range(2))  # the augmentation: noise
    loss = tk.nt_xent(a, b, temperature=0.1)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(f"step {step}: loss {loss.item():.3f}")
