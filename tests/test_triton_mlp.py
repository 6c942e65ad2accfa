"""The fused MLP kernel: on a GPU, in Triton's interpreter everywhere, and what the compiler makes of it for GPUs."""

from __future__ import annotations

import copy
import itertools
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton_interpreter import INTERPRETED, every_device, run_interpreted, slow, test_file_in_the_interpreter

import blockvit
from blockvit import BlockSparseLinear, BlockSparseMLP, BSRMatrix, tune
from blockvit.convert import random_block_mask_
from blockvit.kernels import tuning
from blockvit.mlp import fuse_mlps

pytest.importorskip("triton")
from blockvit.kernels.triton import mlp, offline, packing
from blockvit.kernels.triton import parameters as tuned

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
def store(tmp_path, monkeypatch):
    """An empty folder for tuned parameters."""
    monkeypatch.setenv("BLOCKVIT_TUNED", str(tmp_path / "tuned"))


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
@pytest.mark.parametrize("block_size", [16, slow(32), 64, slow(128)])
def test_equals_two_dense_layers(device, block_size, dtype, precision, poison):
    b = block_size
    first, second = matrix((4 * b, 2 * b), b, dtype), matrix((2 * b, 4 * b), b, dtype)
    bias1, bias2 = torch.randn(4 * b), torch.randn(2 * b)
    x = torch.randn(70, 2 * b).to(dtype)  # a whole tile and a tail
    operands = x, first, bias1, second, bias2, ("gelu", None)
    parameters = mlp.default_parameters(b, dtype.itemsize, HOPPER_SHARED) | {"BLOCK_M": 64}
    y = fused(*operands, precision=precision, parameters=parameters, device=device)
    assert_near(y, reference(*operands), dtype, precision)


@every_device
@pytest.mark.parametrize(
    "tokens, activations", [(1, (None, None)), (16, ("gelu_tanh", "gelu")), (100, ("gelu", "gelu_tanh"))]
)
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
@pytest.mark.parametrize("seed", range(6))
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


# --- the module ------------------------------------------------------------------------------------------------------


def sequence(device: str, dtype: torch.dtype = torch.float32, dropout: float = 0.0, kept: float = 0.5) -> nn.Sequential:
    """40 -> 100 -> 24 features in blocks of 16 as torchvision builds an MLP, in evaluation mode; nothing fused yet."""
    layers = []
    for shape in ((100, 40), (24, 100)):
        weight = matrix(shape, 16, dtype, kept)
        parts = (weight.crow_indices, weight.col_indices, weight.values)
        weight = BSRMatrix(*(part.to(device) for part in parts), weight.shape)  # the CPU does not run it
        bias = nn.Parameter(torch.randn(shape[0]).to(device, dtype))
        layers.append(BlockSparseLinear(weight, bias, backend="triton"))
    return nn.Sequential(layers[0], nn.GELU(), nn.Dropout(dropout), layers[1], nn.Dropout(dropout)).eval()


def mlp_of(plain: nn.Sequential) -> BlockSparseMLP:
    """A fused copy, for any number of tokens."""
    (fused,) = fuse_mlps(nn.Sequential(copy.deepcopy(plain)))
    assert type(fused) is BlockSparseMLP
    fused.min_tokens = 1
    return fused


class Operators(TorchDispatchMode):
    """Names of this library's operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "blockvit":
            self.names.append(function.name().split("::")[1].removesuffix("_no_grad"))
        return function(*args, **(kwargs or {}))


def operators(model: nn.Module, x: torch.Tensor) -> list[str]:
    with Operators() as mode:
        model(x)
    return mode.names


FUSED, ONE_BY_ONE = ["triton_mlp"], ["triton_linear", "triton_linear"]


@every_device
@pytest.mark.parametrize("shape", [(40,), (3, 7, 40), (0, 40)], ids=str)
def test_the_module_is_one_kernel_and_equals_its_children(device, shape, store):
    plain = sequence(device)
    fused = mlp_of(plain)
    x = torch.randn(shape).to(device)
    with torch.no_grad():
        assert operators(fused, x) == (FUSED if x.numel() else [])
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-5, atol=1e-4)
        if len(shape) == 3:
            x = x.transpose(0, 1)
            torch.testing.assert_close(fused(x), plain(x), rtol=1e-5, atol=1e-4)


@every_device
def test_what_keeps_the_module_from_fusing(device, store):
    plain = sequence(device, dropout=0.5)
    fused = mlp_of(plain)
    x = torch.randn(20, 40).to(device)
    assert operators(fused, x) == ONE_BY_ONE  # a gradient is asked for: of the biases
    with torch.no_grad():
        assert operators(fused, x) == FUSED
        along_x = [torch.func.jvp(m, (x,), (x + 1,))[1] for m in (fused, plain.eval())]
        torch.testing.assert_close(*along_x, rtol=1e-5, atol=1e-4)
        fused.min_tokens = 21
        assert operators(fused, x) == ONE_BY_ONE
        fused.min_tokens = 20
        fused[2].train()
        assert operators(fused, x) == ONE_BY_ONE
        fused[2].p = 0.0
        assert operators(fused, x) == FUSED
        seen = []
        hook = fused[3].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
        assert operators(fused, x) == ONE_BY_ONE and seen == [(20, 100)]
        hook.remove()
        assert operators(fused, x) == FUSED
        fused[4].register_forward_hook(lambda module, args, y: y + 1)  # which is called as always
        assert operators(fused, x) == FUSED
        torch.testing.assert_close(fused(x), plain(x) + 1, rtol=1e-5, atol=1e-4)
        with pytest.raises(ValueError, match="the input's last size is 48; expected in_features=40"):
            fused(torch.randn(20, 48).to(device))
    for parameter in fused.parameters():
        parameter.requires_grad_(False)
    assert operators(fused, x) == FUSED
    assert operators(fused, x.clone().requires_grad_()) == ONE_BY_ONE


@every_device
def test_a_copy_fuses_as_before_and_so_does_what_another_process_pickled(device, store, monkeypatch):
    fused, x = mlp_of(sequence(device)), torch.randn(20, 40).to(device)
    fused.min_tokens = 20
    written = pickle.dumps(fused)
    with torch.no_grad():
        assert operators(copy.deepcopy(fused), x) == FUSED
        monkeypatch.setattr("blockvit.linear._PROCESS", "another")
        unpickled = pickle.loads(written)
        unpickled.min_tokens = 20  # which was found anew, as the schedules were
        assert operators(unpickled, x) == FUSED
        torch.testing.assert_close(unpickled(x), fused(x))


@every_device
def test_gradients_are_those_of_the_layers(device, store):
    plain = sequence(device)
    fused = mlp_of(plain)
    x = torch.randn(20, 40).to(device).requires_grad_()
    grads = [torch.autograd.grad(m(x).square().sum(), [x, *m.parameters()]) for m in (fused, plain)]
    torch.testing.assert_close(*grads)


@every_device
def test_the_operator_refuses_gradients_and_passes_opcheck(device, store):
    first, second = matrix((80, 48), 16, torch.float32), matrix((48, 80), 16, torch.float32)
    one, two = mlp.schedules(packing.pack(first, 2), packing.pack(second, 1))
    values = packing.pack(first, 2).values, packing.pack(second, 1).values
    arguments = (torch.randn(5, 48), *one, values[0], torch.randn(80), *two, values[1], None)
    arguments = [None if t is None else t.to(device) for t in arguments]
    rest = first.nnz, 80, 48, "gelu", None
    torch.library.opcheck(mlp.mlp, (*arguments, *rest), test_utils=("test_schema", "test_faketensor"))
    y = mlp.mlp(arguments[0].requires_grad_(), *arguments[1:], *rest)
    with pytest.raises(RuntimeError, match=r"no gradients.*blockvit\.BlockSparseMLP"):
        y.sum().backward()


@every_device
@torch.no_grad()
def test_the_schedule_follows_the_weights(device, store):
    plain, other = sequence(device), sequence(device)
    fused = mlp_of(plain)
    x = torch.randn(20, 40).to(device)

    def check(like: nn.Sequential, expected: list[str], x=x, rtol=1e-5) -> None:
        fused.min_tokens = fused.min_tokens and 1  # from now on, if it can
        assert operators(fused, x) == expected
        torch.testing.assert_close(fused(x), like(x), rtol=rtol, atol=10 * rtol)

    fused.load_state_dict(other.state_dict())
    check(other, FUSED)
    fused[0].load_state_dict(plain[0].state_dict())  # nobody tells the whole of it: what it knows is out of date
    check(nn.Sequential(plain[0], *other[1:]), ONE_BY_ONE)
    fused[3] = copy.deepcopy(plain[3])
    check(plain, FUSED)
    fused.half()  # steps join more blocks of fewer bytes
    check(copy.deepcopy(plain).half(), FUSED, x.half(), 1e-2)
    fused.float()
    check(copy.deepcopy(plain).half().float(), FUSED)
    del fused[1]  # the GELU
    check(nn.Sequential(plain[0], *plain[2:]).half().float(), FUSED)


@every_device
@torch.no_grad()
def test_autocast_computes_in_the_weights_dtype(device, store):
    fused = mlp_of(sequence(device))
    x = torch.randn(20, 40).to(device)
    with torch.autocast(device, torch.bfloat16):
        assert operators(fused, x.bfloat16()) == FUSED
        torch.testing.assert_close(fused(x.bfloat16()), fused(x.bfloat16().float()))


@every_device
@torch.no_grad()
def test_min_tokens_and_parameters_are_what_tuning_found(device, store):
    plain = sequence(device)
    (fused,) = fuse_mlps(nn.Sequential(copy.deepcopy(plain)))
    assert fused.min_tokens == sys.maxsize  # float32 in small blocks: nothing to gain by count
    large = mlp.min_tokens(torch.device(device), (768, 3072), 64, torch.bfloat16, 58, 128)
    assert large == 2 * 128 * tuned.resources(torch.device(device))["multiprocessors"]
    name = tuning.device_name(torch.device(device, 0) if device == "cuda" else torch.device(device))
    precision = tuned.precision(torch.float32)
    for tokens, ms in ((20, 3.0), (40, 1.0), (30, 1.5)):
        key = mlp.key((40, 100), tokens, 16, torch.float32, plain[0].bsr.nnz, precision)
        parameters = SMALL | {"BLOCK_M": 32 if tokens == 40 else 16}
        tuning.store(name, tuned.MLP, key, parameters, ms=ms, default_ms=2.0, seconds=1.0)
    (fused,) = fuse_mlps(nn.Sequential(copy.deepcopy(plain)))
    assert fused.min_tokens == 30
    x = torch.randn(39, 40).to(device)
    asked, original = [], mlp.launch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            mlp, "launch", lambda *args, **kwargs: asked.append(kwargs["parameters"]) or original(*args, **kwargs)
        )
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-5, atol=1e-4)
    assert [parameters["BLOCK_M"] for parameters in asked] == [32]
    for tokens in (30, 40):
        key = mlp.key((40, 100), tokens, 16, torch.float32, plain[0].bsr.nnz, precision)
        tuning.store(name, tuned.MLP, key, SMALL, ms=3.0, default_ms=2.0, seconds=1.0)
    (fused,) = fuse_mlps(nn.Sequential(copy.deepcopy(plain)))
    assert operators(fused, x) == ONE_BY_ONE  # never faster


def test_parameters_found_for_lower_groups_are_not_taken_over_where_they_do_not_fit(store):
    dtype, cpu = torch.bfloat16, torch.device("cpu")
    found = {"BLOCK_M": 256, "PROGRAMS": 1, "num_warps": 16, "num_stages": 5}  # of groups of 64 outputs, 200 KiB
    assert mlp.fits(found, 64, dtype.itemsize, HOPPER_SHARED) and not mlp.fits(
        found, 128, dtype.itemsize, HOPPER_SHARED
    )
    key = mlp.key((768, 3072), 50432, 16, dtype, 922, "ieee")
    tuning.store("cpu", tuned.MLP, key, found, ms=1.0, default_ms=2.0, seconds=1.0)
    looked_up = (cpu, (768, 3072), 50432, 16, dtype, 922, "ieee")
    assert mlp._parameters(*looked_up, 64) == found
    assert mlp._parameters(*looked_up, 128) == mlp.default_parameters(128, dtype.itemsize, HOPPER_SHARED)
    assert mlp.min_tokens(cpu, (768, 3072), 16, dtype, 922, 64) == 50432
    assert mlp.min_tokens(cpu, (768, 3072), 16, dtype, 922, 128) == sys.maxsize, "nor the number of tokens"
    for height, itemsize in itertools.product((16, 32, 64, 128), (2, 4)):
        if height * itemsize <= packing.WIDEST_BYTES:
            assert mlp.fits(mlp.default_parameters(height, itemsize, HOPPER_SHARED), height, itemsize, HOPPER_SHARED)


@every_device
@torch.no_grad()
def test_a_model_on_the_triton_backend_is_fused_by_default_and_survives_a_file(device, store, tmp_path):
    model = torchvision.models.VisionTransformer(16, 4, 1, 2, 32, 64, num_classes=10).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model = blockvit.fold(blockvit.sparsify(model, 0.5, 16, targets="mlp")).to(device)
    x = torch.randn(4, 3, 16, 16).to(device)
    expected = model(x)
    blockvit.to_block_sparse(model, 16, backend="triton")
    file = blockvit.save(model, tmp_path / "model.safetensors")
    # Onto the device: "auto" is resolved where the weights are loaded to, and prefers another backend there.
    dense = torchvision.models.VisionTransformer(16, 4, 1, 2, 32, 64, num_classes=10).to(device)
    loaded = blockvit.load(file, dense, backend="triton")
    for other in (model, fuse_mlps(loaded)):
        other.encoder.layers[0].mlp.min_tokens = 1
        assert operators(other, x) == FUSED
        torch.testing.assert_close(other(x), expected, rtol=1e-3, atol=1e-3)


@every_device
@torch.no_grad()
def test_compiles_without_graph_breaks(device, store):
    torch._dynamo.reset()
    fused = mlp_of(sequence(device))
    fused.min_tokens = 16
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    for shape in [(2, 10, 40), (3, 20, 40), (3, 40)]:  # the last has too few tokens
        x = torch.randn(shape).to(device)
        torch.testing.assert_close(compiled(x), fused(x), rtol=1e-5, atol=1e-4)


SEARCH = """
import torch, triton.testing
from blockvit import tune
from blockvit.kernels.triton import mlp

launched, launch = [], mlp.launch
def recorded(*args, parameters, **options):
    launched.append(dict(parameters))
    return launch(*args, parameters=parameters, **options)
mlp.launch = recorded

def do_bench(call, return_mode, warmup=None, rep=None):
    before = len(launched)
    assert torch.isfinite(call()).all()
    if len(launched) == before:
        return 9.0  # one by one
    return launched[-1]["BLOCK_M"] / 100 + abs(launched[-1]["num_stages"] - 2)  # as if short tiles and two were best
triton.testing.do_bench = do_bench

tune.search.SEARCH_SECONDS = float("inf")  # it is slow here
found = tune.triton_mlp.find(tune.Case(96, 48, 40, 16, torch.float32, 0.5), torch.device("cpu"))
assert found.parameters == {"BLOCK_M": 32, "PROGRAMS": 2, "num_warps": 4, "num_stages": 2}, found
assert (found.ms, found.default_ms) == (0.32, 9.0), found
assert min(map(mlp.max_registers, launched)) >= mlp.LEAST_REGISTERS

from triton.runtime.errors import PTXASError

for error in (triton.OutOfResources(1, 0, "shared memory"), PTXASError("Insufficient registers")):
    def do_bench(call, **options):
        raise error
    triton.testing.do_bench = do_bench
    assert tune.triton_mlp.find(tune.Case(96, 48, 40, 16, torch.float32, 0.5), torch.device("cpu")) is None
print("done")
"""


def test_the_search_runs_in_the_interpreter():
    run_interpreted(SEARCH)


# --- on a GPU only ---------------------------------------------------------------------------------------------------

CUDA = torch.device("cuda")


def large(dtype: torch.dtype, tokens: int, block_size: int = 64) -> tuple[nn.Sequential, BlockSparseMLP, torch.Tensor]:
    """ViT-B/16's MLP at 90%, plain and fused, and that many tokens."""
    layers = []
    for out_features, in_features in ((3072, 768), (768, 3072)):
        linear = nn.Linear(in_features, out_features)
        generator = torch.Generator().manual_seed(out_features)
        random_block_mask_(linear.weight.data, 0.9, block_size, generator)
        linear.to(CUDA, dtype)
        layers.append(BlockSparseLinear.from_dense(linear, block_size, backend="triton"))
    plain = nn.Sequential(layers[0], nn.GELU(), layers[1]).eval()
    return plain, mlp_of(plain), torch.randn(tokens, 768, device=CUDA, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [50432, slow(197)], ids=str)
@torch.no_grad()
def test_a_large_batch_on_a_gpu_again_and_again(dtype, tokens, block_size):
    # An error that changes from call to call would be a race between the halves.
    plain, fused, x = large(dtype, tokens, block_size)
    assert operators(fused, x) == FUSED
    y = fused(x)
    torch.testing.assert_close(y, plain(x), rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-2)
    for _ in range(20):
        assert torch.equal(fused(x), y)


@pytest.mark.gpu
@torch.no_grad()
def test_replays_as_a_cuda_graph():
    plain, fused, x = large(torch.bfloat16, 1000)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        fused(x)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fused(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(y, plain(x), rtol=2e-2, atol=1e-2)


@pytest.mark.gpu
@torch.no_grad()
def test_two_streams_do_not_share_scratch_memory():
    _, fused, x = large(torch.bfloat16, 20000)
    inputs = [x, torch.randn_like(x)]
    expected = [fused(x) for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    for _ in range(10):
        results = []
        for x, stream in zip(inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(fused(x))
        torch.cuda.synchronize()
        assert all(map(torch.equal, results, expected))


@pytest.mark.gpu
@torch.no_grad()
def test_memory_in_steady_state_is_the_scratch_memory_and_the_output():
    _, fused, x = large(torch.bfloat16, 50432)
    fused(x)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = fused(x)
    assert torch.cuda.max_memory_allocated() - before < y.nbytes + 50432 * 3072 * 2  # less than hidden activations


@pytest.mark.gpu
@pytest.mark.slow
def test_tuning_on_a_gpu_finds_parameters_that_run(store):
    case = tune.Case(512, 128, 20000, 64, torch.bfloat16, 0.8)
    (found,) = tune.tune(tune.TUNERS[tuned.MLP], [case], CUDA)
    assert found.found is not None and found.found.default_ms is not None
