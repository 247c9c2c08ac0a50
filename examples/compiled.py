"""torch.compile: the network and the loss in one graph, without a graph break."""

import torch
from torch import nn

import tclr_kernels as tk

torch.manual_seed(0)
samples = torch.randn(512, 32)
net = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 64))
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)


@torch.compile(fullgraph=True)
def loss_of(views):  # [2, N, 32]
    a, b = net(views)
    return tk.nt_xent(a, b, temperature=0.1)


for step in range(61):
    batch = samples[torch.randperm(512)[:128]]
    loss = loss_of(batch + 0.3 * torch.randn(2, *batch.shape))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(f"step {step}: loss {loss.item():.3f}")
