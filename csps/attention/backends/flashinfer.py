"""FlashInfer's kernels (arXiv 2501.01005); only imported where flashinfer is installed and wanted.

Dense prefill and decode are its. The rest stays Triton's: its block-sparse wrappers plan on the
host for each layer's pages, and its merge takes as many partials of every row.
Suffixes: T rows, L keys, H query heads, D head dim.
"""

from flashinfer.prefill import single_prefill_with_kv_cache
from torch import Tensor

from csps.attention.backends import Kernels, triton
from csps.attention.backends.flashinfer_decode import PagedDecode
from csps.attention.backends.flashinfer_tables import natural_log, splits_keys
from csps.attention.backends.triton_decode import num_processors


def partial(q_THD: Tensor, k_LHD: Tensor, v_LHD: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """See `Partial`. FlashAttention-3's way on Hopper, but for rows that leave it idle."""
    num_rows, num_heads, _ = q_THD.shape
    few = splits_keys(num_rows, num_heads, num_processors(q_THD.device))
    # Its offsets are 32 bits wide: of the way that splits keys, those of heads too.
    assert not few or k_LHD.stride(1) * k_LHD.shape[1] < 1 << 32, "keys of heads lie too far apart"
    o_THD, lse_TH = single_prefill_with_kv_cache(
        q_THD, k_LHD, v_LHD, causal=causal, return_lse=True, backend="fa2" if few else "auto"
    )
    natural_log(lse_TH, out=lse_TH)
    return o_THD, lse_TH


def kernels(group_size: int) -> Kernels:
    """For KV heads with `group_size` query heads each."""
    return triton.KERNELS._replace(partial=partial, paged_decode=PagedDecode(group_size))
