"""Multi-head attention whose projections are ordinary linear modules.

``nn.MultiheadAttention`` holds its input projections as bare parameters and never calls ``out_proj``: it reads
``out_proj.weight``. A masked or block-sparse layer put in its place would be ignored without a word. Here ``qkv`` and
``out_proj`` are modules that are called, so that whatever stands there takes effect.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import cpu_attention
from .replace import is_hooked, replace_modules


class MultiheadAttention(nn.Module):
    """Drop-in for ``nn.MultiheadAttention`` with the same call, outputs and (through a load hook) checkpoints.

    Submodules: ``qkv`` ``(3 * embed_dim, embed_dim)`` and ``out_proj`` ``(embed_dim, embed_dim)``; where keys or
    values have their own width, ``q_proj``, ``k_proj`` and ``v_proj`` instead of ``qkv``.

    Made of one by ``from_torch``, or anew with the arguments and the first weights of ``nn.MultiheadAttention``; in
    neither way with ``add_bias_kv`` or ``add_zero_attn``. Attention runs through ``scaled_dot_product_attention``
    unless weights are asked for, or ``use_kernel`` has said otherwise.

    Attributes:
        kernel: as ``use_kernel`` was told; ``"torch"`` at first.
    """

    kernel = "torch"

    # nn.TransformerEncoderLayer takes a fused inference path that reads weights instead of calling modules; these two
    # attributes, which it asks for first, keep it from doing so.
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        widths = bias, add_bias_kv, add_zero_attn, kdim, vdim
        self._take_over(nn.MultiheadAttention(embed_dim, num_heads, dropout, *widths, batch_first, device, dtype))
        self.register_load_state_dict_pre_hook(rename_packed_projection)

    @classmethod
    def from_torch(cls, mha: nn.MultiheadAttention) -> MultiheadAttention:
        """Take over the parameters of ``mha`` (shared where they keep their shape); same outputs.

        Raises:
            NotImplementedError: ``mha`` was made with ``add_bias_kv`` or ``add_zero_attn``.
            ValueError: a weight of ``mha`` is computed from others.
        """
        new = cls(mha.embed_dim, mha.num_heads, kdim=mha.kdim, vdim=mha.vdim, device="meta")
        new._take_over(mha)
        return new.train(mha.training)

    def _take_over(self, mha: nn.MultiheadAttention) -> None:
        if mha.bias_k is not None or mha.bias_v is not None or mha.add_zero_attn:
            raise NotImplementedError(
                "nn.MultiheadAttention with add_bias_kv or add_zero_attn is not supported; "
                "build the model without them, or replace this module yourself"
            )
        self.embed_dim, self.num_heads = mha.embed_dim, mha.num_heads
        self.dropout, self.batch_first = mha.dropout, mha.batch_first
        bias = mha.in_proj_bias
        if mha._qkv_same_embed_dim:
            self.qkv = _linear(mha.in_proj_weight, bias)
        else:
            biases = (None, None, None) if bias is None else bias.detach().chunk(3)
            for name, b in zip("qkv", biases, strict=True):
                weight = getattr(mha, f"{name}_proj_weight")
                b = None if b is None else nn.Parameter(b.clone(), requires_grad=bias.requires_grad)
                setattr(self, f"{name}_proj", _linear(weight, b))
        self.out_proj = _linear(mha.out_proj.weight, mha.out_proj.bias)

    def use_kernel(self, name: str) -> None:
        """What multiplies queries, keys and values where no mask, dropout or weights are asked for.

        Args:
            name: ``"torch"``: PyTorch's kernel. ``"cpu"``: ours, whenever it can (``cpu_attention.can_attend``).
                ``"auto"``: ours, if it is faster on this CPU at one image's tokens, which is measured once for each
                size, dtype and number of threads.
        """
        if name not in ("auto", "cpu", "torch"):
            raise ValueError(f"kernel is {name!r}; expected 'auto', 'cpu' or 'torch'")
        self.kernel = name

    def _is_for_our_kernel(self, q: Tensor, k: Tensor, v: Tensor) -> bool:
        if self.kernel == "torch" or not cpu_attention.can_attend(q, k, v):
            return False
        return self.kernel == "cpu" or cpu_attention.beats_pytorch(self.num_heads, q.shape[-1], q.dtype)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention.forward``.

        ``query`` is ``(N, L, E)`` if ``batch_first``, else ``(L, N, E)``, or ``(L, E)`` unbatched; ``key`` and
        ``value`` alike with length S. Boolean masks are True where attention is *not* allowed. Returns the output,
        shaped as ``query``, and the attention weights ``(N, L, S)`` (``(N, heads, L, S)`` unless averaged) or None.
        """
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is a hint about attn_mask; pass the causal attn_mask with it")
        batched = query.dim() == 3
        shared_input = key is query and value is query
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))

        if key.shape[:2] != value.shape[:2]:
            raise ValueError(
                f"key is {tuple(key.shape)} and value {tuple(value.shape)}, (N, S, width); expected as many of each"
            )
        q, k, v = (self._split_heads(t) for t in self._project(query, key, value, shared_input))
        mask = self._merge_masks(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            attended, weights = _attend_with_weights(q, k, v, mask, dropout)
            weights = weights.mean(dim=1) if average_attn_weights else weights
        elif mask is None and dropout == 0 and self._is_for_our_kernel(q, k, v):
            attended, weights = cpu_attention.attend(q, k, v), None
        else:
            attended, weights = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout), None
        out = self.out_proj(attended.transpose(1, 2).flatten(2))

        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor, shared: bool) -> tuple[Tensor, Tensor, Tensor]:
        if not hasattr(self, "qkv"):
            return self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if shared:
            return self.qkv(query).chunk(3, dim=-1)
        # Cross attention through one module: `qkv` may be masked or block-sparse, so its weight cannot be sliced here;
        # each input goes through all of it and the third that belongs to it is kept.
        return tuple(self.qkv(t).chunk(3, dim=-1)[i] for i, t in enumerate((query, key, value)))

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _merge_masks(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
        """One additive mask that broadcasts to ``(N, heads, L, S)``, or None."""
        merged = None
        if attn_mask is not None:
            merged = _additive(attn_mask, q)
            if merged.dim() == 3:  # (N * heads, L, S)
                merged = merged.unflatten(0, (q.shape[0], self.num_heads))
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, q)[:, None, None, :]
            merged = padding if merged is None else merged + padding
        return merged

    def extra_repr(self) -> str:
        """Sizes, for ``repr``."""
        sizes = f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"
        return sizes if self.kernel == "torch" else f"{sizes}, kernel={self.kernel}"


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    if not isinstance(weight, nn.Parameter):
        raise ValueError(
            f"an nn.MultiheadAttention's {tuple(weight.shape)} weight is no parameter but computed from others; remove "
            "its parametrization or pruning (torch.nn.utils.parametrize.remove_parametrizations, prune.remove) first"
        )
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight, linear.bias = weight, bias
    return linear


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -math.inf)
    if not mask.is_floating_point():
        raise TypeError(f"a mask is {mask.dtype}; expected torch.bool, True where attention is not allowed, or floats")
    return mask.to(like.dtype)


def _attend_with_weights(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    weights = F.dropout((scores if mask is None else scores + mask).softmax(dim=-1), p=dropout)
    return weights @ v, weights


def rename_packed_projection(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
) -> None:
    """Let checkpoints of ``nn.MultiheadAttention`` load: ``in_proj_weight`` is ``qkv.weight`` here."""
    for name in ("weight", "bias"):
        packed = state_dict.pop(f"{prefix}in_proj_{name}", None)
        if packed is not None and hasattr(module, "qkv"):
            state_dict[f"{prefix}qkv.{name}"] = packed
        elif packed is not None:
            for part, chunk in zip("qkv", packed.chunk(3), strict=True):
                state_dict[f"{prefix}{part}_proj.{name}"] = chunk
    for part in "qkv":
        if f"{prefix}{part}_proj_weight" in state_dict:
            state_dict[f"{prefix}{part}_proj.weight"] = state_dict.pop(f"{prefix}{part}_proj_weight")


def packed_state_dict(model: nn.Module) -> dict[str, Any]:
    """``model.state_dict()``, its attention's entries named and packed as ``nn.MultiheadAttention`` has them.

    A model whose attention was never replaced loads it. Masks and block-sparse parts are left as they are named.
    """
    state = model.state_dict()
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, MultiheadAttention):
            continue
        prefix = f"{name}." if name else ""
        for tensor, packed in {"qkv.weight": "in_proj_weight", "qkv.bias": "in_proj_bias"}.items():
            if f"{prefix}{tensor}" in state:
                state[f"{prefix}{packed}"] = state.pop(f"{prefix}{tensor}")
        for part in "qkv":
            if f"{prefix}{part}_proj.weight" in state:
                state[f"{prefix}{part}_proj_weight"] = state.pop(f"{prefix}{part}_proj.weight")
        if f"{prefix}q_proj.bias" in state:
            state[f"{prefix}in_proj_bias"] = torch.cat([state.pop(f"{prefix}{part}_proj.bias") for part in "qkv"])
    return state


def _is_replaceable(module: nn.Module) -> bool:
    plain = type(module) is nn.MultiheadAttention and not is_hooked(module)
    return plain and module.bias_k is None and not module.add_zero_attn


def exposed_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of ``model`` by name, as they would be after ``expose_projections``; ``model`` is left as it is."""
    _check_not_attention(model)
    made: dict[int, MultiheadAttention] = {}
    modules: dict[str, nn.Module] = {}
    within = None
    for name, module in model.named_modules(remove_duplicate=False):
        if within is not None and name.startswith(within):
            continue
        if _is_replaceable(module):
            within = f"{name}."
            if id(module) not in made:
                made[id(module)] = MultiheadAttention.from_torch(module)
            modules.update(made[id(module)].named_modules(prefix=name))
        else:
            modules[name] = module
    return modules


def expose_projections(model: nn.Module, only: Collection[str] | None = None) -> nn.Module:
    """Replace every ``nn.MultiheadAttention`` below ``model`` by one with real modules, in place; same outputs.

    ``only``: the names of those to replace, if not all.

    Subclasses stay as they are, because they may compute otherwise, and so do those with hooks, ``add_bias_kv`` or
    ``add_zero_attn``: to mask their ``out_proj`` is an error, see ``targets.obstacles``. PyTorch's fused inference
    paths, which read the weights of a whole ``nn.TransformerEncoderLayer`` without calling its modules, are turned off
    for all of them.

    Raises:
        ValueError: ``model`` is an ``nn.MultiheadAttention`` itself, or one below it has computed weights.
    """
    _check_not_attention(model)
    found = [name for name, module in model.named_modules(remove_duplicate=False) if _is_replaceable(module)]
    found = [name for name in found if only is None or name in only]
    replace_modules(model, dict.fromkeys(found, MultiheadAttention.from_torch))
    turn_off_fused_paths(model)
    return model


def turn_off_fused_paths(model: nn.Module) -> None:
    """Let every ``nn.TransformerEncoderLayer`` of ``model`` call its modules, in inference too."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):  # its fused path for padded batches asks for in_proj_weight
            module.use_nested_tensor = False
        if isinstance(module, nn.TransformerEncoderLayer):
            # Nothing but the fused path reads this. With a subclass of nn.MultiheadAttention it would be taken still,
            # past masks on linear1 and linear2.
            module.activation_relu_or_gelu = 0


def _check_not_attention(model: nn.Module) -> None:
    if type(model) is nn.MultiheadAttention:
        raise ValueError("the model is itself an nn.MultiheadAttention; use MultiheadAttention.from_torch on it")
