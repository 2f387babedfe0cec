"""What choosing pages costs in one layer of a long prompt, stage by stage as the engine does it.

Data is random with a planted pattern, so that a tile attends to a known share of the blocks.
Suffixes: T tokens, H query heads, K KV heads, N tiles, J blocks, D head dim.
"""

import functools
import itertools
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from csps.attention.backends import Kernels
from csps.attention.backends.triton import KERNELS
from csps.attention.shards import SparseSequence
from csps.attention.sparse import SparsePrefill
from csps.attention.transfer import KVShape
from csps.core.attention import AttentionKind, AttentionParams, CsaConfig, SparseReport
from csps.core.plan import Lane
from csps.engine.kv_pool import KVPool
from csps.parallel.collectives import SequenceComm
from csps.parallel.mesh import LaneGroups, Mesh
from csps.parallel.overlap import CommClock
from csps.parallel.packets import Packets
from scripts.bench_gpu import dense, patterns
from scripts.bench_gpu.bench import Bench, Row

REPEATS = 5
ATTENDING = ("block_sparse", "diagonal")
NOT_IN_A_LAYER = ("rotate", "paged_decode", "merge")


def run(bench: Bench) -> None:
    """Rows of a dense kernel, and of a sparse layer at each density: whole, and in parts."""
    heads = dense.random_heads(bench, bench.sizes.long)
    dense.measure(bench, heads, dense.PEERS)
    del heads
    for clusters, page_size in itertools.product(
        bench.sizes.clusters, bench.sizes.selection_page_sizes
    ):
        layer = Layer(bench, clusters, page_size)
        name = f"planted 1/{clusters}, blocks of {page_size}"
        bench.case(f"{name}: layer", functools.partial(_whole, bench, layer))
        bench.case(f"{name}: parts", functools.partial(_parts, bench, layer))


class Layer:
    """One layer of one prompt on one rank: its keys are in the store, its queries come by stage."""

    def __init__(self, bench: Bench, clusters: int, page_size: int) -> None:
        self._bench, self._page_size = bench, page_size
        sizes, model = bench.sizes, bench.sizes.model
        heads = patterns.planted(bench, sizes.long, clusters, page_size)
        self._q_THD, self._k_TKD, self._v_TKD = (x.transpose(0, 1).contiguous() for x in heads)
        self._out_THD = torch.empty_like(self._q_THD)
        num_blocks = sizes.long // page_size
        self._store = KVPool(
            num_layers=1,
            num_pages=num_blocks,
            block_size=page_size,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            staging_blocks=num_blocks,
            dtype=bench.dtype,
            device=bench.device,
        )
        slots_T = torch.arange(sizes.long, device=bench.device)
        self._store.write(0, slots_T, self._k_TKD, self._v_TKD)
        alone = {Lane.PREFILL: LaneGroups(None, None, None)}
        mesh = Mesh(sp=1, tp=1, s=0, t=0, device=bench.device, lanes=alone)
        self._packets = Packets(SequenceComm(mesh, Lane.PREFILL, CommClock()), eager=False)

    @torch.inference_mode()
    def run(self, kernels: Kernels = KERNELS) -> list[SparseReport]:
        """All stages, by these kernels; what each kept."""
        sizes, model, config = self._bench.sizes, self._bench.sizes.model, CsaConfig()
        shape = KVShape(
            self._page_size, model.group_size, model.head_dim, self._bench.dtype, config.wire
        )
        reports = []
        for start in range(0, sizes.long, sizes.stage):
            rows = slice(start, start + sizes.stage)
            prefill = SparsePrefill(
                self._sequence(start, rows.stop),
                self._store,
                self._packets,
                kernels,
                config,
                shape,
                num_kv_heads=model.num_kv_heads,
                first_head=0,
            )
            q_THD, out_THD = self._q_THD[rows], self._out_THD[rows]
            prefill(0, q_THD, self._k_TKD[rows], self._v_TKD[rows], out_THD)
            reports.append(prefill.report())
        return reports

    def _sequence(self, start: int, stop: int) -> SparseSequence:
        size = self._page_size
        blocks = np.arange(stop // size)
        return SparseSequence(
            seq_id=0,
            params=AttentionParams(AttentionKind.CSA),
            block_size=size,
            num_tokens=stop,
            first_row=0,
            last_tile=-1,
            tiles=(blocks[start // size :],),
            blocks=(blocks,),
            pages=blocks,
        )


def _whole(bench: Bench, layer: Layer) -> Row:
    reports: list[SparseReport] = []

    def work() -> None:
        reports[:] = layer.run()

    timing = bench.timer(work, REPEATS)
    peer = dense.peer_s(bench)
    kept, causal = (sum(getattr(r, key) for r in reports) for key in ("kept_pairs", "causal_pairs"))
    heads = [head for report in reports for head in report.heads]
    return {
        **timing.columns,
        "over_dense": timing.median_s / peer if peer else None,
        "density": kept / causal,
        "heads_dense": sum(head.gamma >= 1.0 for head in heads),
        "heads": len(heads),
        "recall_mean": float(np.mean([head.recall_mean for head in heads])) if heads else None,
    }


def _parts(bench: Bench, layer: Layer) -> Row:
    """Seconds of each kernel, the device at rest before and after it; the rest is mostly lists.

    `selection_s`: all but the attention itself, so that merging partial outputs is in it too.
    """
    clock = KernelClock(bench.device)
    kernels = clock.around(KERNELS)
    layer.run(kernels)
    clock.seconds.clear()
    layer_s = bench.timer.until_done(lambda: layer.run(kernels))
    attention_s = sum(clock.seconds[name] for name in ATTENDING)
    kernels_s = sum(clock.seconds.values())
    peer = dense.peer_s(bench)
    return {
        "layer_s": layer_s,
        **{f"{name}_s": seconds for name, seconds in clock.seconds.items()},
        "rest_s": layer_s - kernels_s,
        "selection_s": layer_s - attention_s,
        "over_dense": (layer_s - attention_s) / peer if peer else None,
        "kernels_over_dense": (kernels_s - attention_s) / peer if peer else None,
    }


class KernelClock:
    """Counts the seconds that kernels take, until the device is done with each."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: Counter[str] = Counter()

    def around(self, kernels: Kernels) -> Kernels:
        """The kernels of a sparse layer, each counted."""
        called = {
            name: self._counted(name, kernel)
            for name, kernel in kernels._asdict().items()
            if name not in NOT_IN_A_LAYER
        }
        return kernels._replace(**{**called, "score": self._score(kernels.score)})

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            begun = self._now()
            result = call(*arguments, **options)
            self.seconds[name] += self._now() - begun
            return result

        return counted

    def _score(self, score: Callable[..., Any]) -> Callable[..., Any]:
        """Scores count when rows meet keys, and when their masses are asked for."""
        scored = self._counted("score", score)
        return lambda *arguments: _Masses(scored(*arguments), self._counted)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class _Masses:
    """`RowScores` whose masses are counted."""

    def __init__(self, scores: Any, counted: Callable[..., Any]) -> None:
        self._scores = scores
        self.masses = counted("masses", scores.masses)

    @property
    def lse(self) -> Tensor:
        return self._scores.lse
