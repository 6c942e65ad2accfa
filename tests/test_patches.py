import pytest
import torch
from torch import nn

from blockvit.patches import PatchEmbedding, is_patch_embedding


@pytest.mark.parametrize("backend", ["gather", "cpu", "dense"])
@pytest.mark.parametrize("size", [(32, 32), (37, 50), (16, 16)])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_convolution(backend, size, bias):
    conv = nn.Conv2d(3, 40, 16, 16, bias=bias)
    embedding = PatchEmbedding.from_conv(conv, 32, backend=backend)
    images = torch.randn(2, 3, *size)
    with torch.inference_mode():
        torch.testing.assert_close(embedding(images), conv(images), rtol=1e-5, atol=1e-5)


def test_strides_of_images_do_not_matter():
    conv = nn.Conv2d(3, 32, 4, 4)
    embedding = PatchEmbedding.from_conv(conv, 16, backend="gather")
    images = torch.randn(2, 3, 16, 8).contiguous(memory_format=torch.channels_last).transpose(2, 3)
    torch.testing.assert_close(embedding(images), conv(images), rtol=1e-5, atol=1e-5)


def test_an_empty_batch_gives_an_empty_result():
    conv = nn.Conv2d(3, 32, 4, 4)
    assert PatchEmbedding.from_conv(conv, 16)(torch.empty(0, 3, 8, 8)).shape == (0, 32, 2, 2)


def test_zero_blocks_are_left_out_and_the_bias_is_shared():
    conv = nn.Conv2d(3, 32, 4, 4)
    conv.weight.data[:16] = 0
    embedding = PatchEmbedding.from_conv(conv, 16, backend="gather")
    assert embedding.linear.bsr.sparsity == 0.5 and embedding.linear.bias is conv.bias


@pytest.mark.parametrize("channels_kept", [32, 16])
def test_its_weight_is_the_convolutions(channels_kept):
    conv = nn.Conv2d(3, 32, 5, 5, dtype=torch.bfloat16)
    conv.weight.data[channels_kept:] = 0
    assert torch.equal(PatchEmbedding.from_conv(conv, 16, backend="gather").weight, conv.weight)


class AsksForItsDtype(nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.embedding = embedding

    def forward(self, images):
        return self.embedding(images.to(self.embedding.weight.dtype))


def test_a_model_that_asks_for_its_dtype_is_traced_without_a_graph_break():
    torch._dynamo.reset()  # what other tests compiled counts against its limit
    conv = nn.Conv2d(3, 32, 4, 4).requires_grad_(False)
    model = AsksForItsDtype(PatchEmbedding.from_conv(conv, 16, backend="gather"))
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), conv(images.float()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "module, is_one",
    [
        (nn.Conv2d(3, 8, 4, 4), True),
        (nn.Conv2d(3, 8, 4, 4, padding="valid"), True),
        (nn.Conv2d(3, 8, 4, 2), False),
        (nn.Conv2d(3, 8, 1), False),
        (nn.Conv2d(3, 8, (4, 2), (4, 2)), False),
        (nn.Conv2d(3, 8, 4, 4, padding=1), False),
        (nn.Conv2d(3, 8, 4, 4, dilation=2), False),
        (nn.Conv2d(4, 8, 4, 4, groups=2), False),
        (nn.ConvTranspose2d(3, 8, 4, 4), False),
        (nn.Linear(3, 8), False),
    ],
    ids=str,
)
def test_which_convolutions_are_patch_embeddings(module, is_one):
    assert is_patch_embedding(module) is is_one


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (4, 8, 8), (3, 8), (2, 3, 3, 8), (3, 8, 3), (0, 3, 0, 0)])
def test_wrong_images_are_named_where_the_convolution_refuses_them(shape):
    conv = nn.Conv2d(3, 32, 4, 4)
    with pytest.raises(RuntimeError):
        conv(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"expected \(N, 3, H, W\), or one image .* at least a patch of 4 x 4 pixels"):
        PatchEmbedding.from_conv(conv, 16)(torch.zeros(shape))


def test_one_image_needs_no_batch():
    conv, image = nn.Conv2d(3, 32, 4, 4), torch.randn(3, 8, 13)
    torch.testing.assert_close(PatchEmbedding.from_conv(conv, 16)(image), conv(image), rtol=1e-5, atol=1e-5)


def test_is_traced_without_a_graph_break():
    torch._dynamo.reset()  # what other tests compiled counts against its limit
    conv = nn.Conv2d(3, 32, 4, 4).requires_grad_(False)
    embedding = torch.compile(PatchEmbedding.from_conv(conv, 16, backend="gather"), backend="eager", fullgraph=True)
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(embedding(images), conv(images), rtol=1e-5, atol=1e-5)


def test_an_exported_program_takes_any_batch():
    conv = nn.Conv2d(3, 32, 4, 4).requires_grad_(False)
    embedding, images = PatchEmbedding.from_conv(conv, 16, backend="dense"), torch.randn(2, 3, 8, 8)
    exported = torch.export.export(embedding, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    more = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(exported.module()(more), conv(more), rtol=1e-5, atol=1e-5)
