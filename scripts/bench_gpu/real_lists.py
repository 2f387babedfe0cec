"""Block-sparse attention over the pages that a model chose in a real text, in all its layers.

Suffixes: K KV heads, N tiles, J blocks.
"""

import functools
from collections.abc import Sequence

from torch import Tensor

from csps.attention.prefill import PrefillAttention
from csps.core.attention import AttentionParams
from csps.core.model_config import ModelConfig
from csps.core.plan import StepPlan
from csps.engine.lane import LaneEngine
from csps.engine.placements import PlacedAttention, StepInputs, Tables
from csps.model.llama import Attend
from scripts.bench_gpu import dense, patterns
from scripts.bench_gpu.bench import Bench, NotHereError, Row
from scripts.bench_gpu.prefill import Tiled
from scripts.bench_gpu.rank import Rank


class Recording:
    """`PlacedAttention` that remembers what the layers of sparse prompts keep."""

    def __init__(self, placed: PlacedAttention) -> None:
        self._placed = placed
        self.keeps_KNJ: list[Tensor] = []

    def inputs(self, plan: StepPlan, tables: Tables, lane: LaneEngine) -> StepInputs:
        inputs = self._placed.inputs(plan, tables, lane)
        assert isinstance(inputs.attend, PrefillAttention), "only prompts are recorded"
        return inputs._replace(attend=self._recorded(inputs.attend))

    def _recorded(self, attention: PrefillAttention) -> Attend:
        def attend(layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
            out_THD = attention(layer, q_THD, k_TKD, v_TKD)
            (sequence,) = attention.sparse
            self.keeps_KNJ.append(sequence.choice.keep.clone())
            return out_THD

        return attend


def measure(
    bench: Bench,
    config: ModelConfig,
    rank: Rank,
    token_ids: Sequence[int],
    attention: AttentionParams,
) -> None:
    """Rows of a dense kernel and of all layers' lists, on random data of the model's shape."""
    # In several stages each layer would have several choices.
    if len(token_ids) > rank.setup.step_tokens:
        raise NotHereError("the prompt has several stages")
    runner = rank.built.runner
    placed, recording = runner.attention, Recording(runner.attention)
    runner.attention = recording
    try:
        rank.prefill(token_ids, attention, room=1)
    finally:
        runner.attention = placed
        rank.release_all()
    size = rank.setup.block_size
    num_tiles = recording.keeps_KNJ[0].shape[1]
    counts = config.num_heads, config.num_kv_heads, config.num_kv_heads
    heads = dense.Heads(*(bench.normal(n, num_tiles * size, config.head_dim) for n in counts))
    dense.measure(bench, heads, dense.PEERS)
    work = functools.partial(_row, bench, Tiled(heads, size), recording.keeps_KNJ)
    bench.case("real lists: attention of all layers", work)


def _row(bench: Bench, tiled: Tiled, keeps_KNJ: list[Tensor]) -> Row:
    num_heads, num_tiles, _ = keeps_KNJ[0].shape
    kept, lists = [], []
    for keep_KNJ in keeps_KNJ:
        keep_KNN = keep_KNJ[:, :, :num_tiles].clone()
        kept.append(int(keep_KNN.sum()))
        keep_KNN.diagonal(dim1=1, dim2=2).fill_(False)
        lists.append(patterns.page_lists(keep_KNN))

    def work() -> None:
        for layer in lists:
            tiled.attention(layer)

    timing = bench.timer(work)
    peer = dense.peer_s(bench)
    causal_pairs = num_heads * num_tiles * (num_tiles + 1) // 2
    densities = [count / causal_pairs for count in kept]
    return {
        **timing.columns,
        "layers": len(lists),
        "density": sum(densities) / len(densities),
        "densities": densities,
        "over_dense": timing.median_s / (peer * len(lists)) if peer else None,
    }
