"""The patch embedding of a ViT as the linear layer that it is.

A convolution whose kernel is as large as its stride sees each pixel once: it is a linear layer over patches, and a
kernel for linear layers can run it.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from .bsr import BSRMatrix
from .kernels import cpu
from .linear import BlockSparseLinear


def is_patch_embedding(conv: nn.Module) -> bool:
    """Whether ``conv`` is an ``nn.Conv2d`` over patches: square kernels side by side, every channel in each."""
    return (
        type(conv) is nn.Conv2d
        and conv.kernel_size == conv.stride != (1, 1)
        and conv.kernel_size[0] == conv.kernel_size[1]
        and conv.padding in ((0, 0), "valid")
        and conv.dilation == (1, 1)
        and conv.groups == 1
    )


class PatchEmbedding(nn.Module):
    """``(N, channels, H, W)`` -> ``(N, out, H // patch, W // patch)`` through a linear layer over patches.

    The same as the convolution that it was made from, also where the patches do not cover the whole image, and of one
    image without a batch. The result lies in memory as in ``torch.channels_last``, each patch's outputs side by side:
    so it is made, and so a ViT reads it. A convolution's does for images that lie so.

    Args:
        linear: ``(out, channels * patch * patch)``.
        channels: of the images.
        patch_size: edge length of the square patches, in pixels.
    """

    def __init__(self, linear: nn.Module, channels: int, patch_size: int) -> None:
        super().__init__()
        self.linear, self.channels, self.patch_size = linear, channels, patch_size

    @classmethod
    def from_conv(
        cls, conv: nn.Conv2d, block_size: int, *, backend: str = "auto", preferred: str | None = None
    ) -> PatchEmbedding:
        """Convert ``conv``, for which ``is_patch_embedding`` holds; the bias is shared."""
        weight = BSRMatrix.from_dense(conv.weight.flatten(1), block_size)
        linear = BlockSparseLinear(weight, conv.bias, backend=backend, preferred=preferred)
        return cls(linear, conv.in_channels, conv.kernel_size[0]).train(conv.training)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        p = self.patch_size
        if images.ndim not in (3, 4) or images.shape[-3] != self.channels or min(images.shape[-2:]) < p:
            raise ValueError(
                f"the input has shape {tuple(images.shape)}; expected (N, {self.channels}, H, W), or one image without "
                f"N, of at least a patch of {p} x {p} pixels"
            )
        if images.ndim == 3:
            return self.forward(images.unsqueeze(0)).squeeze(0)
        rows, columns = images.shape[2] // p, images.shape[3] // p
        images = images[:, :, : rows * p, : columns * p]
        patches = images.reshape(images.shape[0], self.channels, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5)
        return self.linear(patches.flatten(3)).permute(0, 3, 1, 2)

    @property
    def weight(self) -> Tensor:
        """The convolution's ``(out, channels, patch, patch)``: a copy, for models that ask it for its dtype."""
        # transformers' CLIP, SigLIP and DINOv2 do, in every forward pass.
        return self.linear.bsr.to_dense().unflatten(1, (self.channels, self.patch_size, self.patch_size))

    def extra_repr(self) -> str:
        """Sizes, for ``repr``."""
        return f"channels={self.channels}, patch_size={self.patch_size}"


PATCHES = 14
"""A side of the image that ``beats_convolution`` measures with: that of ViT-B/16 at 224 pixels."""


def beats_convolution(out: int, channels: int, patch_size: int, dtype: torch.dtype, block_size: int) -> bool:
    """Whether the CPU kernel embeds one image's patches faster than PyTorch's convolution; as ``cpu.beats_dense``."""
    return _beats_convolution(out, channels, patch_size, dtype, block_size, torch.get_num_threads())


@cache
def _beats_convolution(
    out: int, channels: int, patch_size: int, dtype: torch.dtype, block_size: int, threads: int
) -> bool:
    if cpu.CPU.refusal(torch.device("cpu"), dtype, block_size) is not None:
        return False
    conv = nn.Conv2d(channels, out, patch_size, patch_size, dtype=dtype, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.fill_(0.01)
    embedding = PatchEmbedding.from_conv(conv, block_size, backend="cpu")
    images = torch.full((1, channels, PATCHES * patch_size, PATCHES * patch_size), 0.01, dtype=dtype, device="cpu")
    return cpu.beats(lambda: embedding(images), lambda: conv(images))
