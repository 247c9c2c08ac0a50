"""CLIP: two networks, one for each kind of input, and a logit scale that is learnt with them."""

import math

import torch
from torch import nn

import tclr_kernels as tk

torch.manual_seed(0)
images, texts = torch.randn(512, 64), torch.randn(64, 32)
texts = images @ texts / 8  # a text says something about its image

image_net, text_net = nn.Linear(64, 48), nn.Linear(32, 48)
log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP learns the logarithm
optimizer = torch.optim.AdamW([*image_net.parameters(), *text_net.parameters(), log_scale], lr=1e-3)

for step in range(61):
    chosen = torch.randperm(512)[:128]
    scale = log_scale.exp().clamp(max=100)
    loss = tk.clip_loss(image_net(images[chosen]), text_net(texts[chosen]), logit_scale=scale)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(f"step {step}: loss {loss.item():.3f}, logit scale {scale.item():.2f}")
