"""Gradients of our block-sparse linear kernels: on a GPU, and in Triton's interpreter everywhere."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from triton_interpreter import INTERPRETED, every_device, test_file_in_the_interpreter

from blockvit import BlockSparseLinear, BSRMatrix, SupermaskLinear
from blockvit.bsr import BlockPattern, block_view
from blockvit.sparse_training import train_sparse

pytest.importorskip("triton")
from blockvit.kernels.triton import Triton, autograd, gradients, parameters
from blockvit.kernels.triton.offline import SHARED_BYTES, compile_for

# Errors of sums over up to some thousand tokens, relative to the largest result.
TOLERANCE = {
    (torch.float32, "ieee"): 1e-6,
    (torch.float32, "tf32x3"): 1e-6,
    (torch.float32, "tf32"): 2e-3,
    (torch.bfloat16, "ieee"): 8e-3 if INTERPRETED else 4e-3,  # the interpreter truncates where a GPU rounds
    (torch.float16, "ieee"): 1e-3,
}
CASES = [
    *((32, *kind) for kind in TOLERANCE),
    (16, torch.float32, "tf32x3"),
    (16, torch.bfloat16, "ieee"),
    (64, torch.float32, "ieee"),
    (128, torch.float16, "ieee"),
]


def test_in_the_interpreter():
    test_file_in_the_interpreter(__file__)


def random_pattern(rows: int, cols: int, kept: int) -> BlockPattern:
    """The first row of blocks is empty."""
    mask = torch.zeros(rows * cols, dtype=torch.bool)
    mask[cols + torch.randperm((rows - 1) * cols)[:kept]] = True
    return BlockPattern.of_mask(mask.view(rows, cols), kept)


def on(device: str, pattern: BlockPattern) -> BlockPattern:
    return BlockPattern(*(indices.to(device) for indices in pattern))


def dense(values: torch.Tensor, pattern: BlockPattern) -> torch.Tensor:
    shape = (len(pattern.crow) - 1) * values.shape[1], (len(pattern.transposed_crow) - 1) * values.shape[1]
    return BSRMatrix(pattern.crow, pattern.col, values, shape).to_dense()


def blocks_of(matrix: torch.Tensor, pattern: BlockPattern, block_size: int) -> torch.Tensor:
    return block_view(matrix, block_size).transpose(1, 2)[pattern.row.long(), pattern.col.long()]


def assert_near(actual, expected, dtype, precision):
    assert actual.dtype == dtype and actual.shape == expected.shape
    error = (actual.detach().double().cpu() - expected).abs().max() / expected.abs().max().clamp_min(1)
    assert error <= TOLERANCE[dtype, precision], f"relative error {error:.1e}"


@every_device
@pytest.mark.parametrize("block_size, dtype, precision", CASES, ids=lambda v: str(v).removeprefix("torch."))
def test_gradients_equal_those_of_the_dense_product(device, block_size, dtype, precision, monkeypatch):
    for tokens, (rows, cols, kept) in [(1, (3, 2, 3)), (70, (2, 3, 2))]:  # more rows than columns, and fewer
        pattern = random_pattern(rows, cols, kept)
        leaves = [
            torch.randn(tokens, cols * block_size).to(dtype),
            torch.randn(kept, block_size, block_size).to(dtype),
            torch.randn(rows * block_size).to(dtype),
        ]
        grad = torch.randn(tokens, rows * block_size).to(dtype)
        x, values, bias = (leaf.clone().to(device).requires_grad_() for leaf in leaves)
        monkeypatch.setattr(parameters, "precision", lambda dtype: precision)
        y = autograd.linear(x, values, bias, on(device, pattern))
        y.backward(grad.to(device))

        wide = [leaf.double().requires_grad_() for leaf in leaves]
        expected = F.linear(wide[0], dense(wide[1], pattern), wide[2])
        expected.backward(grad.double())
        assert_near(y, expected.detach(), dtype, precision)
        for ours, exact in zip((x, values, bias), wide, strict=True):
            assert_near(ours.grad, exact.grad, dtype, precision)


@every_device
def test_any_strides_and_tokens_split_between_programs(device):
    tokens, b, pattern = 2 * gradients.TOKENS + 77, 16, random_pattern(3, 2, 3)
    grad, x = torch.randn(3 * b, tokens).t(), torch.randn(tokens, 4 * b)[:, ::2]
    turned = BlockPattern.of(pattern.transposed_crow, pattern.transposed_col, 3)
    for g, v, where in [(grad, x, pattern), (x, grad, turned)]:
        sampled = gradients.weight_gradient(g.to(device), v.to(device), on(device, where), b, precision="ieee")
        expected = blocks_of(g.double().t() @ v.double(), where, b)
        assert_near(sampled, expected, torch.float32, "ieee")


@every_device
def test_longer_rows_than_a_program_takes_at_once(device):
    b, pattern = 16, random_pattern(3, 20, 35)
    grad, x = torch.randn(40, 3 * b), torch.randn(40, 20 * b)
    sampled = gradients.weight_gradient(grad.to(device), x.to(device), on(device, pattern), b, precision="ieee")
    assert_near(sampled, blocks_of(grad.double().t() @ x.double(), pattern, b), torch.float32, "ieee")


@every_device
def test_blocks_wider_than_a_tile_are_left_to_pytorch(device):
    b, pattern = 256, random_pattern(2, 2, 1)
    grad, x = torch.randn(40, 2 * b), torch.randn(40, 2 * b)
    there = on(device, pattern)
    with pytest.raises(ValueError, match="block_size is 256; expected at most WIDTH, which is 128"):
        gradients.weight_gradient(grad.to(device), x.to(device), there, b, precision="ieee")
    expected = blocks_of(grad.double().t() @ x.double(), pattern, b)
    sampled = Triton.weight_gradient(grad.to(device), x.to(device), there, b)
    assert_near(sampled, expected, torch.float32, "tf32x3")

    values = torch.randn(1, b, b, device=device, requires_grad=True)
    autograd.linear(x.to(device), values, None, there).backward(grad.to(device))
    assert_near(values.grad, expected, torch.float32, "tf32x3")


@every_device
def test_a_weight_without_blocks(device):
    b, pattern = 16, on(device, random_pattern(2, 3, 0))
    x = torch.randn(5, 3 * b, device=device, requires_grad=True)
    values = torch.zeros(0, b, b, device=device, requires_grad=True)
    bias = torch.randn(2 * b, device=device)
    y = autograd.linear(x, values, bias, pattern)
    assert torch.equal(y, bias.expand(5, -1))
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x)) and values.grad.shape == (0, b, b)


@every_device
def test_the_operators_pass_opcheck(device):
    pattern = on(device, random_pattern(3, 2, 3))
    x, grad = torch.randn(20, 32, device=device), torch.randn(20, 48, device=device)
    values, bias = torch.randn(3, 16, 16, device=device), torch.randn(48, device=device)
    operators = torch.ops.blockvit
    for operator, arguments in (
        (operators.triton_product, (x, pattern.crow, pattern.col, values, None, bias)),
        (
            operators.triton_product,
            (grad, pattern.transposed_crow, pattern.transposed_col, values, pattern.order, None),
        ),
        (operators.triton_sampled, (grad, x, *pattern, 16)),
    ):
        # Without what needs gradients: they are those of ``autograd.linear``, tested below.
        torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))


# --- the layer -------------------------------------------------------------------------------------------------------


def sparse_layer(device: str, activation: str | None = None) -> tuple[BlockSparseLinear, torch.Tensor]:
    """A layer whose sizes are no multiples of the block size, and its dense weight in float64."""
    linear = torch.nn.Linear(70, 90)
    mask = torch.rand(6, 5) < 0.4
    with torch.no_grad():
        linear.weight *= mask.repeat_interleave(16, 0).repeat_interleave(16, 1)[:90, :70]
    weight = linear.weight.detach().double().requires_grad_()
    layer = BlockSparseLinear.from_dense(linear.to(device), 16, backend="triton", activation=activation)
    return layer, weight


ACTIVATIONS = {None: lambda y: y, "gelu": F.gelu, "gelu_tanh": lambda y: F.gelu(y, approximate="tanh")}


@every_device
@pytest.mark.parametrize(
    "values_train, activation, compiled",
    [(True, None, False), (False, "gelu", False), (True, "gelu_tanh", True)],
)
def test_the_layer_is_differentiable(device, values_train, activation, compiled):
    layer, weight = sparse_layer(device, activation)
    layer.values.requires_grad_(values_train)
    call = torch.compile(layer, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    x, grad = torch.randn(3, 7, 70), torch.randn(3, 7, 90)
    ours = x.clone().to(device).requires_grad_()
    y = (call if compiled else layer)(ours)
    y.backward(grad.to(device))

    exact, bias = x.double().requires_grad_(), layer.bias.detach().double().cpu().requires_grad_()
    expected = ACTIVATIONS[activation](F.linear(exact, weight, bias))
    expected.backward(grad.double())
    assert_near(y, expected.detach(), torch.float32, "tf32x3")
    assert_near(ours.grad, exact.grad, torch.float32, "tf32x3")
    assert_near(layer.bias.grad, bias.grad, torch.float32, "tf32x3")
    assert (layer.values.grad is not None) == values_train
    if values_train:
        pattern = BlockPattern.of(layer.crow_indices.cpu(), layer.col_indices.cpu(), 5)
        inside = F.pad(weight.grad, (0, 10, 0, 6))
        assert_near(layer.values.grad, blocks_of(inside, pattern, 16), torch.float32, "tf32x3")


@every_device
def test_trained_values_count_at_once(device):
    layer, _ = sparse_layer(device)
    layer.values.requires_grad_(True)
    x = torch.randn(7, 70, device=device)
    with torch.no_grad():
        before = layer(x)
        layer.values *= 2
        torch.testing.assert_close(layer(x) - layer.bias, 2 * (before - layer.bias), rtol=1e-4, atol=1e-5)


@every_device
def test_supermasks_train_through_it(device):
    torch.manual_seed(0)
    masked = torch.nn.Sequential(SupermaskLinear(70, 90, sparsity=0.7, block_size=16)).to(device)
    sparse = copy.deepcopy(masked)
    optimizer = torch.optim.SGD(sparse.parameters(), 0.1)
    train_sparse(sparse, optimizer, refresh_every=2, weight_grad="kept", backend="triton")
    x = torch.randn(20, 70, device=device)
    for everywhere in (True, False):
        for net in (sparse, masked):
            net.zero_grad()
            net(x).sin().sum().backward()
        mask = torch.ones_like(masked[0].scores) if everywhere else masked[0].block_mask()
        for ours, exact in zip(sparse.parameters(), masked.parameters(), strict=True):
            expected = exact.grad * mask if exact is masked[0].scores else exact.grad
            torch.testing.assert_close(ours.grad, expected, rtol=1e-4, atol=1e-4)
        sparse[0].stepped()


@pytest.mark.gpu
def test_equal_to_the_bit_again_and_again():
    pattern = on("cuda", random_pattern(24, 96, 230))
    grad, x = torch.randn(50432, 24 * 32, device="cuda"), torch.randn(50432, 96 * 32, device="cuda")
    first, *others = (gradients.weight_gradient(grad, x, pattern, 32, precision="tf32x3") for _ in range(5))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.gpu
def test_two_streams_do_not_disturb_each_other():
    layers = [sparse_layer("cuda")[0] for _ in range(2)]
    x = [torch.randn(4096, 70, device="cuda", requires_grad=True) for _ in layers]

    def gradient(layer, x):
        layer.values.requires_grad_(True)
        return torch.autograd.grad(layer(x).square().sum(), [x, layer.values, layer.bias])

    expected = [gradient(*pair) for pair in zip(layers, x, strict=True)]
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in layers], [None, None]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[i] = gradient(layers[i], x[i])
    torch.cuda.synchronize()
    for ours, alone in zip(found, expected, strict=True):
        assert all(map(torch.equal, ours, alone))


# --- what the compiler makes of it, without a GPU --------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled here")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    "block_size, dtype, element, precision",
    [(16, torch.bfloat16, "bf16", "ieee"), (32, torch.float32, "fp32", "tf32x3"), (64, torch.float16, "fp16", "ieee")],
    ids=str,
)
def test_compiles_to_tensor_core_code_without_spills(arch, block_size, dtype, element, precision):
    parameters = gradients.default_parameters(block_size, 10, dtype)
    report = compile_for(
        gradients._sampled_kernel,
        arch,
        {"lines_ptr": element, "others_ptr": element, "crow_ptr": "i32", "col_ptr": "i32", "out_ptr": "fp32"},
        {
            "tokens": 50432,
            "tokens_a_split": 6304,
            "block_rows": 24,
            "parts": 3,
            "stride_lt": 768,
            "stride_li": 1,
            "stride_ot": 3072,
            "stride_oi": 1,
            "stride_split": 230 * block_size**2,
        },
        {
            "order_ptr": None,
            "B": block_size,
            "TRANSPOSED": False,
            "PRECISION": precision,
            "WIDTH": parameters["WIDTH"],
            "BLOCK_T": parameters["BLOCK_T"],
        },
        num_warps=parameters["num_warps"],
        num_stages=parameters["num_stages"],
    )
    assert report.spills <= 8  # bytes a thread
    assert report.shared <= SHARED_BYTES[arch] // 2  # two programs at once, one computes while the other waits
    assert report.wgmma if arch == 90 else report.tensor_cores
