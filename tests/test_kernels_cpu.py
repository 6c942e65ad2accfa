"""The C++ kernel for CPUs: its results and errors, its operators, its build, and its sources under sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from blockvit import BackendUnavailableError, BlockSparseLinear, BSRMatrix
from blockvit.attention import MultiheadAttention
from blockvit.kernels import build, cpu, cpu_attention, resolve

CPU = torch.device("cpu")
ACTIVATIONS = {None: lambda y: y, "gelu": F.gelu, "gelu_tanh": lambda y: F.gelu(y, approximate="tanh")}
BLOCK_SIZES = [8, 16, 24, 32, 48, 64, 128]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}  # relative to the largest result
TESTS = Path(__file__).parent


@pytest.fixture(autouse=True)
def kernel(request):
    if "without_kernel" not in request.keywords and (why := cpu.load()):
        pytest.skip(why)


def masked_weight(out_features, in_features, block_size, mask):
    weight = torch.randn(out_features, in_features) / in_features**0.5
    elements = mask.repeat_interleave(block_size, 0).repeat_interleave(block_size, 1)
    return weight * elements[:out_features, :in_features]


def random_mask(out_features, in_features, block_size, density):
    return (torch.rand(-(-out_features // block_size), -(-in_features // block_size)) < density).float()


def layer(weight, block_size, *, bias=True, activation=None, dtype=torch.float32):
    bias = torch.randn(weight.shape[0], dtype=dtype) if bias else None
    matrix = BSRMatrix.from_dense(weight.to(dtype), block_size)
    return BlockSparseLinear(matrix, bias, backend="cpu", activation=activation)


def in_float64(sparse, x):
    bias = None if sparse.bias is None else sparse.bias.double()
    return ACTIVATIONS[sparse.activation](F.linear(x.double(), sparse.bsr.to_dense().double(), bias))


def assert_right(sparse, x):
    y, expected = sparse(x), in_float64(sparse, x)
    assert y.dtype == x.dtype and y.shape == expected.shape
    error = (y.double() - expected).abs().max() / expected.abs().max().clamp_min(1)
    assert error <= TOLERANCE[x.dtype], f"relative error {error:.1e}"


# --- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("tokens", [1, 5, 6, 7, 11, 12, 13, 61, 197])
def test_tails_of_tokens(block_size, dtype, tokens):
    weight = masked_weight(256, 384, block_size, random_mask(256, 384, block_size, 0.4))
    for activation in ACTIVATIONS:
        sparse = layer(weight, block_size, activation=activation, bias=activation != "gelu", dtype=dtype)
        assert_right(sparse, torch.randn(tokens, 384).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("shape", [(1000, 72), (10, 3), (129, 257), (8, 130), (7, 1)])
def test_sizes_that_are_multiples_of_nothing(block_size, dtype, shape):
    sparse = layer(masked_weight(*shape, block_size, random_mask(*shape, block_size, 0.7)), block_size, dtype=dtype)
    assert_right(sparse, torch.randn(9, shape[1]).to(dtype))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_rows_without_blocks_and_a_weight_without_any(block_size):
    mask = random_mask(512, 256, block_size, 0.5)
    mask[::2] = 0
    x = torch.randn(50, 256)
    assert_right(layer(masked_weight(512, 256, block_size, mask), block_size, activation="gelu"), x)
    nothing = layer(torch.zeros(512, 256), block_size)
    assert torch.equal(nothing(x), nothing.bias.expand(50, 512))
    assert torch.equal(layer(torch.zeros(512, 256), block_size, bias=False)(x), torch.zeros(50, 512))


@pytest.mark.parametrize("threads", range(1, (os.cpu_count() or 1) + 1))
def test_rows_of_very_different_lengths_on_any_number_of_threads(threads):
    mask = torch.zeros(64, 96)
    mask[3] = 1
    mask[40, 7] = 1
    mask[63, ::2] = 1
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for tokens in (1, 40, 400):
            assert_right(layer(masked_weight(1024, 1536, 16, mask), 16), torch.randn(tokens, 1536))
    finally:
        torch.set_num_threads(before)


def test_the_result_does_not_depend_on_the_number_of_threads():
    sparse = layer(masked_weight(768, 768, 32, random_mask(768, 768, 32, 0.5)), 32, activation="gelu")
    x = torch.randn(197, 768)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(sparse(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results)


def test_layouts_of_x():
    sparse = layer(masked_weight(64, 96, 16, random_mask(64, 96, 16, 0.5)), 16)
    for x in (
        torch.randn(96, 20).t(),
        torch.randn(40, 96)[::2],
        torch.randn(20, 200)[:, 7:103],
        torch.randn(20, 192)[:, ::2],
        torch.randn(96).expand(20, 96),
        torch.randn(3, 4, 5, 96),
        torch.randn(5, 96, 4).transpose(1, 2),
    ):
        assert_right(sparse, x)


@pytest.mark.parametrize("inputs", [64, 768, 3072])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("sparsity", [0.0, 0.8, 0.95])
@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_float32_error_is_at_most_twice_that_of_pytorchs_dense_linear(inputs, activation, sparsity, block_size):
    weight = masked_weight(768, inputs, block_size, random_mask(768, inputs, block_size, 1 - sparsity))
    sparse = layer(weight, block_size, activation=activation)
    x = torch.randn(197, inputs)
    expected = in_float64(sparse, x)
    ours = (sparse(x) - expected).abs()
    theirs = (ACTIVATIONS[activation](F.linear(x, weight, sparse.bias)) - expected).abs()
    assert ours.max() <= 2 * theirs.max()
    assert ours.square().mean().sqrt() <= 2 * theirs.square().mean().sqrt()


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gelu_alone_is_as_exact_as_pytorchs(activation):
    sparse = BlockSparseLinear(BSRMatrix.from_dense(torch.eye(16), 16), backend="cpu", activation=activation)
    x = torch.linspace(-12, 12, 1600001)[:1600000].view(-1, 16)
    expected = ACTIVATIONS[activation](x.double())
    ours, theirs = ((y - expected).abs().max() for y in (sparse(x), ACTIVATIONS[activation](x)))
    assert ours <= 2 * theirs


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gelu_of_bfloat16_numbers_errs_little_more_than_rounding_does(activation):
    sparse = layer(torch.eye(16), 16, bias=False, activation=activation, dtype=torch.bfloat16)
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    x = every[(every.abs() <= 9) & (every.abs() > 1e-30)]  # smaller ones may become zero
    x = x[: len(x) // 16 * 16].view(-1, 16)
    wide = x.double()  # PyTorch's own GELU loses the far side to cancellation
    smooth = wide + 0.044715 * wide**3
    exact = {
        "gelu": wide / 2 * torch.erfc(-wide / 2**0.5),
        "gelu_tanh": wide / (1 + torch.exp(-2 * (2 / torch.pi) ** 0.5 * smooth)),
    }[activation]
    rounding = 2**-8  # at most, relative
    assert ((sparse(x).double() - exact).abs() <= 1.1 * rounding * exact.abs() + 1e-17).all()


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gelu_of_extreme_numbers(activation):
    weight = torch.zeros(16, 16)
    weight[:, 0] = 1
    sparse = BlockSparseLinear(BSRMatrix.from_dense(weight, 16), backend="cpu", activation=activation)
    x = torch.zeros(7, 16)
    x[:, 0] = torch.tensor([float("inf"), 1e38, 200.0, -1e38, -200.0, 1e-40, float("nan")])
    y = sparse(x)
    assert torch.equal(y[:3], x[:3, :1].expand(3, 16))
    assert (y[3:6].abs() < 1e-25).all()
    assert y[6].isnan().all()


def test_inference_mode_and_calls_from_several_threads():
    sparse = layer(masked_weight(768, 768, 32, random_mask(768, 768, 32, 0.5)), 32)
    x = torch.randn(64, 768)
    with torch.inference_mode():
        expected = sparse(x)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(y, expected) for y in pool.map(sparse, [x] * 8))


def test_what_it_refuses():
    for dtype, block_size, message in (
        (torch.float64, 16, "takes float32 and bfloat16 only"),
        (torch.float16, 16, "takes float32 and bfloat16 only"),
        (torch.float32, 12, "needs a block size that is a multiple of 8"),
    ):
        with pytest.raises(BackendUnavailableError, match=message):
            resolve("cpu", CPU, dtype, block_size)
    assert "runs on a CPU only" in cpu.CPU.refusal(torch.device("cuda"), torch.float32, 16)


def test_auto_takes_it_on_a_cpu_from_break_even_on():
    chosen = {s: resolve("auto", CPU, torch.float32, 32, s).name for s in (0.0, 0.2, 0.5, 0.9)}
    assert chosen == {0.0: "dense", 0.2: "cpu", 0.5: "cpu", 0.9: "cpu"}
    assert resolve("auto", CPU, torch.float64, 32, 0.9).name != "cpu"


def test_whether_a_layer_without_zeros_gains_is_measured(monkeypatch):
    times = {"dense": 0.0, "cpu": 0.0}
    clock = iter(range(10**6))
    monkeypatch.setattr(cpu.time, "perf_counter", lambda: next(clock) + sum(times.values()))
    monkeypatch.setattr(cpu.F, "linear", lambda x, weight: times.update(dense=times["dense"] + 10))
    measure = cpu._beats_dense.__wrapped__
    assert measure((40, 24), torch.float32, 16, threads=2)
    monkeypatch.setattr(cpu.CPU, "linear", lambda *arguments: times.update(cpu=times["cpu"] + 10))
    assert not measure((40, 24), torch.float32, 16, threads=2)
    assert not measure((40, 24), torch.float64, 16, threads=2)


# --- operators -------------------------------------------------------------------------------------------------------


def operands(dtype=torch.float32, **kwargs):
    sparse = layer(masked_weight(64, 96, 16, random_mask(64, 96, 16, 0.5)), 16, dtype=dtype)
    packed = cpu.CPU.pack(sparse.bsr)
    x = torch.randn(7, 96, dtype=dtype, **kwargs)
    return [x, packed["weight"], packed["crow"], packed["col"], sparse.bias]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("width", [8, 16, 32])
def test_any_panel_width_gives_the_same(dtype, block_size, width):
    """As when a program exported on one CPU runs on another."""
    if block_size % width:
        pytest.skip(f"no panels of {width} in blocks of {block_size}")
    matrix = BSRMatrix.from_dense(
        masked_weight(256, 256, block_size, random_mask(256, 256, block_size, 0.5)), block_size
    )
    values, crow = matrix.values.to(dtype), matrix.crow_indices
    packed = cpu.pack(values, crow, width)
    assert torch.equal(cpu.unpack(packed, crow), values)
    x = torch.randn(21, matrix.padded_shape[1]).to(dtype)
    y = torch.ops.blockvit.cpu_linear(x, packed, crow, matrix.col_indices, None, 0)
    whole = BSRMatrix(crow, matrix.col_indices, values, matrix.shape).to_dense(padded=True)
    expected = x.double() @ whole.double().t()
    assert (y.double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize("activation", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(activation, dtype):
    x, *rest, bias = operands(dtype)
    torch.library.opcheck(torch.ops.blockvit.cpu_linear_no_grad, (x, *rest, bias, activation))
    for b in (None, bias.requires_grad_()):
        torch.library.opcheck(torch.ops.blockvit.cpu_linear, (x.requires_grad_(), *rest, b, activation))


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("block_size", [8, 16, 64])
def test_gradients_of_input_and_bias(activation, block_size):
    weight = masked_weight(128, 192, block_size, random_mask(128, 192, block_size, 0.5))
    sparse = layer(weight, block_size, activation=activation)
    sparse.bias.requires_grad_()
    x = torch.randn(5, 192, requires_grad=True)
    grad = torch.randn(5, 128)
    ours = torch.autograd.grad(sparse(x), [x, sparse.bias], grad)
    exact = [x.detach().double().requires_grad_(), sparse.bias.detach().double().requires_grad_()]
    y = ACTIVATIONS[activation](F.linear(exact[0], weight.double(), exact[1]))
    for mine, theirs in zip(ours, torch.autograd.grad(y, exact, grad.double()), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert not sparse(x).requires_grad


def test_wrong_operands_are_errors():
    x, weight, crow, col, bias = operands()
    call = torch.ops.blockvit.cpu_linear
    for arguments, message in (
        ((x.double(), weight, crow, col, bias, 0), "both float32 or both bfloat16"),
        ((x.bfloat16(), weight, crow, col, bias, 0), "both float32 or both bfloat16"),
        ((x.bfloat16(), weight.bfloat16(), crow, col, None, 0), "expected 3 in float32, 4 in bfloat16"),
        ((x[:, :80], weight, crow, col, bias, 0), "fewer than the weight reads"),
        ((x[:, :90], weight, crow, col, bias, 0), "multiple of the block size 16"),
        ((x, weight[1:], crow, col, bias, 0), "do not belong to"),
        ((x, weight[..., :4], crow, col, bias, 0), "expected contiguous panels of 8, 16 or 32"),
        ((x, weight, crow.long(), col, bias, 0), "int32 indices"),
        ((x, weight, crow, col, bias[:5], 0), "a bias of 64 numbers"),
        ((x, weight, crow, col, bias, 3), "activation is 3"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_compiles_whole_and_exports(dtype, tmp_path):
    torch._dynamo.reset()
    model = nn.Sequential(
        layer(masked_weight(128, 64, 16, random_mask(128, 64, 16, 0.5)), 16, activation="gelu", dtype=dtype),
        nn.LayerNorm(128, dtype=dtype),
        layer(masked_weight(40, 128, 16, random_mask(40, 128, 16, 0.5)), 16, dtype=dtype),
    ).eval()
    x = torch.randn(3, 9, 64, dtype=dtype)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        torch.testing.assert_close(loaded(x.repeat(2, 1, 1)), expected.repeat(2, 1, 1))


def test_a_fresh_process_runs_what_was_pickled_or_exported(tmp_path):
    """As the workers of a pool do that are not forked."""
    model = nn.Sequential(layer(masked_weight(128, 64, 16, random_mask(128, 64, 16, 0.5)), 16, activation="gelu"))
    x = torch.randn(3, 64)
    torch.save(model, tmp_path / "model.pt")
    torch.save((x, model(x).detach()), tmp_path / "numbers.pt")
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
    pickled = """
        import torch
        model = torch.load("model.pt", weights_only=False)
        print(model[0].backend.name)
    """
    exported = """
        import blockvit, torch
        blockvit.kernels.cpu.load()
        model = torch.export.load("model.pt2").module()
    """
    runs = "\n        x, y = torch.load('numbers.pt')\n        torch.testing.assert_close(model(x), y)\n"
    assert answer(run_python(pickled + runs, cwd=tmp_path)) == ["cpu"]
    assert answer(run_python(exported + runs, cwd=tmp_path)) == [""]
    without_a_compiler = {"CXX": "/nowhere/c++", "BLOCKVIT_CACHE": str(tmp_path)}
    unable = run_python(pickled, cwd=tmp_path, **without_a_compiler)
    _, errors = unable.communicate(timeout=300)
    assert "BackendUnavailableError: backend 'cpu' cannot run" in errors and "could not be built" in errors


@pytest.mark.parametrize("dtype", cpu.DTYPES)
def test_peak_is_a_rate(dtype):
    assert 1e9 < cpu.peak_flops(dtype, seconds=0.3) < 1e15
    with pytest.raises(ValueError, match=r"dtype is torch.float64; the kernel multiplies in torch.float32 and"):
        cpu.peak_flops(torch.float64)


# --- the build -------------------------------------------------------------------------------------------------------

TRIES = """
    import sys, warnings, torch, blockvit
    from blockvit.kernels import cpu, build, resolve
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        linear = torch.nn.Linear(256, 32)
        with torch.no_grad():
            linear.weight[:, 16:] = 0
        sparse = [blockvit.BlockSparseLinear.from_dense(linear, 16) for _ in range(3)]
    x = torch.randn(3, 256)
    torch.testing.assert_close(sparse[0](x), linear(x))
    messages = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
    print(sparse[0].backend.name, len(messages), build.isa(), *messages, sep="|")
"""


def run_python(code, cwd=None, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=cwd,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answer(process):
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output.strip().split("|")


@pytest.mark.slow
def test_two_processes_build_at_once_and_the_next_takes_the_file(tmp_path):
    environment = {"BLOCKVIT_CACHE": str(tmp_path)}
    for process in [run_python(TRIES, **environment) for _ in range(2)]:
        assert answer(process)[:2] == ["cpu", "0"]
    (library,) = (tmp_path / "kernels").glob("*.so")
    assert not list(tmp_path.rglob("*.tmp"))
    made = library.stat().st_mtime_ns
    assert answer(run_python(TRIES, CXX="/nowhere/c++", **environment))[:2] == ["cpu", "0"]  # no compiler needed
    assert library.stat().st_mtime_ns == made


@pytest.mark.slow
def test_the_compiler_may_have_arguments(tmp_path):
    compiler, *_ = build.find_compiler()
    environment = {"BLOCKVIT_CACHE": str(tmp_path), "CXX": f"{compiler} -pipe"}
    assert answer(run_python(TRIES, **environment))[:2] == ["cpu", "0"]
    assert list((tmp_path / "kernels").glob("*.so"))


@pytest.mark.slow
def test_a_compiler_too_old_for_this_cpu_compiles_for_an_older_one(tmp_path):
    best, *others = list(build.ISA_FLAGS)[list(build.ISA_FLAGS).index(build.isa()) :]
    if not others:
        pytest.skip("this CPU has nothing that a compiler could lack")
    (compiler, *_), (unknown, *_) = build.find_compiler(), build.ISA_FLAGS[best]
    old = tmp_path / "old-c++"
    old.write_text(f'#!/bin/sh\ncase " $* " in *" {unknown} "*) exit 1;; esac\nexec {compiler} "$@"\n')
    old.chmod(0o755)
    assert answer(run_python(TRIES, CXX=str(old), BLOCKVIT_CACHE=str(tmp_path)))[:3] == ["cpu", "0", best]
    assert [p.name.split("-")[1] for p in (tmp_path / "kernels").glob("*.so")] == others[:1]


@pytest.mark.slow
def test_a_cpu_without_avx_gets_a_library_of_its_own(tmp_path):
    environment = {"BLOCKVIT_CACHE": str(tmp_path), "ATEN_CPU_CAPABILITY": "default"}
    assert answer(run_python(TRIES, **environment))[:3] == ["cpu", "0", "baseline"]
    assert [p.name.split("-")[1] for p in (tmp_path / "kernels").glob("*.so")] == ["baseline"]


@pytest.mark.without_kernel
@pytest.mark.parametrize("compiler", ["/nowhere/c++", "false"])
def test_without_a_working_compiler_one_warning_and_another_backend(tmp_path, compiler):
    name, count, _, *message = answer(run_python(TRIES, BLOCKVIT_CACHE=str(tmp_path), CXX=compiler))
    assert (name, count) == ("gather", "1")
    assert "CPU kernel is not available" in message[0]
    assert ("install g++ or clang++, or set CXX" if "nowhere" in compiler else "cannot compile") in message[0]
    assert not list(tmp_path.rglob("*.so")) and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.without_kernel
def test_asked_for_by_name_without_a_compiler_it_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKVIT_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setattr(cpu, "load", cpu.load.__wrapped__)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(BackendUnavailableError, match=r"could not be built: no C\+\+ compiler: /nowhere/c\+\+"):
            resolve("cpu", CPU, torch.float32, 16)


@pytest.fixture
def unwritable_cache(tmp_path, monkeypatch):
    """Gives the folder that libraries are built in instead, and a list of what was built."""
    (tmp_path / "a file").touch()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("BLOCKVIT_CACHE", str(tmp_path / "a file"))
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path / "tmp"))
    built = []
    monkeypatch.setattr(build, "_compile", lambda library, target: (built.append(library.isa), target.touch()))
    return tmp_path / "tmp" / f"blockvit-kernels-{os.getuid()}", built


@pytest.mark.without_kernel
def test_a_cache_that_cannot_be_written_is_gone_around_in_one_folder_of_ones_own(unwritable_cache):
    folder, built = unwritable_cache
    made = [build.build(build.Library("operators.cpp", "baseline")) for _ in range(2)]
    assert made[0] == made[1] and made[0].parent == folder and made[0].is_file()
    assert built == ["baseline"], "once, for all processes"
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.without_kernel
@pytest.mark.parametrize("planted", ["open to all", "another user's", "a link", "a file"])
def test_libraries_are_not_taken_from_a_folder_that_others_can_write_to(planted, unwritable_cache, monkeypatch):
    folder, built = unwritable_cache
    elsewhere = folder.with_name("elsewhere")
    elsewhere.mkdir(mode=0o700)
    if planted == "a link":
        folder.symlink_to(elsewhere)
    elif planted == "a file":
        folder.touch()
    else:
        folder.mkdir(mode=0o700)
        folder.chmod(0o777 if planted == "open to all" else 0o700)
    if planted == "another user's":
        user = os.getuid()
        folder.rename(folder.with_name(f"blockvit-kernels-{user + 1}"))
        monkeypatch.setattr(os, "getuid", lambda: user + 1)
    with pytest.raises(
        build.BuildError, match=r"is no folder that only you can write to; remove it, or set \$BLOCKVIT_CACHE"
    ):
        build.build(build.Library("operators.cpp", "baseline"))
    assert not built


@pytest.mark.without_kernel
@pytest.mark.parametrize("writable", [True, False])
def test_a_failed_build_leaves_nothing_behind(writable, unwritable_cache, tmp_path, monkeypatch):
    def fail(library, target):
        raise build.BuildError("no compiler")

    monkeypatch.setattr(build, "_compile", fail)
    if writable:
        monkeypatch.setenv("BLOCKVIT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(build.BuildError, match="no compiler"):
        build.build_for_this_cpu("operators.cpp")
    assert not list((tmp_path / "tmp").iterdir())
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "a file"]


@pytest.mark.without_kernel
def test_the_library_is_named_after_all_that_it_depends_on(monkeypatch):
    names = [build.Library("operators.cpp", isa).name for isa in build.ISA_FLAGS]
    monkeypatch.setattr(torch, "__version__", "9.9")
    names.append(build.Library("operators.cpp", "avx2").name)
    monkeypatch.setattr(build, "FLAGS", ("-O1",))
    names.append(build.Library("operators.cpp", "avx2").name)
    assert len(set(names)) == len(names)


@pytest.mark.without_kernel
def test_the_environment_cannot_name_more_than_the_cpu_has(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: False)
    assert build.isa.__wrapped__() == "baseline"


@pytest.mark.without_kernel
@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ("nothing", "amx"),
        ("permission", "avx512_bf16"),
        ("amx_bf16", "avx512_bf16"),
        ("amx_tile", "avx512_bf16"),
        ("avx512_bf16", "avx512"),
    ],
)
def test_amx_is_used_where_the_cpu_has_all_of_it_and_the_system_grants_it(monkeypatch, missing, expected):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    has = {feature: feature != missing for feature in ("avx512_f", "avx512_bf16", "amx_tile", "amx_bf16")}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: missing != "permission")
    assert build.isa.__wrapped__() == expected


# --- attention -------------------------------------------------------------------------------------------------------


def heads(tokens, dtype=torch.float32, batch=2, count=3, size=16):
    """``(batch, count, tokens, size)`` as a projection leaves them: the heads of a token side by side."""
    return torch.randn(batch, tokens, count, size).to(dtype).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [(1, 1), (12, 33), (197, 197), (5, 600)])
def test_attention_is_as_near_float64_as_pytorchs(dtype, tokens):
    q, k, v = heads(tokens[0], dtype), heads(tokens[1], dtype), heads(tokens[1], dtype)
    assert cpu_attention.can_attend(q, k, v)
    ours, theirs = cpu_attention.attend(q, k, v), F.scaled_dot_product_attention(q, k, v)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert ours.dtype == dtype and ours.shape == theirs.shape and ours.transpose(1, 2).is_contiguous()
    errors = [(y.double() - exact).abs().max() for y in (ours, theirs)]
    assert errors[0] <= 2 * errors[1] + 3e-7


@pytest.mark.parametrize(
    "lay_out", [torch.Tensor.contiguous, lambda t: t.mT.contiguous().mT, lambda t: t.expand(4, -1, -1, -1)]
)
def test_attention_of_any_strides(lay_out):
    q, k, v = (lay_out(heads(20, batch=1)) for _ in range(3))
    torch.testing.assert_close(cpu_attention.attend(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_attention_twice_alike_on_any_number_of_threads():
    q, k, v = heads(100), heads(100), heads(100)
    expected, before = cpu_attention.attend(q, k, v), torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(cpu_attention.attend(q, k, v), expected)
    finally:
        torch.set_num_threads(before)


def test_attention_of_nothing():
    q, k = heads(4, batch=0), heads(4, count=0)
    assert cpu_attention.attend(q, q, q).shape == q.shape
    assert cpu_attention.attend(k, k, k).shape == k.shape
    assert cpu_attention.attend(heads(0), heads(4), heads(4)).shape == (2, 3, 0, 16)
    assert not cpu_attention.can_attend(heads(4), heads(0), heads(0))


def test_attention_opcheck():
    for dtype in (torch.float32, torch.bfloat16):
        qkv = heads(7, dtype), heads(9, dtype), heads(9, dtype)
        torch.library.opcheck(torch.ops.blockvit.cpu_attention_no_grad, qkv)
        torch.library.opcheck(torch.ops.blockvit.cpu_attention, [t.requires_grad_() for t in qkv])


def test_attention_refuses_wrong_operands():
    q, k = heads(4), heads(9)
    for arguments, message in (
        ((q.double(), k, k), "all float32 or all bfloat16"),
        ((q, k.bfloat16(), k), "all float32 or all bfloat16"),
        ((q[0], k[0], k[0]), "of shape"),
        ((q, k[:1], k), "2, 1 and 2 in dimension 0"),
        ((q, k, k[..., :8]), "16, 16 and 8 in dimension 3"),
        ((q, k, q), "9 keys and 4 values"),
        ((q, k[:, :, :0], k[:, :, :0]), "0 keys"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.blockvit.cpu_attention(*arguments)


def attention_on_kernel():
    module = MultiheadAttention(32, 4, batch_first=True).eval()
    nn.init.normal_(module.qkv.weight, std=0.3)
    module.use_kernel("cpu")
    return module


@pytest.fixture
def unmeasured():
    """Nothing is known of which attention is faster, and what a test lets believe is forgotten."""
    cpu_attention._beats_pytorch.cache_clear()
    yield
    cpu_attention._beats_pytorch.cache_clear()


@pytest.fixture
def attended(monkeypatch):
    """The calls of our attention kernel."""
    calls, attend = [], cpu_attention.attend
    monkeypatch.setattr(cpu_attention, "attend", lambda *qkv: calls.append(qkv) or attend(*qkv))
    return calls


def test_attention_runs_on_the_kernel_where_that_can_do_what_is_asked(attended):
    module, x = attention_on_kernel(), torch.randn(2, 7, 32)
    reference = MultiheadAttention(32, 4, batch_first=True).eval()
    reference.load_state_dict(module.state_dict())
    mask = torch.zeros(7, 7).bool().triu(1)

    def same(runs, **arguments):
        arguments = {"need_weights": False, **arguments}
        attended.clear()
        torch.testing.assert_close(module(x, x, x, **arguments)[0], reference(x, x, x, **arguments)[0])
        assert len(attended) == runs

    same(0)  # a gradient of the projections is asked for
    with torch.inference_mode():
        same(1)
        same(0, need_weights=True)
        same(0, attn_mask=mask)
        same(0, key_padding_mask=torch.zeros(2, 7).bool())
    with torch.no_grad():
        same(1)
        module.dropout = 0.5
        same(1)  # in evaluation mode
        attended.clear()
        module.train()(x, x, x, need_weights=False)
        assert not attended
        module.eval().double()(x.double(), x.double(), x.double(), need_weights=False)
        assert not attended


def test_derivatives_pass_through_attention_on_the_kernel():
    module, x = attention_on_kernel().requires_grad_(False), torch.randn(1, 5, 32)

    def run(x):
        return module(x, x, x, need_weights=False)[0]

    def derivatives():
        return torch.autograd.functional.jacobian(run, x), torch.func.jacrev(run)(x), torch.vmap(run)(x[None])

    found = derivatives()
    module.use_kernel("torch")
    for mine, theirs in zip(found, derivatives(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("kernel", ["cpu", "auto"])
def test_attention_on_the_kernel_compiles_whole_and_exports(kernel, unmeasured, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(cpu, "beats", lambda ours, theirs: True)
    module, x = attention_on_kernel(), torch.randn(2, 7, 32)
    module.use_kernel(kernel)
    with torch.no_grad():
        expected = module(x, x, x, need_weights=False)[0]
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, x, x, need_weights=False)[0], expected)
        program = torch.export.export(module, (x, x, x), {"need_weights": False})
        assert "cpu_attention" in program.graph_module.code
        torch.testing.assert_close(program.module()(x, x, x, need_weights=False)[0], expected)


@pytest.mark.parametrize("faster", [True, False])
def test_auto_measures_attention_in_the_dtype_at_hand(faster, attended, unmeasured, monkeypatch):
    asked = []
    monkeypatch.setattr(cpu, "beats", lambda ours, theirs: asked.append((ours(), theirs())) or faster)
    module, x = attention_on_kernel(), torch.randn(2, 7, 32)
    module.use_kernel("auto")
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            attended.clear()
            for _ in range(2):
                module.to(dtype)(*[x.to(dtype)] * 3, need_weights=False)
            calls = [qkv for qkv in attended if qkv[0].shape[2] == 7]
            assert len(calls) == (2 if faster else 0)
            ours, theirs = asked.pop()
            assert not asked and ours.dtype == dtype and ours.shape == (1, 4, cpu.TOKENS, 8)
            torch.testing.assert_close(ours, theirs)
    assert not cpu_attention.beats_pytorch(4, 8, torch.float16)


@pytest.mark.parametrize("ask", ["export", "autocast"])
def test_what_is_timed_is_attention_itself_whoever_asks_first(ask, unmeasured, monkeypatch):
    """Under export tensors hold nothing, and under autocast PyTorch's attention would run in another dtype."""
    timed = []

    def beats(ours, theirs):
        timed.extend([ours(), theirs()])
        return True

    monkeypatch.setattr(cpu, "beats", beats)
    module, x = attention_on_kernel(), torch.randn(2, 7, 32)
    module.use_kernel("auto")
    if ask == "export":
        program = torch.export.export(module, (x, x, x), {"need_weights": False})
        assert program.graph_module.code.count("blockvit.cpu_attention.default(") == 1
        assert "scaled_dot_product" not in program.graph_module.code
    else:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            module(*[x.bfloat16()] * 3, need_weights=False)
    assert [type(y) for y in timed] == [torch.Tensor] * 2
    assert timed[0].dtype == timed[1].dtype
    torch.testing.assert_close(*timed)


def test_attention_knows_its_kernels():
    module = attention_on_kernel()
    assert "kernel=cpu" in repr(module)
    with pytest.raises(ValueError, match="kernel is 'triton'; expected 'auto', 'cpu' or 'torch'"):
        module.use_kernel("triton")


def test_attention_of_other_shapes_than_the_kernels_is_pytorchs():
    q, k, v = heads(4, batch=1), heads(9), heads(9)
    assert not cpu_attention.can_attend(q, k, v)
    assert not cpu_attention.can_attend(heads(4), k, v[..., :8])
    assert not cpu_attention.can_attend(heads(4), k.bfloat16(), v.bfloat16())


def test_gradients_of_attention_in_a_graph():
    """Exported without gradients, a program may still be asked for them."""
    module, x = attention_on_kernel(), torch.randn(2, 7, 32)
    with torch.no_grad():
        program = torch.export.export(module, (x, x, x), {"need_weights": False}).module()
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    program(found, found, found, need_weights=False)[0].square().sum().backward()
    module.use_kernel("torch")
    module(expected, expected, expected, need_weights=False)[0].square().sum().backward()
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-4)
    double = [heads(5, torch.float32, 1, 2, 4).requires_grad_() for _ in range(3)]
    torch.autograd.gradgradcheck(
        lambda *qkv: torch.ops.blockvit.cpu_attention(*qkv), double, eps=1e-2, atol=1e-2, rtol=1e-2, nondet_tol=1e-4
    )


def test_what_an_older_version_pickled_still_packs():
    sparse = layer(masked_weight(32, 32, 16, random_mask(32, 32, 16, 0.5)), 16)
    del vars(sparse)["preferred_backend"]
    sparse.use_backend("auto")
    assert_right(sparse, torch.randn(3, 32))
    with pytest.raises(ValueError, match="nonsense"):
        BlockSparseLinear(sparse.bsr, preferred="nonsense")


# --- sanitizers ------------------------------------------------------------------------------------------------------

VARIANTS = {  # the instructions of this CPU; and the shapes of tiles that other CPUs have, with these instructions
    "native": (),
    "4 lanes": ("-DBLOCKVIT_LANES=4",),
    "16 lanes": ("-DBLOCKVIT_LANES=16", "-DBLOCKVIT_REGISTERS=32"),
    "amx": ("-DBLOCKVIT_EMULATE_AMX",),
}


@pytest.mark.slow
@pytest.mark.without_kernel
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_kernel_alone_is_clean_under_sanitizers(tmp_path, variant):
    try:
        compiler = build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    empty = tmp_path / "empty.cpp"
    empty.write_text("int main() {}")
    if subprocess.run([*compiler, *sanitize, empty, "-o", tmp_path / "empty"], capture_output=True).returncode:
        pytest.skip(f"{compiler[0]} cannot link with -fsanitize=address,undefined; install libasan and libubsan")
    program = tmp_path / "test"
    flags = [
        *build.FLAGS,
        "-O1",
        "-g",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
        *build.ISA_FLAGS[build.isa()],
    ]
    sources = [f"-I{build.SOURCES}", TESTS / "cpu_kernels_test.cpp", "-pthread", "-o", program]
    subprocess.run([*compiler, *flags, *sanitize, *VARIANTS[variant], *sources], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("0 failures")


@pytest.mark.slow
@pytest.mark.without_kernel
@pytest.mark.parametrize("isa", ["avx512", "avx512_bf16", "amx"])
def test_the_kernel_compiles_for_cpus_that_this_one_is_not(tmp_path, isa):
    try:
        compiler = build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    if subprocess.run([*compiler, "-dumpmachine"], capture_output=True, text=True).stdout.partition("-")[0] != "x86_64":
        pytest.skip("these instruction sets are those of x86-64")
    (tmp_path / "empty.cpp").touch()
    known = [*compiler, *build.ISA_FLAGS[isa], "-c", tmp_path / "empty.cpp", "-o", tmp_path / "empty.o"]
    if subprocess.run(known, capture_output=True).returncode:
        pytest.skip(f"{compiler[0]} is too old for {isa}")
    library = build.Library("operators.cpp", isa)
    subprocess.run(library.command(compiler, tmp_path / "library.so"), check=True)


@pytest.mark.slow
@pytest.mark.without_kernel
def test_the_kernel_is_right_on_arm(tmp_path):
    compiler, emulator = "aarch64-linux-gnu-g++", "qemu-aarch64"
    if missing := [tool for tool in (compiler, emulator) if not shutil.which(tool)]:
        pytest.skip(f"needs {' and '.join(missing)} (Debian: g++-aarch64-linux-gnu, qemu-user)")
    program = tmp_path / "test"
    sources = [f"-I{build.SOURCES}", TESTS / "cpu_kernels_test.cpp", "-static", "-pthread", "-o", program]
    subprocess.run([compiler, *build.FLAGS, *build.ISA_FLAGS["baseline"], *sources], check=True)
    done = subprocess.run([emulator, program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("0 failures, 4 lanes")


def test_what_is_faster_is_measured_for_each_number_of_threads(monkeypatch):
    asked = []
    monkeypatch.setattr(cpu, "_beats_dense", lambda *key: asked.append(key) or False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert not cpu.beats_dense((64, 32), torch.float32, 32)
    assert asked == [((64, 32), torch.float32, 32, 3)]
