"""Exact recall of every layer and KV head of sparse prefills, beside what they report.

python -m csps.bench.audit_recall reads one JSON request from stdin and prints one JSON line per
prompt. One rank, no server: the engine's own attention runs, and after each layer all rows'
softmax is computed once more, in full.

Suffixes: T tokens, N tiles, B tokens of a tile, G query heads per KV head, K KV heads, D head dim,
L keys, J blocks.
"""

import json
import sys
import time

import numpy as np
import torch
from torch import Tensor

from csps.attention.backends.torch_cpu import cpu_kernels
from csps.attention.kv import KVSlots
from csps.attention.prefill import PrefillAttention
from csps.attention.rotate import rotate_rows
from csps.attention.shards import PrefillBatch, SparseSequence
from csps.attention.transfer import KVShape
from csps.checkpoint.config import read_config
from csps.checkpoint.locate import locate
from csps.core.attention import AttentionKind, AttentionParams, CsaConfig
from csps.core.plan import Lane
from csps.engine.kv_pool import KVPool
from csps.model.layers import upcasts
from csps.model.llama import Llama
from csps.model.loader import load_model
from csps.parallel.collectives import SequenceComm
from csps.parallel.mesh import LaneGroups, Mesh
from csps.parallel.overlap import CommClock

CPU = torch.device("cpu")


class Audit:
    """An `Attend` that measures what the attention it wraps kept."""

    def __init__(self, attention: PrefillAttention, block_size: int) -> None:
        self._attention = attention
        self._block_size = block_size
        self.exact: list[float] = []  # by layer, then KV head

    def __call__(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        out = self._attention(layer, q_THD, k_TKD, v_TKD)
        (sequence,) = self._attention.sparse
        assert sequence.choice is not None
        keep_KNJ, counts_GB = sequence.choice.keep.numpy(), sequence.may_probe
        q_TKGD = q_THD.float().unflatten(1, (k_TKD.shape[1], -1))
        for head in range(k_TKD.shape[1]):
            recall = exact_recall(
                q_TKGD[:, head], k_TKD[:, head].float(), keep_KNJ[head], self._block_size
            )
            self.exact.append(float(recall[:, torch.from_numpy(counts_GB)].mean()))
        return out


def exact_recall(q_TGD: Tensor, k_TD: Tensor, keep_NJ: np.ndarray, size: int) -> Tensor:
    """Share of every row's attention mass in its tile's kept blocks: [N, G, B], fp32.

    Of the tiles that chose: all but the prompt's last.
    """
    num_tiles = len(keep_NJ)
    recall = q_TGD.new_empty(num_tiles, q_TGD.shape[1], size)
    scale = q_TGD.shape[2] ** -0.5
    for tile in range(num_tiles):
        rows = slice(tile * size, (tile + 1) * size)
        scores = torch.einsum("bgd,ld->gbl", q_TGD[rows] * scale, k_TD[: rows.stop])
        later = torch.ones(size, size, dtype=torch.bool).triu(1)
        scores[:, :, rows].masked_fill_(later, -torch.inf)
        mass = scores.softmax(-1).unflatten(2, (tile + 1, size)).sum(-1)
        recall[tile] = mass[:, :, torch.from_numpy(keep_NJ[tile, : tile + 1])].sum(-1)
    return recall


class Auditor:
    """The model on one rank, with a pool for one prompt."""

    def __init__(
        self, name: str, dtype: torch.dtype, block_size: int, num_tokens: int, num_threads: int
    ) -> None:
        checkpoint = locate(name)
        config = read_config(checkpoint)
        self._model: Llama = load_model(
            checkpoint, config, dtype=dtype, device=CPU, max_position=num_tokens
        ).eval()
        self._num_blocks = -(-num_tokens // block_size)
        self._pool = KVPool(
            num_layers=config.num_layers,
            num_pages=self._num_blocks,
            block_size=block_size,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            staging_blocks=self._num_blocks,
            dtype=dtype,
            device=CPU,
        )
        self._kernels = cpu_kernels(upcast=upcasts(dtype, CPU), num_threads=num_threads)
        groups = dict.fromkeys(Lane, LaneGroups(None, None, None))
        mesh = Mesh(sp=1, tp=1, s=0, t=0, device=CPU, lanes=groups)
        self._comm = SequenceComm(mesh, Lane.PREFILL, CommClock())
        self._block_size, self._dtype = block_size, dtype

    @torch.inference_mode()
    def audit(
        self, token_ids: list[int], params: AttentionParams, csa: CsaConfig
    ) -> dict[str, object]:
        """Prefill a prompt; what was reported of each head, and what is true."""
        config = self._model.config
        blocks = np.arange(-(-len(token_ids) // self._block_size))
        sequence = SparseSequence(
            seq_id=0,
            params=params,
            block_size=self._block_size,
            num_tokens=len(token_ids),
            first_row=0,
            last_tile=len(blocks) - 1,
            tiles=(blocks,),
            blocks=(blocks,),
            pages=blocks,
        )
        positions = torch.arange(len(token_ids))
        shape = KVShape(self._block_size, config.group_size, config.head_dim, self._dtype, csa.wire)
        attention = PrefillAttention(
            PrefillBatch((), (sequence,), positions),
            self._pool,
            self._comm,
            self._kernels,
            csa,
            shape,
            num_kv_heads=config.num_kv_heads,
            first_head=0,
        )
        audit = Audit(attention, self._block_size)
        begun = time.perf_counter()
        rotate = rotate_rows(self._model.rope_PD, positions, KVSlots(self._pool, positions))
        self._model(torch.tensor(token_ids), positions, audit, rotate)
        (report,) = attention.reports()
        heads = [
            {
                "layer": head.layer,
                "head": head.head,
                "num_probes": head.num_probes,
                "gamma": head.gamma,
                "density": round(head.density, 5),
                "reported": round(head.recall_mean, 5),
                "var": head.recall_var,
                "low": round(head.recall_low, 5),
                "high": round(head.recall_high, 5),
                "exact": round(exact, 5),
            }
            for head, exact in zip(report.heads, audit.exact, strict=True)
        ]
        return {"heads": heads, "wall_s": time.perf_counter() - begun}


def main() -> None:
    """Serve one request of `bench recall`."""
    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    num_tokens = max(len(prompt["token_ids"]) for prompt in request["prompts"])
    auditor = Auditor(
        request["model"],
        getattr(torch, request["dtype"]),
        request["block_size"],
        num_tokens,
        request["threads"],
    )
    csa = CsaConfig(min_recall=request["min_recall"], min_recall_p5=request["min_recall_p5"])
    for prompt in request["prompts"]:
        params = AttentionParams(AttentionKind.CSA, gamma=request["gamma"], seed=prompt["seed"])
        answer = auditor.audit(prompt["token_ids"], params, csa)
        print(json.dumps(answer), flush=True)  # noqa: T201  (the answer of this process)


if __name__ == "__main__":
    main()
