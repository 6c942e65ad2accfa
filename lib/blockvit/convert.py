"""From trained masks to block-sparse weights: masks into weights, weights into BSR, a table of every layer's fate."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .attention import MultiheadAttention, expose_projections, exposed_modules
from .bsr import check_block_size, zero_blocks
from .kernels import cpu, named, resolve
from .linear import BlockSparseLinear, dense_warning
from .masks import block_mask, check_scores, expand_mask
from .mlp import GELU, check_fuse, fuse_mlps
from .obstacles import is_used_in_parts, obstacles
from .patches import PatchEmbedding, beats_convolution, is_patch_embedding
from .replace import check_not_hooked, is_hooked, replace_modules
from .supermask import SupermaskLinear, conv_arguments, supermask_layers
from .targets import Targets, matching


@torch.no_grad()
def fold(model: nn.Module) -> nn.Module:
    """Multiply each supermask into its weight, in place; returns ``model``, whose masked layers are plain ones again.

    In evaluation mode the outputs stay the same, for contiguous inputs to the bit (of others PyTorch sums in another
    order), so it is the sparsity in force that is folded (see ``set_sparsity``). Biases are shared with the masked
    layers, weights are new. Attention stays as ``expose_projections`` made it.

    The state dict names the projections so too (``qkv.weight``); ``attention.packed_state_dict`` gives the names of
    ``nn.MultiheadAttention`` back.

    Warns of masked layers that have never been called while others have, or while the model has gradients: something
    may read their weights, past the masks.

    Raises:
        ValueError: the model has no supermask, scores are NaN, or a masked layer has hooks.
    """
    masked = supermask_layers(model)
    if not masked:
        raise ValueError(f"{type(model).__name__} has no supermask layers to fold; call blockvit.sparsify(model) first")
    for layer in masked.values():
        check_scores(layer.block_scores())
    was_trained = any(parameter.grad is not None for parameter in model.parameters())
    replace_modules(model, dict.fromkeys(masked, _folded))
    _warn_of_uncalled(masked, was_trained)
    return model


def _warn_of_uncalled(masked: Mapping[str, nn.Module], was_trained: bool) -> None:
    # No error: a branch that was never taken, as in a model of which only the features were asked for, looks the same.
    # And a model that has just been loaded has called none.
    uncalled = [name for name, layer in masked.items() if not layer.was_called]
    if uncalled and (len(uncalled) < len(masked) or was_trained):
        though = "others were" if len(uncalled) < len(masked) else "the model has gradients"
        warnings.warn(
            f"these masked layers were never called, though {though}: {', '.join(uncalled)}. If the model reads "
            "their weights without calling them, their masks had no effect until now and folding changes the outputs: "
            "leave them out of blockvit.sparsify with skip=. If they were only not needed, nothing is wrong",
            stacklevel=4,  # at the call of fold, which no_grad wraps
        )


def _folded(masked: nn.Module) -> nn.Module:
    if isinstance(masked, SupermaskLinear):
        dense = nn.Linear(masked.in_features, masked.out_features, bias=False, device="meta")
    else:
        dense = nn.Conv2d(**conv_arguments(masked))
    dense.weight = nn.Parameter(masked.effective_weight(), requires_grad=masked.weight.requires_grad)
    dense.bias = masked.bias
    return dense.train(masked.training)


@dataclass(frozen=True)
class LayerFate:
    """What conversion does with one layer.

    ``sparsity`` is the fraction of its blocks that are all zero; ``fate`` is ``"converted"``, ``"padded"`` (converted,
    sizes rounded up to multiples of the block size) or ``"dense"``, and ``reason`` says why it stays dense. ``backend``
    is what runs a layer that has been converted already; it may be ``"dense"`` too.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    sparsity: float
    fate: str
    reason: str = ""
    backend: str = ""


def layer_fates(
    model: nn.Module,
    block_size: int,
    *,
    targets: Targets | None = None,
    skip: Targets | None = (),
    min_sparsity: float = 0.0,
) -> list[LayerFate]:
    """What ``to_block_sparse`` would do with each linear and convolution of ``model``, by the same choice of layers.

    Attention projections are listed as the modules that they would become. ``model`` is left as it is.
    """
    modules = exposed_modules(model)
    return _fates(modules, _chosen(model, modules, targets, skip), check_block_size(block_size), min_sparsity)


_LINEAR = nn.Linear, BlockSparseLinear


def _chosen(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    targets: Targets | None,
    skip: Targets | None,
    types: tuple[type[nn.Module], ...] = _LINEAR,
) -> Collection[str]:
    """The names of the layers that ``to_block_sparse`` is asked to look at."""
    if supermask_layers(model):
        raise ValueError("the model still has supermask layers; call blockvit.fold(model) before converting it")
    if targets is None and not skip:  # a model without a linear layer is no error yet
        return modules
    return matching(model, targets, skip, types=types, modules=modules)


def _fates(
    modules: Mapping[str, nn.Module], chosen: Collection[str], block_size: int, min_sparsity: float
) -> list[LayerFate]:
    if not 0 <= min_sparsity <= 1:
        raise ValueError(f"min_sparsity is {min_sparsity}; expected a fraction in [0, 1]")
    hindered = obstacles(modules, _LINEAR)
    return [
        _fate(name, module, block_size, hindered.get(name), name in chosen, min_sparsity)
        for name, module in modules.items()
        if isinstance(module, nn.Linear | nn.Conv2d | BlockSparseLinear)
    ]


def _fate(
    name: str, module: nn.Module, block_size: int, obstacle: str | None, chosen: bool, min_sparsity: float
) -> LayerFate:
    kind = type(module).__name__
    if isinstance(module, BlockSparseLinear):
        shape = (module.out_features, module.in_features)
        fate = _converted(shape, module.block_size)
        return LayerFate(name, kind, shape, module.sparsity, fate, backend=module.backend.name)
    if is_lazy(module.weight):
        return LayerFate(name, kind, (), 0.0, "dense", "not initialised: the model was never called")
    shape = tuple(module.weight.shape)
    if isinstance(module, nn.Conv2d):
        zero = float((module.weight == 0).float().mean())
        return LayerFate(name, kind, shape, zero, "dense", "a convolution; BSR kernels are for linear layers")
    sparsity = float(zero_blocks(module.weight, block_size).float().mean()) if 0 not in shape else 0.0
    if obstacle is not None:
        return LayerFate(name, kind, shape, sparsity, "dense", obstacle)
    if type(module) is not nn.Linear:
        return LayerFate(name, kind, shape, sparsity, "dense", "a subclass of nn.Linear, which may compute otherwise")
    if not chosen:
        return LayerFate(name, kind, shape, sparsity, "dense", "not among the targets")
    if sparsity == 0:
        return LayerFate(name, kind, shape, sparsity, "dense", f"no {block_size}x{block_size} block is all zero")
    if sparsity < min_sparsity:
        return LayerFate(name, kind, shape, sparsity, "dense", f"sparsity below min_sparsity={min_sparsity:g}")
    return LayerFate(name, kind, shape, sparsity, _converted(shape, block_size))


def _converted(shape: tuple[int, int], block_size: int) -> str:
    return "padded" if shape[0] % block_size or shape[1] % block_size else "converted"


@torch.no_grad()
def to_block_sparse(
    model: nn.Module,
    block_size: int = 32,
    backend: str = "auto",
    *,
    targets: Targets | None = None,
    skip: Targets | None = (),
    min_sparsity: float = 0.0,
    fuse_gelu: bool = True,
    fuse_mlp: bool | str = "auto",
    dense_backend: str | None = None,
) -> nn.Module:
    """Replace each ``nn.Linear`` that holds zero blocks by a ``BlockSparseLinear``, in place; returns ``model``.

    Args:
        model: a folded model, or any whose linear weights hold blocks of zeros.
        block_size: edge length of the blocks; need not divide the layers' sizes, nor be the one trained with.
        backend: ``"auto"`` or a registered backend's name. Layers that an earlier call converted go to the backend that
            is named, too; ``"auto"`` leaves them where they are.
        targets: which layers to look at, in the language of ``sparsify``; None means every ``nn.Linear``.
        skip: layers to leave dense, in the same language. None: none.
        min_sparsity: leave layers dense whose fraction of zero blocks is below this.
        fuse_gelu: in an ``nn.Sequential``, let a converted layer apply the ``nn.GELU`` that follows it. Not in one that
            a ``forward`` above indexes, slices, iterates or hands on, as far as its source tells.
        fuse_mlp: make a ``BlockSparseMLP``, which can run as one kernel, of each ``nn.Sequential`` that begins with two
            converted layers: ``"auto"`` where that kernel runs here and now (both layers on the ``"triton"`` backend),
            True also for a model that is yet to be moved to a GPU, False nowhere.
        dense_backend: the backend for linear layers that would otherwise stay dense, whatever ``targets`` says; layers
            in ``skip`` are left alone. None leaves them ``nn.Linear``. A backend's name converts them too, in blocks of
            ``DENSE_BLOCK_SIZE``: frozen and, except on ``"cpu"``, held twice (BSR parts and packed form). A ViT's patch
            embedding becomes a ``patches.PatchEmbedding``, and on ``"cpu"`` every ``MultiheadAttention`` takes our
            kernel between its projections, whatever ``skip`` says of those. ``"auto"`` measures: on a CPU, what our
            kernels do at least a tenth faster than PyTorch's own at one image's tokens goes to them, shape by shape.
            Other convolutions and subclasses of ``nn.Linear`` stay.

    Raises:
        ValueError: no layer holds a zero block and no ``dense_backend`` is given (the message lists each layer's
            fate), a mask is not folded yet, a target matches nothing or names a layer that cannot be replaced (see
            ``sparsify``), a layer to be replaced has hooks, or one was converted before in blocks of another size. The
            model is then as it was.
        BackendUnavailableError: the backend cannot run these weights where they are.
    """
    check_fuse(fuse_mlp)
    skip = skip if skip is None or isinstance(skip, str) or callable(skip) else tuple(skip)  # it is gone through twice
    modules = exposed_modules(model)
    types = _LINEAR if dense_backend is None else (*_LINEAR, nn.Conv2d)
    chosen = _chosen(model, modules, targets, skip, types)
    fates = _fates(modules, chosen, check_block_size(block_size), min_sparsity)
    converts = [f.name for f in fates if f.fate != "dense" and f.kind != BlockSparseLinear.__name__]
    if not converts and dense_backend is None and not any(f.fate != "dense" for f in fates):
        listing = "\n".join(f"  {f.name} {f.shape}: {f.reason}" for f in fates)
        raise ValueError(
            f"no layer holds a {block_size}x{block_size} block of zeros, so there is nothing to convert:\n{listing}\n"
            "train with blockvit.sparsify and blockvit.fold, or try a smaller block_size"
        )

    def convert(linear: nn.Linear) -> BlockSparseLinear:
        return BlockSparseLinear.from_dense(linear, block_size, backend=backend)

    before = _converted_before({name: modules[name] for name in modules if name in chosen}, block_size, backend)
    for name in converts:  # all that can be refused is, before the first layer is replaced
        weight = modules[name].weight
        resolve(backend, weight.device, weight.dtype, block_size)
    replacements = dict.fromkeys(converts, convert)
    if dense_backend is not None:
        not_skipped = _chosen(model, modules, None, skip, types)
        remaining = {n: m for n, m in modules.items() if n in not_skipped and n not in converts}
        replacements |= _place_dense(remaining, modules, dense_backend)
    check_not_hooked({name: modules[name] for name in replacements})
    expose_projections(model)
    replace_modules(model, replacements)
    if dense_backend in ("auto", "cpu"):
        for attention in (m for m in model.modules() if isinstance(m, MultiheadAttention)):
            attention.use_kernel(dense_backend)
    if backend != "auto":
        for layer in before:
            layer.use_backend(backend)
    _warn_of_dense([model.get_submodule(name) for name in converts])
    if fuse_gelu:
        _fuse_gelu(model)
    return fuse_mlps(model, fuse_mlp)


def _converted_before(modules: Mapping[str, nn.Module], block_size: int, backend: str) -> list[BlockSparseLinear]:
    """The layers among ``modules`` that an earlier call converted; raises if they cannot be what this one asks for."""
    # Those without zeros were placed by `dense_backend`, in blocks of a size that nobody chose.
    layers = {n: m for n, m in modules.items() if isinstance(m, BlockSparseLinear) and m.sparsity > 0}
    for name, layer in layers.items():
        if layer.block_size != block_size:
            raise ValueError(
                f"{name} was converted before, in blocks of {layer.block_size}, and block_size is {block_size}; pass "
                f"block_size={layer.block_size}, leave the layer out with skip=, or convert the folded model anew"
            )
        resolve(backend, layer._held.device, layer._held.dtype, block_size)
    return list(layers.values())


def _warn_of_dense(layers: list[BlockSparseLinear]) -> None:
    if layers and all(layer.requested_backend == "auto" and layer.backend.name == "dense" for layer in layers):
        warnings.warn(dense_warning(layers[0]), stacklevel=4)  # at the call of to_block_sparse, which no_grad wraps


DENSE_BLOCK_SIZE = 32
"""Of layers without zero blocks: wide enough for every panel of outputs, and 1000 classes are padded to 1024 only."""


def _place_dense(
    layers: Mapping[str, nn.Module], modules: Mapping[str, nn.Module], backend: str
) -> dict[str, Callable[[nn.Module], nn.Module]]:
    """What is to be made of which of the dense ``layers`` among ``modules``."""
    if backend != "auto":
        named(backend)

    def chosen(layer: nn.Module) -> bool:
        weight = layer.weight
        if backend != "auto":
            return resolve(backend, weight.device, weight.dtype, DENSE_BLOCK_SIZE).name != "dense"
        if weight.device.type != "cpu":
            return False
        if isinstance(layer, nn.Linear):
            return cpu.beats_dense(tuple(weight.shape), weight.dtype, DENSE_BLOCK_SIZE)
        out, channels, patch_size, _ = weight.shape
        return beats_convolution(out, channels, patch_size, weight.dtype, DENSE_BLOCK_SIZE)

    def convert(layer: nn.Module) -> nn.Module:
        make = BlockSparseLinear.from_dense if isinstance(layer, nn.Linear) else PatchEmbedding.from_conv
        return make(layer, DENSE_BLOCK_SIZE, backend=backend, preferred="cpu" if backend == "auto" else None)

    hindered = obstacles(modules, (nn.Linear, nn.Conv2d))
    layers = {name: module for name, module in layers.items() if name and name not in hindered}
    able = {n: m for n, m in layers.items() if (type(m) is nn.Linear or is_patch_embedding(m)) and not is_hooked(m)}
    return dict.fromkeys([name for name, layer in able.items() if chosen(layer)], convert)


def _fuse_gelu(model: nn.Module) -> None:
    # A layer that stands in several places is followed by the GELU in one of them only. And a subclass of
    # nn.Sequential with its own forward may do anything between two children. Hooks are owed the values in between.
    # Nor may a forward above call a layer and put something between it and the GELU.
    places = Counter(id(child) for parent in model.modules() for child in parent._modules.values())
    modules = dict(model.named_modules(remove_duplicate=False))
    plain = {n: m for n, m in modules.items() if type(m).forward is nn.Sequential.forward and "forward" not in vars(m)}
    taken_apart = {id(sequence) for name, sequence in plain.items() if is_used_in_parts(name, modules)}
    for sequence in plain.values():
        if id(sequence) in taken_apart:
            continue
        children = list(sequence._modules.items())  # not named_children(), which names a shared child once
        for (_, layer), (name, follower) in pairwise(children):
            fusable = isinstance(layer, BlockSparseLinear) and layer.activation is None and places[id(layer)] == 1
            if fusable and type(follower) is nn.GELU and not is_hooked(layer) and not is_hooked(follower):
                layer.activation = GELU[follower.approximate]
                setattr(sequence, name, nn.Identity())


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, what backends packed included; memory that is shared counts once."""
    tensors = [part for tensor in (*model.parameters(), *model.buffers()) for part in _parts(tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that hold the memory of ``tensor``: itself, or those that it wraps, as that of 2:4 sparsity does."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in _parts(getattr(tensor, name))]


@torch.no_grad()
def random_block_mask_(weight: torch.Tensor, sparsity: float, block_size: int, generator: torch.Generator) -> None:
    """Set a random choice of blocks of ``weight`` to zero, in place: as many as a supermask would drop.

    For measuring speed, which depends on how many blocks stay and hardly on which.
    """
    blocks = [-(-size // block_size) for size in weight.shape]
    mask = block_mask(torch.rand(blocks, generator=generator), sparsity).to(weight.device)
    weight.mul_(expand_mask(mask, block_size, tuple(weight.shape)))
