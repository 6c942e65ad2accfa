"""Checkpoints of the format that SuperBlock published, made here: its masked layer, and a ViT full of them."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn


class ReferenceLinear(nn.Linear):
    """What the reference implementation puts in a linear layer's place: same parameters, same mask."""

    def __init__(self, linear: nn.Linear, sparsity: float, tile_size: int) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.load_state_dict(linear.state_dict())
        self.sparsity, self.tile_size = sparsity, tile_size
        self.scores = nn.Parameter(torch.empty([max(1, math.ceil(n / tile_size)) for n in self.weight.shape]))
        nn.init.kaiming_uniform_(self.scores, a=math.sqrt(5))
        self.shift = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)

    def masked_weight(self) -> torch.Tensor:
        k = 1 + round(0.01 * float(self.sparsity * 100) * (self.scores.numel() - 1))
        mask = torch.where(self.scores < self.scores.flatten().kthvalue(k).values, 0.0, 1.0)
        for dim, size in enumerate(self.weight.shape):
            mask = mask.repeat_interleave(self.tile_size, dim=dim).narrow(dim, 0, size)
        return (self.weight * self.scale + self.shift) * mask

    def forward(self, x):
        return nn.functional.linear(x, self.masked_weight(), self.bias)


def published(model: nn.Module, sparsity: float, tile_size: int) -> nn.Module:
    """Mask every linear layer of a ViT as the reference does it, ``out_proj`` (in vain) and head included."""
    for name, module in [*model.named_modules()]:
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, ReferenceLinear(module, sparsity, tile_size))
    return model.eval()


def write(state, folder: Path, name: str = "model_32.pth") -> Path:
    torch.save(state, folder / name)
    return folder / name
