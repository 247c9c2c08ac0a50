"""Several processes: torchrun --nproc-per-node 2 examples/distributed.py

group="world" makes the loss that of the whole batch, on every process the same. DistributedDataParallel averages the
gradients; there is nothing to scale.
"""

import torch
import torch.distributed as dist
from torch import nn

import tclr_kernels as tk

dist.init_process_group("gloo")  # "nccl" on GPUs
rank, ranks = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
samples = torch.randn(512, 32)
net = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 64))
model = nn.parallel.DistributedDataParallel(net)
loss_of = tk.NTXentLoss(temperature=0.1, group="world")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

for step in range(61):
    mine = samples[torch.randperm(512)[:128]].chunk(ranks)[rank]  # the same draw everywhere, a share for each
    a, b = model(torch.cat([mine + 0.3 * torch.randn_like(mine) for _ in range(2)])).chunk(2)
    loss = loss_of(a, b)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0 and rank == 0:
        print(f"step {step}: loss {loss.item():.3f}", flush=True)
dist.barrier()  # no process ends while another still waits for it
del model, loss, a, b, optimizer  # these refer to the group that is destroyed next
dist.destroy_process_group()
