"""Exchanges between ranks whose bytes are proportional to something that is counted."""

from typing import NamedTuple

from csps.core.model_config import ModelConfig
from csps.sched.volumes import Volumes
from csps.sim.fabric import Fabric, Group
from csps.sim.model import ELEMENT_BYTES


class Exchange(NamedTuple):
    """All layers' exchanges of one kind: seconds and bytes (of all ranks) per unit.

    `latency_s`: of all layers, whatever the units. Nothing between ranks there are none of.
    """

    kind: str
    unit_s: float = 0.0
    unit_bytes: float = 0.0
    latency_s: float = 0.0


def sums(fabric: Fabric, config: ModelConfig, group: Group) -> Exchange:
    """Two all-reduces a layer of hidden rows. Unit: a token of every rank of the group."""
    num_ranks = fabric.sp * fabric.tp
    row = config.hidden_size * ELEMENT_BYTES
    each = Volumes(config, group.size, ELEMENT_BYTES).all_reduces(1)
    return Exchange(
        "hidden",
        2 * config.num_layers * fabric.all_reduce(group, row),
        config.num_layers * each * (num_ranks // group.size),
        2 * config.num_layers * fabric.collective_s(group),
    )


def spread(
    kind: str, fabric: Fabric, config: ModelConfig, num_bytes: float, exchanges: int
) -> Exchange:
    """Over the sequence axis, `num_bytes` a layer and unit of all ranks together, sent evenly by
    all to all, in so many exchanges.
    """
    group = fabric.sequence
    each = num_bytes / fabric.sp / fabric.tp
    return Exchange(
        kind,
        config.num_layers * fabric.all_to_all(group, each),
        config.num_layers * num_bytes if group.size > 1 else 0.0,
        config.num_layers * exchanges * fabric.collective_s(group),
    )


def logits(fabric: Fabric, config: ModelConfig, group: Group) -> Exchange:
    """Parts of the vocabulary, in fp32, to one rank. Unit: a row that is sampled."""
    num_bytes = config.vocab_size * 4 * (group.size - 1) / group.size
    return Exchange(
        "logits",
        fabric.all_to_all(group, num_bytes / group.size),
        num_bytes,
        fabric.collective_s(group),
    )
