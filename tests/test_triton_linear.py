"""Our block-sparse linear kernel: on a GPU, and in Triton's interpreter everywhere; how weights are packed for it."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from triton_interpreter import INTERPRETED, every_device, slow, test_file_in_the_interpreter

from blockvit import BackendUnavailableError, BlockSparseLinear, BSRMatrix, backends
from blockvit.convert import random_block_mask_
from blockvit.kernels import resolve, tuning
from blockvit.kernels.triton import packing, parameters

pytest.importorskip("triton")
from blockvit.kernels.triton import linear

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ACTIVATIONS = {None: lambda y: y, "gelu": F.gelu, "gelu_tanh": lambda y: F.gelu(y, approximate="tanh")}

# What the products may add, relative to the sum of their absolute values: roundings of sums of some hundred float32
# numbers; TF32 cuts off 13 bits of both operands.
OF_PRODUCTS = {"ieee": 2**-20, "tf32x3": 2**-20, "tf32": 2**-9}
# Rounding the result, relative to it; the interpreter cuts bfloat16 off where a GPU rounds.
OF_RESULT = {torch.float32: 2**-20, torch.bfloat16: 2 ** (-7 if INTERPRETED else -8), torch.float16: 2**-10}
CLASSES = [(torch.float32, precision) for precision in OF_PRODUCTS] + [
    (torch.bfloat16, "ieee"),
    (torch.float16, "ieee"),
]

every_class = pytest.mark.parametrize("dtype, precision", CLASSES, ids=lambda v: str(v).removeprefix("torch."))


@pytest.fixture(autouse=True)
def nothing_tuned(tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKVIT_TUNED", str(tmp_path))
    parameters.linear.cache_clear()
    yield
    parameters.linear.cache_clear()


def test_in_the_interpreter():
    test_file_in_the_interpreter(__file__)


def random_matrix(
    block_size: int, dtype: torch.dtype = torch.float32, rows: int = 3, cols: int = 4, kept: float = 0.5
) -> BSRMatrix:
    """Random blocks; the first block row is empty, the last full if any block is kept."""
    mask = torch.rand(rows, cols) < kept
    mask[0], mask[-1] = False, kept > 0
    dense = torch.randn(rows * block_size, cols * block_size)
    dense *= mask.repeat_interleave(block_size, 0).repeat_interleave(block_size, 1)
    return BSRMatrix.from_dense(dense.to(dtype), block_size)


def launch(device, x, weight, bias=None, activation=None, *, group=1, precision="ieee", **options) -> torch.Tensor:
    packed = packing.pack(weight, group)
    parts = [None if t is None else t.to(device) for t in (packed.crow, packed.col, packed.values, bias)]
    y = linear.launch(
        x if x.device.type == device else x.to(device),
        *parts,
        activation,
        precision=precision,
        rows=None if packed.rows is None else packed.rows.to(device),
        out_features=weight.padded_shape[0],
        **options,
    )
    return y.cpu()


def assert_right(y, x, weight, bias=None, activation=None, precision="ieee") -> None:
    """Within the bounds of the precision class, number by number, of the result in float64."""
    x, w = x.cpu().double(), weight.to_dense(padded=True).cpu().double()
    bias = torch.zeros(len(w)).double() if bias is None else bias.cpu().double()
    expected = ACTIVATIONS[activation](F.linear(x, w, bias))
    # GELU's slope is at most 1.13; of itself it adds an error near 1e-6 for numbers up to 8.
    allowed = 1.13 * OF_PRODUCTS[precision] * (x.abs() @ w.abs().t() + bias.abs())
    allowed += OF_RESULT[y.dtype] * expected.abs() + (1e-6 if activation else 1e-30)
    assert y.dtype == weight.values.dtype and y.shape == expected.shape
    excess = ((y.double() - expected).abs() / allowed).max()
    assert excess <= 1, f"{excess:.2f} times the error allowed"


@pytest.fixture
def poisoned(monkeypatch):
    """New tensors are full of NaN instead of whatever lay there."""
    new_empty = torch.Tensor.new_empty

    def full_of_nan(self, *size, **options):
        new = new_empty(self, *size, **options)
        return new.fill_(float("nan")) if new.is_floating_point() else new

    monkeypatch.setattr(torch.Tensor, "new_empty", full_of_nan)


# --- the kernel ------------------------------------------------------------------------------------------------------


@every_device
@every_class
@pytest.mark.parametrize("block_size", [16, slow(32), 64, slow(128)])
def test_result_is_within_the_bounds_of_its_precision_class(device, block_size, dtype, precision, poisoned):
    weight = random_matrix(block_size, dtype)
    bias, x = torch.randn(weight.shape[0]), torch.randn(37, weight.shape[1]).to(dtype)
    y = launch(device, x, weight, bias, "gelu", precision=precision)
    assert_right(y, x, weight, bias, "gelu", precision)


@every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [slow(False), True])
def test_epilogues(device, dtype, activation, bias):
    weight = random_matrix(16, dtype)
    bias = torch.linspace(-8, 8, weight.shape[0]) if bias else None
    x = torch.randn(20, weight.shape[1]).to(dtype)
    y = launch(device, x, weight, bias, activation)
    assert_right(y, x, weight, bias, activation)


@every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gelu_of_every_size(device, dtype, activation):
    weight = BSRMatrix.from_dense(torch.eye(16, dtype=dtype), 16)
    y = torch.cat([torch.linspace(-12, 12, 1600), torch.tensor([0.0, -0.0, 6.0, -6.0] * 4)]).to(dtype).view(-1, 16)
    result = launch(device, y, weight, None, activation)
    expected = ACTIVATIONS[activation](y.double())
    eps = torch.finfo(dtype).eps
    assert ((result.double() - expected).abs() <= 2 * eps * expected.abs() + 5e-7).all()


@every_device
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gelu_of_nan_and_infinity(device, activation):
    weight = BSRMatrix.from_dense(torch.zeros(16, 16), 16)
    bias = torch.zeros(16)
    bias[:3] = torch.tensor([float("nan"), float("inf"), 300.0])
    y = launch(device, torch.zeros(1, 16), weight, bias, activation)[0]
    assert y[0].isnan() and y[1] == float("inf") and y[2] == 300.0
    assert not y[3:].any()


def layouts(tokens: int, features: int) -> dict[str, torch.Tensor]:
    return {
        "contiguous": torch.randn(tokens, features),
        "transposed": torch.randn(features, tokens).t(),
        "every other": torch.randn(tokens, 2 * features)[:, ::2],
        "one token for all": torch.randn(1, features).expand(tokens, features),
        "every other token": torch.randn(2 * tokens, features)[::2],
        "no multiple of 16 bytes": torch.randn(tokens, features + 3)[:, 3:],
    }


@every_device
@pytest.mark.parametrize("layout", layouts(1, 1))
@pytest.mark.parametrize("block_size", [16, slow(64)])
def test_reads_any_strides_in_place(device, block_size, layout):
    weight = random_matrix(block_size)
    x = layouts(37, weight.shape[1])[layout]
    assert_right(launch(device, x, weight), x, weight)


@every_device
@pytest.mark.parametrize("tokens", [1, 16, 127, 129])
def test_any_number_of_tokens_and_every_number_written(device, tokens, poisoned):
    weight = random_matrix(16)
    x = torch.randn(tokens, weight.shape[1])
    assert_right(launch(device, x, weight), x, weight)


@every_device
@pytest.mark.parametrize("group", [1, 2])
def test_no_blocks_at_all_give_the_bias(device, group, poisoned):
    weight = random_matrix(16, kept=0.0)
    bias, x = torch.randn(weight.shape[0]), torch.randn(5, weight.shape[1])
    for activation, function in ACTIVATIONS.items():
        y = launch(device, x, weight, bias, activation, group=group)
        torch.testing.assert_close(y, function(bias).expand(5, -1), rtol=1e-5, atol=1e-6)
    assert not launch(device, x, weight, group=group).any()


@every_device
@pytest.mark.parametrize("block_size, group", [(16, 2), (16, 8), (32, 2), (64, 2)])
@pytest.mark.parametrize("rows", [5, slow(8)])
def test_groups_of_block_rows(device, block_size, group, rows, poisoned):
    weight = random_matrix(block_size, torch.float16, rows=rows)
    bias, x = torch.randn(weight.shape[0]), torch.randn(20, weight.shape[1]).half()
    assert packing.pack(weight, group).values.shape[1] > block_size
    assert_right(launch(device, x, weight, bias, "gelu", group=group), x, weight, bias, "gelu")


@every_device
@pytest.mark.parametrize(
    "block_m, block_n, block_k",
    [(16, 32, 16), (32, 64, 32), (64, 16, 64), (128, 64, 32), (16, 32, 256)],
)
@pytest.mark.parametrize("block_size, group", [(16, 4), slow(64, 1)])
def test_every_tile_gives_the_same(device, block_size, group, block_m, block_n, block_k):
    weight = random_matrix(block_size, torch.float16)
    x = torch.randn(40, weight.shape[1]).half()
    sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": 4, "num_stages": 2}
    assert_right(launch(device, x, weight, group=group, parameters=sizes), x, weight)


@every_device
@pytest.mark.parametrize("block_size", [16, 64])
def test_multiplies_with_the_transposed_matrix_without_a_copy(device, block_size):
    w = random_matrix(block_size)
    rows = w.block_shape[0]
    t = BSRMatrix.from_dense(w.to_dense().t().contiguous(), block_size)
    row = torch.repeat_interleave(torch.arange(rows), w.crow_indices.long().diff())
    order = (w.col_indices.long() * rows + row).argsort().int()
    assert torch.equal(w.values[order.long()].transpose(1, 2), t.values)
    x = torch.randn(w.shape[0], 50).t()
    parts = [v.to(device) for v in (x, t.crow_indices, t.col_indices, w.values)]
    y = linear.launch(*parts, precision="ieee", order=order.to(device))
    assert_right(y.cpu(), x, t)


@every_device
def test_a_nan_stays_in_its_token_and_in_the_groups_that_read_it(device):
    dense = torch.zeros(32, 32)
    dense[:16, :16], dense[16:, 16:] = 1, 1
    x = torch.ones(3, 32)
    x[1, 2] = float("nan")
    y = launch(device, x, BSRMatrix.from_dense(dense, 16))
    assert y[1, :16].isnan().all()
    assert (y[1, 16:] == 16).all() and (y[[0, 2]] == 16).all()


# --- the backend -----------------------------------------------------------------------------------------------------


def layer(block_size=16, shape=(40, 70), activation="gelu", dtype=torch.float32, device="cpu", kept=0.4):
    """A layer whose sizes are no multiples of the block, the last block row empty; and the dense one that it equals."""
    dense = torch.nn.Linear(shape[1], shape[0])
    mask = torch.rand(-(-shape[0] // block_size), -(-shape[1] // block_size)) < kept
    mask[-1] = False
    elements = mask.repeat_interleave(block_size, 0).repeat_interleave(block_size, 1)[: shape[0], : shape[1]]
    with torch.no_grad():
        dense.weight.normal_().mul_(elements)
    dense = dense.to(device, dtype)
    return BlockSparseLinear.from_dense(dense, block_size, backend="triton", activation=activation), dense


@every_device
def test_the_head_of_1000_classes(device):
    sparse, dense = layer(32, (1000, 40), None, device=device)
    x = torch.randn(2, 3, 40, device=device)
    assert sparse(x).shape == (2, 3, 1000)
    torch.testing.assert_close(sparse(x), dense(x), rtol=1e-4, atol=1e-4)


@every_device
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_input_and_bias(device, activation):
    sparse, dense = layer(activation=activation, device=device)
    assert sparse._packed_values.shape[1] > 16, "in groups"
    x = torch.randn(9, 70, device=device, requires_grad=True)
    y, expected = sparse(x), ACTIVATIONS[activation](dense(x))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    ours, theirs = (torch.autograd.grad(out.square().sum(), [x, dense.bias]) for out in (y, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@every_device
def test_compiles_without_graph_breaks_for_any_number_of_tokens(device):
    torch._dynamo.reset()
    sparse, _ = layer(device=device)
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (4, 9):
        x = torch.randn(tokens, 70, device=device, requires_grad=True)
        y, expected = compiled(x), sparse(x)
        torch.testing.assert_close(y, expected)
        ours, theirs = (torch.autograd.grad(out.square().sum(), [x, sparse.bias]) for out in (y, expected))
        torch.testing.assert_close(ours, theirs)


@every_device
@pytest.mark.parametrize("group", [1, 2])
def test_the_operator_passes_opcheck(device, group):
    weight = random_matrix(16)
    packed = packing.pack(weight, group)
    parts = [packed.crow, packed.col, packed.values, packed.rows, torch.randn(weight.shape[0])]
    parts = [None if t is None else t.to(device) for t in parts]
    x = torch.randn(5, weight.shape[1], device=device)
    arguments = (x, *parts, weight.padded_shape[0], weight.nnz, "gelu")
    torch.library.opcheck(torch.ops.blockvit.triton_linear.default, arguments)


@every_device
def test_tf32_where_the_user_allows_it_and_only_there(device, monkeypatch):
    asked = []
    monkeypatch.setattr(linear, "launch", lambda x, *_, precision, **__: asked.append(precision) or x.new_zeros(3, 48))
    sparse, _ = layer(device=device)
    before = torch.get_float32_matmul_precision()
    for setting in ("highest", "high"):
        torch.set_float32_matmul_precision(setting)
        sparse(torch.randn(3, 70, device=device))
    torch.set_float32_matmul_precision(before)
    assert asked == ["tf32x3", "tf32"]


@every_device
def test_tuned_groups_and_parameters_are_used(device, monkeypatch):
    name = tuning.device_name(torch.device(device, 0) if device == "cuda" else CPU)
    sparse, dense = layer(device=device, activation=None)
    nnz, used = sparse.values.shape[0], []
    key = tuning.key(48, 80, 3, 16, torch.float32, nnz, "tf32x3")
    tiles = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 32, "num_warps": 2, "num_stages": 1}
    tuning.store(name, "triton", key, {"GROUP": 4, **tiles}, ms=1.0, seconds=1.0)
    sparse._pack()
    assert sparse._packed_values.shape[1] == 64
    kernel = linear._linear_kernel

    class Recorded:
        def __getitem__(self, grid):
            return lambda *a, **options: used.append(options) or kernel[grid](*a, **options)

    monkeypatch.setattr(linear, "_linear_kernel", Recorded())
    x = torch.randn(3, 70, device=device)
    torch.testing.assert_close(sparse(x), dense(x), rtol=1e-4, atol=1e-4)
    assert len(used) == 1 and tiles.items() <= used[0].items()


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_with_inductor(dtype):
    torch._dynamo.reset()
    sparse, _ = layer(32, (300, 400), dtype=dtype, device=CUDA)
    compiled = torch.compile(sparse, fullgraph=True)
    for shape in [(2, 50, 400), (3, 50, 400), (64, 400)]:
        x = torch.randn(*shape, device=CUDA, dtype=dtype)
        with torch.no_grad():
            assert torch.equal(compiled(x), sparse(x))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replays_as_a_cuda_graph_with_fresh_inputs(dtype):
    sparse, _ = layer(16, (300, 400), dtype=dtype, device=CUDA)
    x = torch.randn(100, 400, device=CUDA, dtype=dtype)
    with torch.no_grad():
        sparse(x)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = sparse(x)
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            y.fill_(float("nan"))
            graph.replay()
            assert torch.equal(y, sparse(x))


@pytest.mark.gpu
def test_runs_on_the_stream_of_its_caller():
    sparse, _ = layer(32, (2048, 2048), dtype=torch.bfloat16, device=CUDA)
    inputs = [torch.randn(4096, 2048, device=CUDA, dtype=torch.bfloat16) for _ in range(2)]
    with torch.no_grad():
        expected = [sparse(x) for x in inputs]
        torch.cuda.synchronize()
        results, streams = [], [torch.cuda.Stream() for _ in inputs]
        for x, stream in zip(inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(20_000_000)  # what is launched elsewhere would run before the copy below
                fresh = torch.zeros_like(x).copy_(x)
                results.append(sparse(fresh))
    torch.cuda.synchronize()
    for y, right in zip(results, expected, strict=True):
        assert torch.equal(y, right)


@pytest.mark.gpu
def test_does_not_wait_for_the_device():
    sparse, _ = layer(32, (256, 256), dtype=torch.bfloat16, device=CUDA)
    x = torch.randn(64, 256, device=CUDA, dtype=torch.bfloat16)
    with torch.no_grad():
        sparse(x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            sparse(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True])
def test_more_numbers_than_32_bits_can_count(transposed):
    weight = random_matrix(64, torch.bfloat16, rows=12, cols=4)
    tokens = 2**31 // weight.shape[0] + 300  # the result's offsets exceed 2^31, those of x do by bytes
    x = torch.zeros(tokens, weight.shape[1], device=CUDA, dtype=torch.bfloat16)
    x = torch.zeros(*x.shape[::-1], device=CUDA, dtype=torch.bfloat16).t() if transposed else x
    x[-300:].normal_()
    parts = [t.to(CUDA) for t in (weight.crow_indices, weight.col_indices, weight.values)]
    y = linear.launch(x, *parts, precision="ieee")
    assert_right(y[-300:].cpu(), x[-300:], weight)
    assert not y[:-300].any()


# --- what runs where -------------------------------------------------------------------------------------------------

plain = pytest.mark.skipif(INTERPRETED, reason="about processes that do not interpret")


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


@plain
@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_runs_on_a_gpu_when_asked_for_and_auto_waits_until_one_has_run_it(hopper, dtype, block_size):
    assert resolve("triton", CUDA, dtype, block_size, 0.9).name == "triton"
    theirs = "torch" if dtype != torch.float32 or block_size <= 64 else "triton"  # PyTorch's takes minutes to compile
    assert resolve("auto", CUDA, dtype, block_size, 0.9).name == theirs


@plain
def test_refusals_say_why(hopper, monkeypatch):
    refusal = backends()["triton"].refusal
    assert refusal(CUDA, torch.float32, 32) is None
    assert "NVIDIA GPUs only" in refusal(CPU, torch.float32, 32)
    assert "float32, float16 and bfloat16 only" in refusal(CUDA, torch.float64, 32)
    assert "a power of two and at least 16" in refusal(CUDA, torch.float32, 48)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "8.0 (A100) or newer; this GPU has 7.5" in refusal(CUDA, torch.float32, 32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "is_available() is False" in refusal(CUDA, torch.float32, 32)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "Triton is not installed" in refusal(CUDA, torch.float32, 32)
    with pytest.raises(BackendUnavailableError, match=r"cannot run torch\.float32 on cuda.*Triton is not installed"):
        resolve("triton", CUDA, torch.float32, 32)


@plain
def test_importing_blockvit_does_not_import_triton():
    script = "import sys, blockvit; assert 'triton' not in sys.modules, 'imported'"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


# --- packing ---------------------------------------------------------------------------------------------------------


def dense_of(packed: packing.Packed, block_rows: int, block_cols: int) -> torch.Tensor:
    """The dense matrix that ``packed`` stands for, block by block."""
    b = packed.values.shape[2]
    dense = torch.zeros(block_rows * b, block_cols * b)
    for group in range(len(packed.crow) - 1):
        rows = [group] if packed.rows is None else packed.rows[group].tolist()
        for entry in range(packed.crow[group], packed.crow[group + 1]):
            col = int(packed.col[entry]) * b
            for row, block in zip(rows, packed.values[entry].split(b), strict=True):
                if row >= 0:
                    dense[row * b : (row + 1) * b, col : col + b] = block
    return dense


@plain
@pytest.mark.parametrize("group", [None, 1, 2, 4, 8])
@pytest.mark.parametrize("rows, cols, kept", [(1, 1, 1.0), (3, 5, 0.5), (8, 6, 0.2), (13, 4, 0.3), (4, 4, 0.0)])
def test_packed_is_the_same_matrix(rows, cols, kept, group):
    weight = random_matrix(16, rows=rows, cols=cols, kept=kept)
    packed = packing.pack(weight, group)
    assert torch.equal(dense_of(packed, rows, cols), weight.to_dense())
    groups, entries = packed.crow.shape[0] - 1, packed.col.shape[0]
    assert packed.crow[0] == 0 and packed.crow[-1] == entries == packed.values.shape[0]
    if packed.rows is None:
        assert packed.values.data_ptr() == weight.values.data_ptr(), "copied"
    else:
        assert packed.rows.shape == (groups, packed.values.shape[1] // 16)
        assert sorted(packed.rows[packed.rows >= 0].tolist()) == list(range(rows))
        assert (packed.crow.diff().diff() <= 0).all(), "the longest first"
        assert not (packed.values == 0).flatten(1).all(dim=1).any(), "columns that nobody reads"
    again = packing.pack(weight, group)
    assert torch.equal(again.values, packed.values) and torch.equal(again.col, packed.col)


@plain
def test_rows_that_share_columns_come_together():
    mask = torch.zeros(8, 16)
    for row in range(8):
        mask[row, row % 2 * 8 : row % 2 * 8 + 8] = 1  # even rows read the first half, odd ones the second
    dense = mask.repeat_interleave(16, 0).repeat_interleave(16, 1)
    packed = packing.pack(BSRMatrix.from_dense(dense, 16), 4)
    assert sorted(sorted(rows) for rows in packed.rows.tolist()) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert packed.col.shape[0] == 16


@plain
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("kept", [0.05, 0.1, 0.3, 0.7])
def test_what_is_chosen_costs_least_and_stays_within_its_memory(block_size, kept, dtype):
    weight = random_matrix(block_size, dtype, rows=512 // block_size, cols=256 // block_size, kept=kept)
    chosen = packing.pack(weight)
    assert chosen.values.numel() <= packing.MEMORY * weight.values.numel()
    assert chosen.values.shape[1] * dtype.itemsize <= packing.WIDEST_BYTES

    def cost(packed):
        groups, group = packed.crow.shape[0] - 1, packed.values.shape[1] // block_size
        return packing.cost(packed.col.shape[0], groups, group, block_size, dtype)

    for group in (1, 2, 4, 8):
        other = packing.pack(weight, group)
        assert other.values.numel() <= packing.MEMORY * weight.values.numel(), "whatever is asked for"
        if other.values.shape[1] * dtype.itemsize <= packing.WIDEST_BYTES:
            assert cost(chosen) <= cost(other)


@plain
def test_the_count_in_the_documentation_is_what_is_packed():
    table = re.findall(r"^ .* (\d+) +(\d+) +(\d+) +(\d+\.\d) +(\d\.\d\d)(?: GB)? +(\d\.\d\d)", linear.__doc__, re.M)
    shapes = [shape for shape in ((3072, 768), (768, 3072)) for _ in range(4)]
    for (out_features, in_features), row in zip(shapes, table, strict=True):
        block_size = int(row[0])
        generator = torch.Generator().manual_seed(0)
        dense = torch.randn(out_features, in_features, generator=generator)
        random_block_mask_(dense, 0.9, block_size, generator)
        packed = packing.pack(BSRMatrix.from_dense(dense.bfloat16(), block_size))
        groups, (entries, height, _) = packed.crow.shape[0] - 1, packed.values.shape
        length, tokens = entries * block_size / groups, 50432
        p = parameters.default(height, length, 2, "ieee", tokens, groups, **LIMITS)
        x_bytes = 2 * tokens * entries * block_size * (height // p["BLOCK_N"])
        weight_bytes = 2 * tokens / p["BLOCK_M"] * packed.values.numel()
        counted = height // block_size, p["BLOCK_N"], length / p["BLOCK_K"], x_bytes / 1e9, weight_bytes / 1e9
        assert [float(number) for number in row[1:]] == pytest.approx(counted, rel=0.05, abs=0.005)


# --- parameters ------------------------------------------------------------------------------------------------------

LIMITS = {"multiprocessors": 132, "shared": 227 * 1024}


@plain
@pytest.mark.parametrize("itemsize, precision", [(2, "ieee"), (4, "tf32"), (4, "tf32x3")])
@pytest.mark.parametrize("height", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("tokens", [1, 197, 50432])
@pytest.mark.parametrize("shared", [99 * 1024, 163 * 1024, 227 * 1024])
def test_defaults_fit(height, tokens, itemsize, precision, shared):
    limits = {"multiprocessors": 108, "shared": shared}
    p = parameters.default(height, 800.0, itemsize, precision, tokens, 3072 // height, **limits)
    assert height % p["BLOCK_N"] == 0 and p["BLOCK_M"] >= 16
    assert p["BLOCK_K"] * itemsize == 128
    tiles = p["BLOCK_M"], p["BLOCK_N"], p["BLOCK_K"]
    assert parameters.shared_bytes(*tiles, p["num_stages"], itemsize) <= shared
    assert p["BLOCK_M"] * p["BLOCK_N"] <= 64 * 32 * p["num_warps"]


@plain
def test_few_tokens_come_in_short_tiles():
    lengths = {t: parameters.default(64, 300.0, 2, "ieee", t, 12, **LIMITS)["BLOCK_M"] for t in (1, 197, 1576, 50432)}
    assert lengths == {1: 16, 197: 16, 1576: 64, 50432: 128}


@plain
def test_stages_follow_the_length_of_the_rows():
    stages = {n: parameters.default(64, n, 2, "ieee", 50432, 48, **LIMITS)["num_stages"] for n in (77, 128, 129, 307)}
    assert stages == {77: 2, 128: 2, 129: 3, 307: 3}


@plain
def test_parameters_of_far_more_or_fewer_tokens_are_not_taken_over():
    tiles = {"BLOCK_M": 256, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
    like = (32, torch.bfloat16, 230, "ieee")

    def find(tokens):
        return parameters.linear(CPU, tokens, 3072, 768, *like, 2, 230)["BLOCK_M"]

    for tokens in (1000, 50432):
        key = tuning.key(3072, 768, tokens, *like)
        tuning.store("cpu", "triton", key, {"GROUP": 2, **tiles, "BLOCK_M": tokens % 512}, ms=1.0, seconds=1.0)
    assert [find(tokens) for tokens in (50432 * 4, 50432, 50432 // 4)] == [50432 % 512] * 3
    assert [find(tokens) for tokens in (4000, 250)] == [1000 % 512] * 2
    assert [find(tokens) for tokens in (50432 * 4 + 1, 8000, 197, 1)] == [128, 128, 32, 16], "the rule's"


@plain
def test_parameters_of_the_nearest_that_was_tuned_with_the_same_group():
    def store(group, block_m, **changed):
        key = {**tuning.key(3072, 768, 50432, 32, torch.bfloat16, 230, "ieee"), **changed}
        tiles = {"BLOCK_M": block_m, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
        tuning.store("cpu", "triton", key, {"GROUP": group, **tiles}, ms=1.0, seconds=1.0)

    def find(tokens=50432, group=2, dtype=torch.bfloat16, precision="ieee"):
        like = (3072, 768, 32, dtype, 230, precision)
        return parameters.linear(CPU, tokens, *like, group, 230)["BLOCK_M"]

    def groups(dtype=torch.bfloat16):
        return parameters.group(CPU, 3072, 768, 32, dtype, 230)

    untuned = find()
    assert groups() is None and untuned == 128
    store(2, 1)
    store(1, 2, tokens=197)
    store(4, 3, dtype="tf32")
    assert (find(), find(tokens=197, group=1)) == (1, 2)
    assert find(dtype=torch.float32, precision="tf32", group=4) == 3
    assert find(dtype=torch.float32, precision="tf32x3", group=4) == 64  # nothing was tuned
    assert (groups(), groups(torch.float32)) == (2, None)
