"""The swap that the README shows, run: the dense PyTorch NT-Xent and this library's, value and gradients."""

import torch
import torch.nn.functional as F

import tclr_kernels as tk


def nt_xent(a, b, temperature):
    z = F.normalize(torch.cat([a, b]))
    S = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    N = len(a)
    return F.cross_entropy(S, torch.cat([torch.arange(N, 2 * N), torch.arange(N)]))


torch.manual_seed(0)
a, b = (x.requires_grad_() for x in torch.randn(2, 512, 128).unbind())
before = nt_xent(a, b, temperature=0.1)
after = tk.nt_xent(a, b, temperature=0.1)
apart = [x - y for x, y in zip(torch.autograd.grad(before, (a, b)), torch.autograd.grad(after, (a, b)), strict=True)]
print(f"loss, dense:        {before:.6f}")
print(f"loss, tclr_kernels: {after:.6f}")
print(f"gradients differ by {max(float(d.abs().max()) for d in apart):.0e} at most")
