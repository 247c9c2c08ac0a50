"""SupCon: rows of one class are positives of each other. Then each sample's nearest neighbour predicts its class."""

import torch
import torch.nn.functional as F
from torch import nn

import tclr_kernels as tk

torch.manual_seed(0)
centres = torch.randn(10, 32)
labels = torch.randint(10, (512,))
samples = centres[labels] + 1.5 * torch.randn(512, 32)
net = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 64))
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
loss_of = tk.SupConLoss(0.1)

for step in range(61):
    chosen = torch.randperm(512)[:128]
    views = [net(samples[chosen] + 0.3 * torch.randn(128, 32)) for _ in range(2)]
    loss = loss_of(torch.cat(views), labels[chosen].repeat(2))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(f"step {step}: loss {loss.item():.3f}")

similar = F.normalize(net(samples)) @ F.normalize(net(samples)).T
nearest = similar.fill_diagonal_(-1).argmax(1)
print(f"nearest neighbour of the same class: {(labels[nearest] == labels).float().mean():.0%}")
