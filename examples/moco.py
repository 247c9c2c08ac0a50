"""MoCo: keys come from a slowly moving copy of the network, negatives from a queue of earlier keys."""

import copy

import torch
from torch import nn

import tclr_kernels as tk

torch.manual_seed(0)
samples = torch.randn(512, 32)
net = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 64))
slow = copy.deepcopy(net).requires_grad_(False)
queue = tk.NegativeQueue(2048, 64)
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)

for step in range(61):
    batch = samples[torch.randperm(512)[:128]]
    query = net(batch + 0.3 * torch.randn_like(batch))
    with torch.no_grad():
        for moving, p in zip(slow.parameters(), net.parameters(), strict=True):
            moving.lerp_(p, 0.01)
        key = slow(batch + 0.3 * torch.randn_like(batch))
    loss = tk.info_nce(query, key, temperature=0.1, negatives=queue, in_batch=False)
    queue.enqueue(key)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(f"step {step}: loss {loss.item():.3f}")
