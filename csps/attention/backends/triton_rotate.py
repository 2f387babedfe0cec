"""Rotary embedding by csps_kernels.rope_store, for the triton backend.

Suffixes: T tokens, H query heads, K KV heads, G query heads per KV head, P positions, B tokens of
a page, S slots, D head dim.
"""

from torch import Tensor

from csps.attention.backends import RotateRows
from csps.attention.kv import KVSlots
from csps_kernels.rope_store import Places, rope_store


def rotate(table_PD: Tensor, positions_T: Tensor, slots: KVSlots | None) -> RotateRows:
    """See `Rotate`: one launch, storing included."""

    def run(layer: int, qk_TKGD: Tensor, v_TKD: Tensor) -> tuple[Tensor, Tensor]:
        places = None
        if slots is not None:
            k_KPBD, v_KPBD = slots.store.pages(layer)
            places = Places(slots.slots_T, k_KPBD.flatten(1, 2), v_KPBD.flatten(1, 2))
        return rope_store(qk_TKGD, v_TKD, table_PD, positions_T, places)

    return run
