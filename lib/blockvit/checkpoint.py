"""Block-sparse models on disk: safetensors with metadata.

A file holds the BSR parts of every converted layer, the other tensors as they are, and, as JSON in the header, what is
needed to build the model again: no pickle, no code.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from . import architecture, files
from .attention import MultiheadAttention, expose_projections, turn_off_fused_paths
from .bsr import BSRMatrix
from .kernels import cpu
from .linear import BlockSparseLinear
from .mlp import check_fuse, fuse_mlps
from .patches import PatchEmbedding, is_patch_embedding
from .replace import all_or_nothing, replace_modules

FORMAT = 1


def sha256(source: str | os.PathLike | Mapping[str, Tensor]) -> str:
    """Hex digest of a file's bytes, or of a state dict's names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    if isinstance(source, Mapping):
        for name in sorted(source):
            tensor = source[name].detach().cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    else:
        with Path(source).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
    return digest.hexdigest()


def save(
    model: nn.Module, path: str | os.PathLike, *, source: str | os.PathLike | Mapping[str, Tensor] | None = None
) -> Path:
    """Write a block-sparse ``model`` to ``path`` (``.safetensors``), atomically; returns the path.

    Args:
        model: what ``to_block_sparse`` returned; wrapped by ``torch.compile`` or ``DistributedDataParallel`` or not.
        path: the file to write; its folder is made.
        source: what the model was made from, a checkpoint file or a state dict. Its hash is kept, so that ``load`` can
            tell a cached conversion of this checkpoint from one of another.

    Raises:
        ValueError: the model has no block-sparse layer.
    """
    model = _unwrapped(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    sparse = {name: m for name, m in modules.items() if isinstance(m, BlockSparseLinear)}
    if not sparse:
        raise ValueError("the model has no block-sparse layers; call blockvit.to_block_sparse(model) before saving it")
    metadata = {
        "format": FORMAT,
        "versions": {"torch": torch.__version__},
        "model": type(model).__name__,
        "architecture": architecture.arguments_of(model),
        "attention": [name for name, m in modules.items() if isinstance(m, MultiheadAttention)],
        "attention_kernels": {name: m.kernel for name, m in modules.items() if isinstance(m, MultiheadAttention)},
        "source_sha256": None if source is None else sha256(source),
        "layers": {
            name: {
                "shape": [m.out_features, m.in_features],
                "block_size": m.block_size,
                "sparsity": round(m.sparsity, 6),
                "activation": m.activation,
            }
            for name, m in sparse.items()
        },
        "patch_embeddings": {
            name: [m.channels, m.patch_size] for name, m in modules.items() if isinstance(m, PatchEmbedding)
        },
        "identities": [name for name, m in modules.items() if type(m) is nn.Identity],
    }
    if extra := [name for name, state in model.state_dict().items() if not isinstance(state, Tensor)]:
        warnings.warn(f"not saved, because it is no tensor: {', '.join(extra)}", stacklevel=2)
    # Tied weights are written once for each name: safetensors holds no aliases.
    tensors = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in _state(model).items()}
    path = Path(path)
    files.write(path, safetensors_bytes(tensors, metadata={"blockvit": json.dumps(metadata)}))
    return path


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model within what only calls it: its names are those that another model of the kind has."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel | AveragedModel):
            model = model.module
        elif "_orig_mod" in model._modules:  # torch.compile's; to ask for its class would import the compiler
            model = model._orig_mod
        else:
            return model


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """The metadata of a file that ``save`` wrote: model, layers with block size and sparsity, versions, source hash."""
    return _read(Path(path), with_tensors=False)[0]


def _read(path: Path, *, with_tensors: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    files.check_file(path, "write it with blockvit.save(model, path)")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("blockvit")
            tensors = {name: file.get_tensor(name) for name in file.keys()} if with_tensors else {}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}); save or copy it again") from error
    if header is None:
        raise ValueError(f"{path} was not written by blockvit.save: it holds no 'blockvit' metadata")
    try:
        metadata = json.loads(header)
        known = metadata["format"] == FORMAT
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} has damaged metadata ({error!r}); save or copy it again") from error
    if not known:
        raise ValueError(
            f"{path} has format {metadata['format']}; this version reads format {FORMAT}: convert the model again"
        )
    if missing := [name for name in _ENTRIES if name not in metadata]:
        raise ValueError(f"{path} has damaged metadata: it holds no {missing}; save or copy it again")
    return metadata, tensors


_ENTRIES = ("model", "architecture", "attention", "source_sha256", "layers", "identities")
"""What the metadata of every file of this format holds."""


def load(
    path: str | os.PathLike,
    model: nn.Module | None = None,
    *,
    backend: str = "auto",
    fuse_mlp: bool | str = "auto",
    source: str | os.PathLike | Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Read a block-sparse model that ``save`` wrote, in evaluation mode; nothing is converted anew.

    Args:
        path: the file.
        model: a dense model of the same architecture, replaced in place, wrapped or not. Not needed for torchvision's
            ``VisionTransformer``, which is built from the file, unless modules, settings or hooks of it were changed.
        backend: ``"auto"``, the preferred one on this machine, or a backend's name. ``"auto"`` measures, on a CPU,
            whether layers without zeros, which ``dense_backend`` placed, are faster on our kernel. Attention keeps
            what ``use_kernel`` was told before it was saved if ``backend`` is ``"auto"`` or ``"cpu"``; else it is
            PyTorch's.
        fuse_mlp: as for ``to_block_sparse``. A file does not say: it is the same for fused and unfused models.
        source: what the model should have been made from; raises if the file was made from something else.

    Raises:
        FileNotFoundError: no such file.
        IsADirectoryError: it is a folder.
        ValueError: the file is truncated, foreign, made from another source, or of another architecture than
            ``model``, which is then as it was; ``model`` is needed and missing; or it is on the meta device, and not
            all of it is in the file.
        BackendUnavailableError: the backend asked for cannot run here.
    """
    check_fuse(fuse_mlp)
    path, wrapped = Path(path), model
    metadata, tensors = _read(path, with_tensors=True)
    if source is not None and metadata["source_sha256"] != sha256(source):
        raise ValueError(
            f"{path} was made from another source (sha256 {metadata['source_sha256']}) than the one given; "
            "convert and save the model again"
        )
    if model is None:
        if metadata["architecture"] is None:
            raise ValueError(
                f"{path} holds a {metadata['model']}, which cannot be built from the file alone; "
                "pass a dense model of that architecture: blockvit.load(path, model)"
            )
        model = architecture.build(metadata["architecture"])
    else:
        model = _unwrapped(model)
    assign = _is_meta(model)
    with all_or_nothing(model):
        exposed = metadata["attention"]  # names; of older files whether all are
        if exposed:
            expose_projections(model, None if exposed is True else exposed)
        try:
            _place_layers(model, metadata, tensors, backend)
        except AttributeError as error:
            raise ValueError(
                f"{path} holds a {metadata['model']} that {type(model).__name__} cannot take: {error}"
            ) from None
        except KeyError as error:
            raise ValueError(f"{path} is damaged: it holds no {error}; save or copy it again") from None
        problems = mismatches(model, tensors)
        if problems:
            raise ValueError(f"{path} is of another architecture than {type(model).__name__}:\n" + "\n".join(problems))
        if empty := [name for name, tensor in model.named_buffers() if tensor.is_meta and name not in tensors]:
            raise ValueError(
                f"{type(model).__name__} is on the meta device, and its buffers {', '.join(empty)} are in no file "
                "(they are not persistent); make the model on the CPU: blockvit.load(path, model)"
            )
    turn_off_fused_paths(model)
    if not assign:
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name in tensors:  # a half-precision file gives a half-precision model
                tensor.data = tensor.data.to(tensors[name].dtype)
    placed = tuple(f"{name}." for name in metadata["layers"])  # these were packed from the file; all names are known
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(placed)}
    model.load_state_dict(rest, strict=False, assign=assign)
    for name, kernel in metadata.get("attention_kernels", {}).items():  # older files have no such entry
        model.get_submodule(name).use_kernel(kernel if backend in ("auto", "cpu") else "torch")
    fuse_mlps(model.eval(), fuse_mlp)
    return model if wrapped is None else wrapped.eval()


def _is_meta(model: nn.Module) -> bool:
    """Whether ``model`` has no memory yet, so that it takes the file's tensors instead of copies of them."""
    on_meta = {tensor.is_meta for tensor in (*model.parameters(), *model.buffers())}
    if len(on_meta) > 1:
        raise ValueError(
            f"part of {type(model).__name__} is on the meta device; call model.to_empty(device='cpu') first, or leave "
            "all of it there"
        )
    return on_meta == {True}


def _place_layers(model: nn.Module, metadata: dict[str, Any], tensors: dict[str, Tensor], backend: str) -> None:
    def place(name: str, layer: dict[str, Any], old: nn.Module) -> BlockSparseLinear:
        there = getattr(old, "out_features", None), getattr(old, "in_features", None)
        if there != tuple(layer["shape"]):
            raise ValueError(
                f"the file is of another architecture than {type(model).__name__}: {name} is "
                f"{tuple(layer['shape'])} in the file, {there if any(there) else type(old).__name__} in the model"
            )
        device = next((t.device for t in _state(old).values() if t.device.type != "meta"), torch.device("cpu"))
        parts = [tensors[f"{name}.{part}"].to(device) for part in ("crow_indices", "col_indices", "values")]
        bias = tensors[f"{name}.bias"].to(device) if f"{name}.bias" in tensors else None
        learnt = getattr(old, "bias", None) is None or old.bias.requires_grad
        return BlockSparseLinear(
            BSRMatrix(*parts, tuple(layer["shape"])).check_indices(),
            None if bias is None else nn.Parameter(bias, requires_grad=learnt and bias.is_floating_point()),
            backend=backend,
            preferred="cpu" if backend == "auto" and _is_faster_on_cpu_kernel(layer, parts[-1]) else None,
            activation=layer["activation"],
        )

    def place_patches(name: str, channels: int, patch_size: int, old: nn.Module) -> PatchEmbedding:
        out, features = metadata["layers"][f"{name}.linear"]["shape"]
        there = tuple(old.weight.shape) if is_patch_embedding(old) else type(old).__name__
        if there != (out, channels, patch_size, patch_size):
            raise ValueError(
                f"the file is of another architecture than {type(model).__name__}: {name} embeds patches by "
                f"{(out, channels, patch_size, patch_size)} in the file, {there} in the model"
            )
        linear = nn.Linear(features, out, bias=False, device=old.weight.device, dtype=old.weight.dtype)
        linear.bias = old.bias
        placed = place(f"{name}.linear", metadata["layers"][f"{name}.linear"], linear)
        return PatchEmbedding(placed, channels, patch_size)

    embeddings = metadata.get("patch_embeddings", {})  # files of before there were any have no such entry
    within = {f"{name}.linear" for name in embeddings}
    layers = {name: layer for name, layer in metadata["layers"].items() if name not in within}
    replacements = {
        **{name: partial(place_patches, name, *sizes) for name, sizes in embeddings.items()},
        **{name: partial(place, name, layer) for name, layer in layers.items()},
        **dict.fromkeys(_fused_gelus(model, metadata), lambda _: nn.Identity()),
    }
    replace_modules(model, replacements)


def _is_faster_on_cpu_kernel(layer: dict[str, Any], values: Tensor) -> bool:
    """Whether a layer without zeros, which ``dense_backend`` placed, is one for our kernel on this CPU as well."""
    if layer["sparsity"] > 0 or values.device.type != "cpu":
        return False
    return cpu.beats_dense(tuple(layer["shape"]), values.dtype, values.shape[1])


def _fused_gelus(model: nn.Module, metadata: dict[str, Any]) -> list[str]:
    """The ``nn.GELU`` modules of ``model`` in whose place the file's model has an identity.

    The file names every identity there was. Others, such as a head left out or a path never dropped, are the model's
    own affair.
    """
    found = []
    for name in metadata["identities"]:
        own, parent = model.get_submodule(name), name.rpartition(".")[0]
        siblings = list(model.get_submodule(parent)._modules)
        before = siblings[: siblings.index(name.rpartition(".")[2])][-1:]
        layer = metadata["layers"].get(".".join([parent, *before]).lstrip("."), {})
        if type(own) is nn.GELU:
            found.append(name)
        elif type(own) is not nn.Identity and layer.get("activation"):
            raise ValueError(
                f"the file is of another architecture than {type(model).__name__}: {name} is an nn.GELU that the layer "
                f"before it applies in the file, {own} in the model"
            )
    return found


def mismatches(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """What would keep ``tensors`` from loading into ``model``, a line each; empty if nothing does."""
    expected = _state(model)
    lines = [f"  missing from the file: {name}" for name in expected if name not in tensors]
    lines += [f"  not in the model: {name}" for name in tensors if name not in expected]
    lines += [
        f"  {name}: {tuple(tensors[name].shape)} in the file, {tuple(tensor.shape)} in the model"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    return lines
