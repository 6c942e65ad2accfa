"""Finding launch parameters for this machine's GPU: ``python -m blockvit.tune``.

One case after the other is searched within a time limit, and what is found is stored at once (``kernels.tuning``),
where the backend reads it. For ``torch_tuned``, PyTorch's BSR kernel, which knows good parameters for a few shapes on
an A100 only, its own search is run, ``torch.sparse._triton_ops_meta.tune_bsr_dense_addmm``; ``triton`` is our kernel.

    python -m blockvit.tune                                          # ViT-B/16's layers, five minutes
    python -m blockvit.tune --backend triton --tokens 50432 197      # our kernel, a large batch and a single image
    python -m blockvit.tune --backend triton_mlp                     # our fused MLP, against the layers one by one
    python -m blockvit.tune --block-sizes 64 --dtypes bfloat16 --tokens 197 --seconds 60

Exit codes: 0 done, as far as the time allowed; 1 no parameters work for a case; 2 wrong arguments; 3 no GPU.

- ``cases``: the products, their operands and results. ``search``: from parameters to better ones, each checked.
- ``torch_bsr``, ``triton_linear``, ``triton_mlp``: a kernel each. ``tuners``: case after case; ``command``.
"""

from .cases import Case, case_key, make_cases, make_operands, triton_key
from .command import main
from .search import Found
from .tuners import TUNERS, Tuned, Tuner, tune

__all__ = [
    "TUNERS",
    "Case",
    "Found",
    "Tuned",
    "Tuner",
    "case_key",
    "main",
    "make_cases",
    "make_operands",
    "triton_key",
    "tune",
]
