"""Every backend that can run on this machine's CPU keeps the contract, by comparison with dense matrices."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from blockvit import BackendUnavailableError, BlockSparseLinear, BSRMatrix, backends, to_block_sparse
from blockvit import linear as linear_module
from blockvit.bsr import block_view
from blockvit.kernels import Backend, register, registry, resolve

CPU = torch.device("cpu")
NAMES = sorted(backends())
# Errors of a sum of up to a few hundred products of normal numbers, relative to the largest result.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
DTYPES = tuple(TOLERANCE)
ACTIVATIONS = {None: lambda y: y, "gelu": F.gelu, "gelu_tanh": lambda y: F.gelu(y, approximate="tanh")}


def runs(name: str, dtype: torch.dtype = torch.float32, block_size: int = 16) -> bool:
    return backends()[name].refusal(CPU, dtype, block_size) is None


RUNNABLE = [name for name in NAMES if runs(name)]
every_backend = pytest.mark.parametrize("backend", RUNNABLE)


def linear_with_zero_blocks(
    out_features: int, in_features: int, block_size: int, kept: int | float, *, bias=True, dtype=torch.float32
) -> nn.Linear:
    """A linear layer of which ``kept`` blocks (or that fraction) are left, at random; empty rows are likely."""
    linear = nn.Linear(in_features, out_features, bias=bias)
    rows, cols = -(-out_features // block_size), -(-in_features // block_size)
    kept = kept if isinstance(kept, int) else round(kept * rows * cols)
    mask = torch.zeros(rows * cols, dtype=torch.bool)
    mask[torch.randperm(rows * cols)[:kept]] = True
    elements = mask.view(rows, cols).repeat_interleave(block_size, 0).repeat_interleave(block_size, 1)
    with torch.no_grad():
        nn.init.normal_(linear.weight)
        linear.weight *= elements[:out_features, :in_features]
    return linear.to(dtype)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """``expected`` was computed in float64; compared on the scale of its largest entry."""
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    if expected.numel():
        error = (actual.double() - expected).abs().max() / expected.abs().max().clamp_min(1)
        assert error <= TOLERANCE[dtype], f"relative error {error:.2e} exceeds {TOLERANCE[dtype]:.0e} of {dtype}"


# --- against dense ---------------------------------------------------------------------------------------------------

LAYOUTS = {
    "contiguous": lambda *shape: torch.randn(*shape),
    "transposed": lambda *shape: torch.randn(*reversed(shape)).permute(*reversed(range(len(shape)))),
    "every other": lambda *shape: torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2],
    "expanded": lambda *shape: torch.randn(*shape[1:]).expand(*shape),
    "offset": lambda *shape: torch.randn(shape[0] + 1, *shape[1:])[1:],
}


@every_backend
@settings(max_examples=100)
@given(
    out_features=st.integers(1, 70),
    in_features=st.integers(1, 70),
    block_size=st.sampled_from([1, 2, 3, 4, 8, 16, 32, 128]),
    kept=st.sampled_from([0, 1, 0.1, 0.5, 1.0]),
    leading=st.sampled_from([(1,), (5,), (33,), (2, 3), (1, 1), (2, 1, 3)]),
    layout=st.sampled_from(sorted(LAYOUTS)),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    activation=st.sampled_from([None, "gelu", "gelu_tanh"]),
    seed=st.integers(0, 99),
)
def test_result_and_gradients_equal_dense(
    backend, out_features, in_features, block_size, kept, leading, layout, dtype, bias, activation, seed
):
    if not runs(backend, dtype, block_size):
        with pytest.raises(BackendUnavailableError):
            resolve(backend, CPU, dtype, block_size)
        return
    torch.manual_seed(seed)
    linear = linear_with_zero_blocks(out_features, in_features, block_size, kept, bias=bias, dtype=dtype)
    sparse = BlockSparseLinear.from_dense(linear, block_size, backend=backend, activation=activation)
    x = LAYOUTS[layout](*leading, in_features).to(dtype).requires_grad_()
    y = sparse(x)
    grad_y = torch.randn_like(y)
    grads = torch.autograd.grad(y, [x, sparse.bias] if bias else [x], grad_y)

    dense_x = x.detach().double().requires_grad_()
    dense_bias = linear.bias.detach().double().requires_grad_() if bias else None
    dense_y = ACTIVATIONS[activation](F.linear(dense_x, linear.weight.detach().double(), dense_bias))
    dense_grads = torch.autograd.grad(dense_y, [dense_x, dense_bias] if bias else [dense_x], grad_y.double())

    assert_near(y, dense_y, dtype)
    for grad, dense_grad in zip(grads, dense_grads, strict=True):
        assert_near(grad, dense_grad, dtype)


@every_backend
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_second_derivatives_and_forward_mode_equal_dense(backend, activation):
    linear = linear_with_zero_blocks(20, 12, 8, 0.5)
    sparse = BlockSparseLinear.from_dense(linear, 8, backend=backend, activation=activation)
    x, direction = torch.randn(5, 12, requires_grad=True), torch.randn(5, 12)

    def second(layer):
        wanted = [x, linear.bias]
        first = torch.autograd.grad(layer(x).square().sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), wanted)

    def forward(layer):
        y, along_x = torch.func.jvp(layer, (x.detach(),), (direction,))
        return y, along_x, torch.func.jacfwd(torch.func.jacfwd(lambda v: layer(v).sum()))(x.detach()[0])

    def dense(v):
        return ACTIVATIONS[activation](linear(v))

    for derivative in (second, forward):
        torch.testing.assert_close(derivative(sparse), derivative(dense), rtol=1e-4, atol=1e-4)


@every_backend
def test_transforms_of_torch_func_equal_dense(backend):
    linear = linear_with_zero_blocks(20, 12, 8, 0.5)
    sparse = BlockSparseLinear.from_dense(linear, 8, backend=backend, activation="gelu")
    x = torch.randn(5, 12)

    def dense(v):
        return ACTIVATIONS["gelu"](linear(v))

    for transform in (
        lambda layer: torch.func.grad(lambda v: layer(v).square().sum())(x),
        lambda layer: torch.func.vmap(torch.func.grad(lambda v: layer(v).square().sum()))(x),
        lambda layer: torch.func.jacrev(layer)(x),
        lambda layer: torch.func.vmap(layer)(x[:, None]),
    ):
        torch.testing.assert_close(transform(sparse), transform(dense), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["cpu", "gather", "dense"])
def test_is_traced_by_torch_jit(backend):
    model = nn.Sequential(linear_with_zero_blocks(20, 12, 8, 0.5)).requires_grad_(False)
    model = to_block_sparse(model, 8, backend)
    traced, x = torch.jit.trace(model, torch.randn(5, 12)), torch.randn(5, 12)
    torch.testing.assert_close(traced(x), model(x))


@every_backend
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_empty_block_rows_give_the_bias(backend, activation):
    linear = linear_with_zero_blocks(24, 16, 8, 0)
    with torch.no_grad():
        linear.weight[:8] = 1.0
    sparse = BlockSparseLinear.from_dense(linear, 8, backend=backend, activation=activation)
    y = sparse(torch.full((3, 16), float(2)))
    expected = ACTIVATIONS[activation](linear.bias[8:]).expand(3, 16)
    torch.testing.assert_close(y[:, 8:], expected)
    assert (y[:, :8] - ACTIVATIONS[activation](linear.bias[:8])).abs().min() > 1


@every_backend
@pytest.mark.parametrize("leading", [(0,), (0, 7), (2, 0)])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_an_empty_batch_gives_an_empty_result_with_gradients(backend, leading, activation):
    linear = linear_with_zero_blocks(20, 12, 8, 0.5)
    sparse = BlockSparseLinear.from_dense(linear, 8, backend=backend, activation=activation)
    x = torch.randn(*leading, 12, requires_grad=True)
    y = sparse(x)
    assert y.shape == (*leading, 20) and y.dtype == torch.float32
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(sparse.bias.grad, torch.zeros(20))


@every_backend
def test_a_single_vector(backend):
    linear = linear_with_zero_blocks(20, 12, 8, 0.5)
    sparse = BlockSparseLinear.from_dense(linear, 8, backend=backend)
    x = torch.randn(12)
    torch.testing.assert_close(sparse(x), linear(x))


@every_backend
def test_nan_and_inf_stay_in_the_tokens_and_rows_that_read_them(backend):
    linear = linear_with_zero_blocks(16, 16, 8, 0)
    with torch.no_grad():
        linear.weight[:8, :8] = 1.0
        linear.weight[8:, 8:] = 1.0
    x = torch.ones(3, 16)
    x[1, 2] = float("nan")
    y = BlockSparseLinear.from_dense(linear, 8, backend=backend)(x)
    assert y[1, :8].isnan().all()
    assert torch.isfinite(y[[0, 2]]).all()
    if backend != "dense":  # which multiplies by its zeros
        assert torch.isfinite(y[1, 8:]).all()


@every_backend
def test_input_and_weight_are_left_unchanged(backend):
    sparse = BlockSparseLinear.from_dense(linear_with_zero_blocks(20, 12, 8, 0.5), 8, backend=backend)
    before = copy.deepcopy(sparse.state_dict())
    x = torch.randn(4, 12)
    kept = x.clone()
    sparse(x)
    assert torch.equal(x, kept)
    for name, tensor in sparse.state_dict().items():
        assert torch.equal(tensor, before[name])


@every_backend
def test_a_wrong_width_is_an_error(backend):
    sparse = BlockSparseLinear.from_dense(linear_with_zero_blocks(20, 12, 8, 0.5), 8, backend=backend)
    with pytest.raises(ValueError, match="the input's last size is 16; expected in_features=12"):
        sparse(torch.randn(4, 16))  # 16 would fit the padded weight


# --- the compiler ----------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    """Dynamo counts recompilations of ``forward`` over all modules; a limit of 8 would stop the later tests."""
    torch._dynamo.reset()


@every_backend
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_compiles_without_graph_breaks(fresh_compiler, backend, activation):
    sparse = BlockSparseLinear.from_dense(
        linear_with_zero_blocks(20, 12, 8, 0.5), 8, backend=backend, activation=activation
    )
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    for shape in [(4, 12), (2, 3, 12), (5, 12)]:
        x = torch.randn(*shape, requires_grad=True)
        y, expected = compiled(x), sparse(x)
        torch.testing.assert_close(y, expected)
        ours, theirs = (torch.autograd.grad(out.square().sum(), [x, sparse.bias]) for out in (y, expected))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
@every_backend
def test_compiles_with_inductor(fresh_compiler, backend):
    sparse = BlockSparseLinear.from_dense(
        linear_with_zero_blocks(20, 12, 8, 0.5), 8, backend=backend, activation="gelu"
    )
    x = torch.randn(2, 3, 12)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(sparse, fullgraph=True)(x), sparse(x))


@every_backend
def test_exports_with_a_dynamic_batch(backend):
    if backend == "gather" and torch.__version__ < "2.12":
        pytest.skip("torch.export of 2.11 guards on a stride that is symbolic here, and so refuses a dynamic batch")
    sparse = BlockSparseLinear.from_dense(linear_with_zero_blocks(20, 12, 8, 0.5), 8, backend=backend).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(sparse, (torch.randn(4, 12),), dynamic_shapes=({0: batch},))
    x = torch.randn(9, 12)
    torch.testing.assert_close(program.module()(x), sparse(x))


def test_pytorchs_operator_passes_opcheck():
    from blockvit.kernels import torch_bsr

    if not runs("torch"):
        pytest.skip(backends()["torch"].refusal(CPU, torch.float32, 16))
    matrix = BSRMatrix.from_dense(linear_with_zero_blocks(16, 24, 8, 0.5).weight, 8)
    parts = matrix.crow_indices, matrix.col_indices, matrix.values, 16
    for x in (torch.randn(5, 24), torch.randn(24, 5).t(), torch.randn(1, 24)):
        for bias in (None, torch.randn(16, requires_grad=True)):
            torch.library.opcheck(torch_bsr._linear, (x.requires_grad_(), *parts, bias))


def test_without_the_cpu_kernel_auto_stays_dense_below_the_measured_break_even(monkeypatch):
    monkeypatch.setattr(backends()["cpu"], "refusal", lambda device, dtype, block_size: "no compiler")
    chosen = {s: resolve("auto", CPU, torch.float32, 32, s).name for s in (0.0, 0.5, 0.9)}
    assert chosen == {0.0: "dense", 0.5: "dense", 0.9: "gather"}


# --- the module ------------------------------------------------------------------------------------------------------


@every_backend
def test_changing_the_dtype_packs_again(backend):
    if not runs(backend, torch.float64):
        pytest.skip(backends()[backend].refusal(CPU, torch.float64, 16))
    linear = linear_with_zero_blocks(20, 12, 8, 0.5)
    sparse = BlockSparseLinear.from_dense(linear, 8, backend=backend).to(torch.float64)
    x = torch.randn(3, 12, dtype=torch.float64)
    assert_near(sparse(x), linear.double()(x), torch.float64)
    assert all(b.dtype == torch.float64 for b in sparse.buffers() if b.is_floating_point())


def test_auto_finds_another_backend_when_the_dtype_changes(picky, monkeypatch):
    monkeypatch.setattr(picky, "refusal", lambda device, dtype, block_size: "half" if dtype.itemsize == 2 else None)
    sparse = BlockSparseLinear.from_dense(linear_with_zero_blocks(32, 16, 16, 0.5), 16)
    assert sparse.backend is picky
    assert sparse.to(torch.bfloat16).backend is not picky
    assert sparse(torch.randn(2, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert sparse.to(torch.float32).backend is picky


def test_a_backend_asked_for_by_name_refuses_a_dtype_it_cannot_run():
    sparse = BlockSparseLinear.from_dense(linear_with_zero_blocks(32, 16, 16, 0.5), 16, backend="torch")
    with pytest.raises(BackendUnavailableError, match=r"cannot run torch\.bfloat16 on cpu"):
        sparse.to(torch.bfloat16)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.to(torch.float64),
        lambda layer: layer.use_backend("dense"),
        lambda layer: layer.load_state_dict({name: t.clone() for name, t in layer.state_dict().items()}),
    ],
    ids=["to", "use_backend", "load_state_dict"],
)
def test_a_layer_that_cannot_be_packed_stays_as_it_was(change, bias, monkeypatch):
    layer = BlockSparseLinear.from_dense(linear_with_zero_blocks(20, 12, 8, 0.5, bias=bias), 8, backend="gather")
    x = torch.randn(3, 12)
    expected = layer(x)
    expected.sum().backward() if bias else None
    state, attributes = dict(layer.named_buffers()), {n: v for n, v in vars(layer).items() if not n.startswith("_")}

    def fail(weight):
        raise torch.OutOfMemoryError("no memory to pack in")

    with monkeypatch.context() as broken, pytest.raises(torch.OutOfMemoryError):
        for backend in ("gather", "dense"):
            broken.setattr(backends()[backend], "pack", fail)
        change(layer)
    assert dict(layer.named_buffers()).keys() == state.keys()
    assert all(tensor is state[name] for name, tensor in layer.named_buffers())
    assert {n: v for n, v in vars(layer).items() if not n.startswith("_")} == attributes
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in layer.parameters())
    assert torch.equal(layer(x), expected)
    change(layer)
    torch.testing.assert_close(layer(x.to(layer.values.dtype)).float(), expected)


def test_gather_refuses_the_meta_device_which_leaves_the_layer_where_it_was():
    layer = BlockSparseLinear.from_dense(linear_with_zero_blocks(32, 16, 16, 0.5), 16, backend="gather")
    with pytest.raises(BackendUnavailableError, match="which tensors on the meta device do not hold"):
        layer.to("meta")
    assert layer(torch.randn(2, 16)).shape == (2, 32)


@every_backend
def test_deepcopy_is_independent(backend):
    sparse = BlockSparseLinear.from_dense(linear_with_zero_blocks(20, 12, 8, 0.5), 8, backend=backend)
    x = torch.randn(3, 12)
    expected = sparse(x)
    other = copy.deepcopy(sparse)
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            if tensor.is_floating_point():
                tensor.zero_()
    assert torch.equal(sparse(x), expected)


@every_backend
def test_unpickled_in_another_process_it_is_packed_anew_and_a_copy_is_not(backend, monkeypatch):
    sparse = BlockSparseLinear.from_dense(linear_with_zero_blocks(20, 12, 8, 0.5), 8, backend=backend)
    x, pack, packed = torch.randn(3, 12), sparse.backend.pack, []
    monkeypatch.setattr(sparse.backend, "pack", lambda weight: packed.append(weight) or pack(weight))
    copy.deepcopy(sparse)
    assert not packed
    written = pickle.dumps(sparse)
    monkeypatch.setattr(linear_module, "_PROCESS", "another")
    torch.testing.assert_close(pickle.loads(written)(x), sparse(x))
    assert len(packed) == 1


def test_unpickled_where_its_backend_cannot_run_auto_finds_another(monkeypatch):
    sparse = BlockSparseLinear.from_dense(linear_with_zero_blocks(32, 64, 16, 1), 16)
    x, written = torch.randn(3, 64), pickle.dumps(sparse)
    monkeypatch.setattr(sparse.backend, "refusal", lambda device, dtype, block_size: "not here")
    other = pickle.loads(written)
    assert other.backend is not sparse.backend
    torch.testing.assert_close(other(x), sparse(x))


@every_backend
@pytest.mark.parametrize("kept", [0, 1, 5, 1.0])
def test_state_dict_loads_into_a_module_with_another_number_of_blocks(backend, kept):
    source = BlockSparseLinear.from_dense(linear_with_zero_blocks(20, 12, 8, kept), 8, backend=backend)
    target = BlockSparseLinear.from_dense(linear_with_zero_blocks(20, 12, 8, 3), 8, backend=backend)
    assert set(source.state_dict()) == {"crow_indices", "col_indices", "values", "bias"}
    target.load_state_dict(source.state_dict())
    x = torch.randn(3, 12)
    assert torch.equal(target(x), source(x))
    assert not source(x).eq(0).all()


@every_backend
def test_state_dict_of_another_block_size_loads(backend):
    source = BlockSparseLinear.from_dense(linear_with_zero_blocks(20, 20, 8, 0.5), 8, backend=backend)
    target = BlockSparseLinear.from_dense(linear_with_zero_blocks(20, 20, 16, 0.5), 16, backend=backend)
    target.load_state_dict(source.state_dict())
    x = torch.randn(3, 20)
    assert torch.equal(target(x), source(x))
    assert target.block_size == 8


def test_loading_keeps_the_modules_dtype_as_a_dense_layer_does():
    source = BlockSparseLinear.from_dense(linear_with_zero_blocks(16, 16, 8, 2), 8)
    target = BlockSparseLinear.from_dense(linear_with_zero_blocks(16, 16, 8, 1), 8).to(torch.bfloat16)
    target.load_state_dict(source.state_dict())
    assert target.values.dtype == torch.bfloat16
    x = torch.randn(3, 16)
    assert_near(target(x.bfloat16()), source(x).double(), torch.bfloat16)


def test_loading_damaged_indices_is_an_error():
    sparse = BlockSparseLinear.from_dense(linear_with_zero_blocks(16, 16, 8, 1.0), 8)
    state = sparse.state_dict() | {"col_indices": torch.tensor([0, 9, 0, 1], dtype=torch.int32)}
    with pytest.raises(RuntimeError, match=r"col_indices must lie in \[0, 2\)"):
        sparse.load_state_dict(state)


@every_backend
def test_values_come_back_whatever_order_they_are_held_in(backend):
    matrix = BSRMatrix.from_dense(linear_with_zero_blocks(40, 24, 8, 0.5).weight, 8)
    sparse = BlockSparseLinear(matrix, backend=backend)
    assert torch.equal(sparse.values, matrix.values) and torch.equal(sparse.bsr.to_dense(), matrix.to_dense())
    assert torch.equal(sparse.state_dict()["values"], matrix.values)
    assert sparse.sparsity == matrix.sparsity and sparse.values.dtype == torch.float32
    for other in ("gather", "cpu", "dense", backend):
        sparse.use_backend(other)
        assert torch.equal(sparse.values, matrix.values)
    sparse.use_backend("auto")
    assert torch.equal(sparse.bfloat16().values, matrix.values.bfloat16())


def test_the_cpu_kernel_holds_its_weight_once():
    sparse = BlockSparseLinear.from_dense(linear_with_zero_blocks(40, 24, 8, 0.5), 8, backend="cpu")
    held = [name for name, tensor in sparse.named_buffers() if tensor.numel() == sparse.values.numel()]
    assert held == ["_packed_weight"]
    sparse.state_dict()
    sparse.to(torch.bfloat16).to(torch.float32)
    assert sparse._buffers["values"] is None


@every_backend
@pytest.mark.parametrize("through", ["cpu", "meta"])
def test_memory_that_was_emptied_takes_a_state_dict(backend, through):
    sparse = BlockSparseLinear.from_dense(linear_with_zero_blocks(40, 24, 8, 0.5), 8, backend=backend)
    x, state = torch.randn(3, 24), {name: tensor.clone() for name, tensor in sparse.state_dict().items()}
    y = sparse(x)
    if through == "meta":
        sparse.requested_backend = "auto"  # no other can be there
        with warnings.catch_warnings(action="ignore"):
            sparse.to("meta")
        sparse.requested_backend = backend
    sparse.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(sparse(x), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "gather", "dense"])
def test_a_memory_format_for_images_leaves_the_weight_alone(backend, dtype):
    sparse = BlockSparseLinear.from_dense(linear_with_zero_blocks(40, 24, 8, 0.5), 8, backend=backend).to(dtype)
    x = torch.randn(3, 24, dtype=dtype)
    y = sparse(x)
    assert torch.equal(sparse.to(memory_format=torch.channels_last)(x), y)


def test_bias_is_shared_and_trainable_and_a_plain_tensor_is_a_buffer():
    linear = linear_with_zero_blocks(16, 16, 8, 2)
    sparse = BlockSparseLinear.from_dense(linear.eval(), 8)
    assert sparse.bias is linear.bias and [*sparse.parameters()] == [linear.bias]
    assert not sparse.training
    frozen = BlockSparseLinear(sparse.bsr, linear.bias.detach())
    assert not [*frozen.parameters()] and "bias" in frozen.state_dict()


@every_backend
@pytest.mark.parametrize("shape", [(3, 12), (0, 12)], ids=str)
def test_an_input_of_another_dtype_is_an_error_that_names_both(backend, shape):
    sparse = BlockSparseLinear.from_dense(linear_with_zero_blocks(20, 12, 8, 0.5), 8, backend=backend)
    with pytest.raises(ValueError, match=r"the input is torch\.float16, the weight torch\.float32; use x\.to"):
        sparse(torch.randn(shape, dtype=torch.float16))
    with torch.autocast("cpu", torch.bfloat16):
        assert sparse(torch.randn(shape, dtype=torch.float16)).dtype == torch.float32


def test_reading_the_weight_says_that_there_is_none():
    layer = BlockSparseLinear.from_dense(nn.Linear(8, 8), 4)
    assert not hasattr(layer, "weight") and getattr(layer, "weight", None) is None
    with pytest.raises(AttributeError, match=r"has no dense weight; .* leave the layer out .* with skip="):
        F.linear(torch.ones(8), layer.weight)
    with pytest.raises(AttributeError, match="no attribute 'wieght'"):
        layer.wieght  # noqa: B018
    assert torch.equal(pickle.loads(pickle.dumps(layer)).values, layer.values)


def test_padding_is_inside_and_repr_tells():
    sparse = BlockSparseLinear.from_dense(linear_with_zero_blocks(10, 20, 16, 1), 16, backend="gather")
    assert (sparse.out_features, sparse.in_features) == (10, 20)
    text = "in_features=20, out_features=10, bias=True, block_size=16, sparsity=0.500, backend='gather'"
    assert text in repr(sparse)


# --- the registry ----------------------------------------------------------------------------------------------------


@pytest.fixture
def picky():
    """A backend that refuses this machine, registered for one test."""

    class Picky(Backend):
        name = "picky"

        @classmethod
        def refusal(cls, device, dtype, block_size):
            return f"it wants blocks of 7, not {block_size}" if block_size != 7 else None

        @classmethod
        def preference(cls, device, dtype, block_size, sparsity=1.0):
            return 99.0

        @staticmethod
        def pack(weight):
            return {"weight": weight.to_dense(padded=True)}

        @staticmethod
        def linear(x, packed, bias, activation):
            return F.linear(x, packed["weight"], bias) + 1000

    register(Picky)
    yield Picky
    del registry._BACKENDS["picky"]


def test_auto_takes_the_preferred_among_those_that_can(picky):
    assert resolve("auto", CPU, torch.float32, 7) is picky
    assert resolve("auto", CPU, torch.float32, 8) is not picky
    sparse = BlockSparseLinear.from_dense(linear_with_zero_blocks(7, 7, 7, 1), 7)
    assert sparse(torch.zeros(1, 7)).min() > 900


def test_auto_on_cpu_prefers_the_kernel_then_gather_to_dense_and_to_pytorchs_bsr():
    ranks = {name: backends()[name].preference(CPU, torch.float32, 32) for name in NAMES}
    assert ranks["cpu"] > ranks["gather"] > ranks["dense"] > ranks["torch"]


def test_an_unavailable_backend_says_why_and_what_can(picky):
    with pytest.raises(BackendUnavailableError) as error:
        BlockSparseLinear.from_dense(linear_with_zero_blocks(8, 8, 8, 1), 8, backend="picky")
    for part in ("'picky'", "torch.float32 on cpu", "blocks of 8", "it wants blocks of 7, not 8", "auto", "'gather'"):
        assert part in str(error.value)


def test_pytorchs_backend_refuses_half_precision_on_cpu():
    with pytest.raises(BackendUnavailableError, match=r"cannot run torch\.bfloat16 on cpu.*float32 and float64 only"):
        resolve("torch", CPU, torch.bfloat16, 16)


@pytest.mark.parametrize("block_size", [8, 24])
def test_pytorchs_backend_refuses_odd_blocks_on_cuda(block_size):
    assert "power of two and at least 16" in backends()["torch"].refusal(
        torch.device("cuda"), torch.float32, block_size
    )


def test_no_backend_at_all(monkeypatch):
    monkeypatch.setattr(registry, "_BACKENDS", {"torch": backends()["torch"]})
    with pytest.raises(
        BackendUnavailableError, match=r"no backend runs torch\.bfloat16 on cpu in blocks of 16 \(torch:"
    ):
        resolve("auto", CPU, torch.bfloat16, 16)


def test_unknown_backend_and_activation():
    weight = BSRMatrix.from_dense(torch.ones(4, 4), 2)
    with pytest.raises(ValueError, match=r"backend is 'cuda'; expected 'auto' or one of \['blksprs', 'cpu', 'dense', "):
        BlockSparseLinear(weight, backend="cuda")
    with pytest.raises(ValueError, match=r"activation is 'relu'; expected one of \[None, 'gelu', 'gelu_tanh'\]"):
        BlockSparseLinear(weight, activation="relu")


def test_a_name_registers_once(picky):
    with pytest.raises(ValueError, match="a backend named 'picky' is already registered"):
        register(picky)


def test_the_registry_is_handed_out_as_a_copy():
    backends().clear()
    assert "dense" in backends()


def test_an_incomplete_backend_does_not_count_as_one():
    assert {"refusal", "preference", "pack", "linear"} <= Backend.__abstractmethods__


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16])
def test_result_equals_dense_on_gpu(name, dtype):
    device = torch.device("cuda")
    if refusal := backends()[name].refusal(device, dtype, 32):
        pytest.skip(refusal)
    linear = linear_with_zero_blocks(100, 130, 32, 0.3, dtype=dtype).to(device)
    sparse = BlockSparseLinear.from_dense(linear, 32, backend=name)
    x = torch.randn(2, 50, 130, device=device, dtype=dtype)
    expected = F.linear(x.double(), linear.weight.double(), linear.bias.double())
    if name == "blksprs" and dtype == torch.float32:  # which multiplies in TF32
        torch.testing.assert_close(sparse(x).double(), expected, rtol=0, atol=5e-3 * float(expected.abs().max()))
    else:
        assert_near(sparse(x), expected, dtype)


def test_the_tests_own_masking_leaves_whole_blocks():
    weight = linear_with_zero_blocks(20, 12, 8, 2).weight
    assert int((block_view(weight.detach(), 8) != 0).any(dim=3).any(dim=1).sum()) == 2
