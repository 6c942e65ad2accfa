"""The fused MLP kernel: on a GPU, in Triton's interpreter everywhere, and what the compiler makes of it for GPUs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from triton_interpreter import INTERPRETED, every_device, test_file_in_the_interpreter

from blockvit import BSRMatrix

pytest.importorskip("triton")
from blockvit.kernels.triton import mlp, offline, packing

# Errors of two sums of up to some hundred products of normal numbers, relative to the largest result.
TOLERANCE = {
    (torch.float32, "ieee"): 2e-6,
    (torch.float32, "tf32x3"): 2e-6,
    (torch.float32, "tf32"): 4e-3,
    (torch.bfloat16, "ieee"): 1.6e-2 if INTERPRETED else 8e-3,  # the interpreter truncates where a GPU rounds
    (torch.float16, "ieee"): 2e-3,
}
ACTIVATIONS = {None: lambda y: y, "gelu": F.gelu, "gelu_tanh": lambda y: F.gelu(y, approximate="tanh")}
SMALL = {"BLOCK_M": 16, "PROGRAMS": 2, "num_warps": 4, "num_stages": 3}

HOPPER_SHARED = offline.SHARED_BYTES[90]

every_precision = pytest.mark.parametrize(
    "dtype, precision", list(TOLERANCE), ids=lambda v: str(v).removeprefix("torch.")
)


def test_in_the_interpreter():
    test_file_in_the_interpreter(__file__)


def matrix(shape: tuple[int, int], block_size: int, dtype: torch.dtype, kept: float = 0.5) -> BSRMatrix:
    """Random blocks, in order of rows and columns: an empty and a full row; an empty and a full column."""
    rows, cols = (-(-size // block_size) for size in shape)
    mask = torch.rand(rows, cols) < kept
    mask[-1], mask[:, -1] = kept > 0, kept > 0
    mask[0], mask[:, 1] = False, False
    dense = (
        torch.randn(shape)
        * mask.repeat_interleave(block_size, 0).repeat_interleave(block_size, 1)[: shape[0], : shape[1]]
    )
    return BSRMatrix.from_dense(dense.to(dtype), block_size)


def reference(x, first, bias1, second, bias2, activations):
    """In float64, on the CPU."""
    for weight, bias, activation in zip((first, second), (bias1, bias2), activations, strict=True):
        x = F.linear(x.double(), weight.to_dense().double(), None if bias is None else bias.double())
        x = ACTIVATIONS[activation](x)
    return x


def fused(
    x, first, bias1, second, bias2, activations, *, groups=(1, 1), precision="ieee", parameters=SMALL, device="cpu"
):
    """``mlp.launch`` of operands that lie on the CPU, on ``device``, block rows in ``groups`` of so many."""
    move = lambda t: None if t is None else t.to(device)  # noqa: E731
    packed = [packing.pack(weight, group) for weight, group in zip((first, second), groups, strict=True)]
    schedules = [mlp.Schedule(*map(move, schedule)) for schedule in mlp.schedules(*packed)]
    return mlp.launch(
        move(x),
        schedules[0],
        move(packed[0].values),
        move(bias1),
        schedules[1],
        move(packed[1].values),
        move(bias2),
        sizes=(first.shape[0], second.shape[0]),
        activations=activations,
        precision=precision,
        parameters=parameters,
    )


def assert_near(y, expected, dtype, precision):
    assert y.dtype == dtype and y.shape == expected.shape and y.is_contiguous()
    error = (y.double().cpu() - expected).abs().max() / expected.abs().max().clamp_min(1)
    assert error <= TOLERANCE[dtype, precision], f"relative error {error:.1e}"


@pytest.fixture
def poison(monkeypatch):
    """Every new tensor is full of NaN: what is read before it was written, or never written, shows."""
    empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        tensor = empty(self, *args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


# --- results ---------------------------------------------------------------------------------------------------------


@every_device
@every_precision
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_equals_two_dense_layers(device, block_size, dtype, precision, poison):
    b = block_size
    first, second = matrix((5 * b, 3 * b), b, dtype), matrix((3 * b, 5 * b), b, dtype)
    bias1, bias2 = torch.randn(5 * b), torch.randn(3 * b)
    x = torch.randn(70, 3 * b).to(dtype)  # a whole tile and a tail
    operands = x, first, bias1, second, bias2, ("gelu", None)
    parameters = mlp.default_parameters(b, dtype.itemsize, HOPPER_SHARED) | {"BLOCK_M": 64}
    y = fused(*operands, precision=precision, parameters=parameters, device=device)
    assert_near(y, reference(*operands), dtype, precision)


@every_device
@pytest.mark.parametrize("tokens", [1, 16, 100])
@pytest.mark.parametrize("activations", [(None, None), ("gelu_tanh", "gelu"), ("gelu", "gelu_tanh")])
def test_scratch_serves_tile_after_tile(device, tokens, activations, poison):
    # 100 tokens in tiles of 16: the interpreter's two programs take three or four each.
    first, second = matrix((96, 64), 16, torch.float32), matrix((48, 96), 16, torch.float32)
    operands = torch.randn(tokens, 64), first, torch.randn(96), second, torch.randn(48), activations
    assert_near(fused(*operands, device=device), reference(*operands), torch.float32, "ieee")


@every_device
@pytest.mark.parametrize("biases", [(True, False), (False, True), (False, False)])
def test_biases_are_optional(device, biases, poison):
    first, second = matrix((80, 48), 16, torch.float32), matrix((48, 80), 16, torch.float32)
    bias1, bias2 = (torch.randn(n) if there else None for n, there in zip((80, 48), biases, strict=True))
    operands = torch.randn(20, 48), first, bias1, second, bias2, ("gelu", None)
    assert_near(fused(*operands, device=device), reference(*operands), torch.float32, "ieee")


LAYOUTS = {
    "transposed": lambda t, f: torch.randn(f, t).t(),
    "every other": lambda t, f: torch.randn(t, 2 * f)[:, ::2],
    "expanded": lambda t, f: torch.randn(f).expand(t, f),
    "offset": lambda t, f: torch.randn(t + 1, f + 1)[1:, 1:],
    "reversed batch": lambda t, f: torch.randn(2, t // 2, f).transpose(0, 1).flatten(0, 1),
}


@every_device
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_and_sizes_that_are_no_multiple_of_the_block(device, layout, poison):
    first, second = matrix((75, 45), 16, torch.float32), matrix((35, 75), 16, torch.float32)
    operands = LAYOUTS[layout](34, 45), first, torch.randn(75), second, torch.randn(35), ("gelu", None)
    assert_near(fused(*operands, device=device), reference(*operands), torch.float32, "ieee")


@every_device
@pytest.mark.parametrize("kept", [(0, 0.5), (0.5, 0), (0, 0)])
def test_a_layer_without_blocks_gives_its_bias(device, kept, poison):
    first, second = matrix((80, 48), 16, torch.float32, kept[0]), matrix((48, 80), 16, torch.float32, kept[1])
    operands = torch.randn(20, 48), first, torch.randn(80), second, torch.randn(48), ("gelu", None)
    assert_near(fused(*operands, device=device), reference(*operands), torch.float32, "ieee")


@every_device
def test_nan_stays_with_its_token(device):
    first, second = matrix((80, 48), 16, torch.float32, 1.0), matrix((48, 80), 16, torch.float32, 1.0)
    x = torch.randn(33, 48)
    x[5, 40] = float("nan")
    y = fused(x, first, None, second, None, ("gelu", None), device=device).cpu()
    assert y[5, 16:].isnan().all() and torch.isfinite(y[5, :16]).all()  # the second layer's first row is empty
    assert torch.isfinite(torch.cat([y[:5], y[6:]])).all()


@every_device
@pytest.mark.parametrize("seed", range(8))
def test_any_groups_and_sizes(device, seed, poison):
    b, dtype = (16, 32)[seed % 2], (torch.float32, torch.float16)[seed // 2 % 2]
    sizes = [int(n) for n in torch.randint(b + 1, 6 * b, (3,))]
    groups = [2 ** int(n) for n in torch.randint(0, 3, (2,))]
    first, second = (matrix((sizes[i + 1], sizes[i]), b, dtype, 0.3) for i in range(2))
    x = torch.randn(int(torch.randint(1, 60, ())), sizes[0]).to(dtype)
    operands = x, first, torch.randn(sizes[1]), second, torch.randn(sizes[2]), ("gelu", None)
    y = fused(*operands, groups=groups, parameters=SMALL | {"PROGRAMS": 1 + seed % 3}, device=device)
    assert_near(y, reference(*operands), dtype, "ieee")


# --- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [(1, 1), (2, 1), (1, 2), (4, 2)], ids=str)
def test_schedules_do_what_counts_once_and_nothing_else(groups, dtype):
    first, second = matrix((176, 96), 16, dtype, 0.2), matrix((80, 176), 16, dtype, 0.2)
    packed = [packing.pack(weight, group) for weight, group in zip((first, second), groups, strict=True)]
    one, two = mlp.schedules(*packed)
    assert all(tensor.dtype == torch.int32 and tensor.is_contiguous() for schedule in (one, two) for tensor in schedule)

    hidden = second.col_indices.unique()
    assert len(hidden) < 11
    assert set(hidden.tolist()) <= set(one.rows.flatten().tolist())
    assert torch.isin(one.rows, hidden).any(dim=1).all()  # no group of which nothing is read
    assert sorted(two.rows[two.rows >= 0].tolist()) == list(range(5))

    joined = mlp.joined(16, dtype)
    assert joined == (2 if dtype == torch.float32 else 4)
    in_input, hidden_rows = torch.arange(6), one.rows.flatten()
    for schedule, weight, read in ((one, packed[0], in_input), (two, packed[1], hidden_rows)):
        assert schedule.steps.shape[0] == schedule.columns.shape[0]
        schedule = schedule._replace(steps=schedule.steps[:-1], columns=schedule.columns[:-1])
        done = torch.cat([schedule.steps[:, 1], schedule.empty])
        assert sorted(done[done >= 0].tolist()) == list(range(len(schedule.rows)))  # each group is written once
        entries = schedule.steps[:, :1] + torch.arange(joined)
        there = schedule.columns >= 0
        assert torch.equal(read[schedule.columns[there].long()].long(), weight.col[entries[there]].long())
        assert entries[there].unique().numel() == there.sum()
    assert int((two.columns[:-1] >= 0).sum()) == len(packed[1].col)


# --- what the compiler makes of it -----------------------------------------------------------------------------------

ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def compiled(
    arch: int, dtype: torch.dtype, precision: str, block_size: int, heights: tuple[int, int]
) -> offline.Report:
    """The kernel for ViT-B/16's MLP with its default parameters."""
    parameters = mlp.default_parameters(max(heights), dtype.itemsize, offline.SHARED_BYTES[arch])
    names = [name for name in mlp.mlp_kernel.arg_names if name.endswith("_ptr")]
    indices = ("steps", "columns", "empty", "rows")
    return offline.compile_for(
        mlp.mlp_kernel,
        arch,
        {name: "i32" if name.startswith(indices) else ELEMENTS[dtype] for name in names},
        {
            "stride_t": 768,
            "stride_f": 1,
            "tokens": 50431,
            "steps1": 41,
            "empty1": 9,
            "steps2": 57,
            "empty2": 3,
            "hidden": 2816,
        },
        {
            "IN_FEATURES": 768,
            "HIDDEN_FEATURES": 3072,
            "OUT_FEATURES": 768,
            "ROWS1": heights[0],
            "ROWS2": heights[1],
            "COLS": block_size,
            "BLOCK_M": parameters["BLOCK_M"],
            "BLOCK_K": 128 // dtype.itemsize,
            "ACTIVATION1": "gelu",
            "ACTIVATION2": None,
            "PRECISION": precision,
            "STAGES": parameters["num_stages"],
        },
        num_warps=parameters["num_warps"],
        num_stages=parameters["num_stages"],
        maxnreg=mlp.max_registers(parameters),
    )


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize(
    "arch, dtype, precision, block_size, heights",
    [
        (90, torch.bfloat16, "ieee", 64, (128, 64)),
        (90, torch.float16, "ieee", 16, (64, 32)),
        (90, torch.float32, "tf32x3", 64, (64, 64)),
        (80, torch.bfloat16, "ieee", 64, (64, 64)),
    ],
    ids=str,
)
def test_defaults_use_tensor_cores_and_fit_without_spills(arch, dtype, precision, block_size, heights):
    report = compiled(arch, dtype, precision, block_size, heights)
    assert report.wgmma if arch == 90 else report.tensor_cores
    assert report.spills == 0 and report.shared <= offline.SHARED_BYTES[arch]
    wanted = mlp.default_parameters(max(heights), dtype.itemsize, offline.SHARED_BYTES[arch])["PROGRAMS"]
    assert report.programs_at_once(arch) >= (wanted if arch == 90 else 1)
    assert "cp.async.cg.shared.global" in report.ptx  # pipelined loads, 16 bytes wide
