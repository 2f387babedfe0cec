"""Seconds of computing on one GPU: arithmetic or memory, whichever takes longer.

Source of the model: Williams, Waterman and Patterson, "Roofline" (CACM 2009), applied to each
group of kernels; peaks are reduced by the cluster file's efficiencies.
"""

from dataclasses import dataclass
from typing import NamedTuple

from csps.core.errors import ConfigError
from csps.sim.cluster import AnalyticCluster
from csps.sim.model import SimModel, WeightType


class Busy(NamedTuple):
    """Seconds that a GPU is busy, and those of its arithmetic and of its memory in them."""

    seconds: float
    compute_s: float
    memory_s: float


class Compute(NamedTuple):
    """What one rank's part of the model costs. Seconds, `flops` of arithmetic, `bytes` of memory.

    Layers: 2 FLOPs per weight and token; all weights are read once. Logits likewise, for rows
    that are sampled. Attention of a pair: q.k and p.v, so 4 D FLOPs per head and layer
    (FlashAttention, arXiv 2205.14135); keys of single tokens are read besides.
    """

    token_flops_s: float
    weights_bytes_s: float
    row_flops_s: float
    logits_bytes_s: float
    pair_flops_s: float
    key_bytes_s: float

    def busy(self, tokens: float, rows: float, pairs: float, keys: float) -> Busy:
        """`pairs` of prompts' tokens, `keys` that single tokens meet."""
        layers, logits = self.token_flops_s * tokens, self.row_flops_s * rows
        prefill, decode = self.pair_flops_s * pairs, self.pair_flops_s * keys
        weights_s = self.weights_bytes_s if tokens else 0.0
        logits_s = self.logits_bytes_s if rows else 0.0
        keys_s = self.key_bytes_s * keys
        return Busy(
            max(layers, weights_s) + max(logits, logits_s) + prefill + max(decode, keys_s),
            layers + logits + prefill + decode,
            weights_s + logits_s + keys_s,
        )


@dataclass(frozen=True, slots=True)
class Roofline:
    """Rates of one GPU: FLOP/s of linear layers, of logits, of attention; bytes/s of memory."""

    model: SimModel
    linear: float
    logits: float
    attention: float
    memory: float

    def compute(self, weight_parts: int, head_parts: int) -> Compute:
        """Of the busiest rank, weights split in `weight_parts`, heads in `head_parts`."""
        model, config = self.model, self.model.config
        heads = model.most_heads(head_parts)
        logits_flops = 2 * config.vocab_size * config.hidden_size
        return Compute(
            token_flops_s=2 * model.layer_parameters / weight_parts / self.linear,
            weights_bytes_s=model.layer_bytes / weight_parts / self.memory,
            row_flops_s=logits_flops / weight_parts / self.logits,
            logits_bytes_s=model.head_bytes / weight_parts / self.memory,
            pair_flops_s=4 * config.head_dim * heads * config.num_layers / self.attention,
            key_bytes_s=model.kv_token_bytes(head_parts) / self.memory,
        )


def make_roofline(cluster: AnalyticCluster, model: SimModel) -> Roofline:
    """ConfigError if the cluster's GPUs cannot compute in the model's type."""
    gpu, efficiency = cluster.gpu, cluster.efficiency
    linear = gpu.bf16_flops
    if model.weights is WeightType.FP8:
        linear = gpu.fp8_flops
        if not linear:
            raise ConfigError(f"--weights: the GPUs of {cluster.name} have no fp8 arithmetic")
    return Roofline(
        model,
        linear * efficiency.linear,
        gpu.bf16_flops * efficiency.linear,
        gpu.bf16_flops * efficiency.attention,
        gpu.hbm_bytes_per_s * efficiency.hbm,
    )
