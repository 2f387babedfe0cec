"""Seconds that groups of GPUs take to exchange bytes, over NVLink and the network between nodes.

A replica's rank (s, t) of sp x tp is its GPU s * tp + t, nodes filled in order. Where a group
crosses nodes, the GPUs of a node that send at once share the node's network.
"""

from dataclasses import dataclass

from csps.sim.cluster import AnalyticCluster


@dataclass(frozen=True, slots=True)
class Group:
    """`size` ranks, `local` of which share a node; `sharing`: GPUs of a node that send at once."""

    size: int
    local: int
    sharing: int

    @property
    def nodes(self) -> int:
        return -(-self.size // self.local)


@dataclass(frozen=True, slots=True)
class Fabric:
    """The links of one replica."""

    cluster: AnalyticCluster
    sp: int
    tp: int

    @property
    def sequence(self) -> Group:
        """Ranks that differ in s."""
        per_node = self.cluster.gpus_per_node
        local = min(max(per_node // self.tp, 1), self.sp)
        return Group(self.sp, local, min(self.sp * self.tp, per_node))

    @property
    def tensor(self) -> Group:
        """Ranks that differ in t."""
        per_node = self.cluster.gpus_per_node
        return Group(self.tp, min(self.tp, per_node), min(self.sp * self.tp, per_node))

    @property
    def everyone(self) -> Group:
        num_ranks = self.sp * self.tp
        return Group(num_ranks, *[min(num_ranks, self.cluster.gpus_per_node)] * 2)

    @property
    def nvlink(self) -> float:
        return self.cluster.links.nvlink_bytes_per_s * self.cluster.efficiency.nvlink

    @property
    def network(self) -> float:
        return self.cluster.links.network_bytes_per_s * self.cluster.efficiency.network

    def collective_s(self, group: Group) -> float:
        """Latency of one exchange between all of a group."""
        links = self.cluster.links
        if group.size == 1:
            return 0.0
        return links.nvlink_collective_s if group.nodes == 1 else links.network_collective_s

    def all_to_all(self, group: Group, num_bytes: float) -> float:
        """Each rank sends `num_bytes`, evenly to all others; without latency.

        Those within the node travel beside those that leave it.
        """
        if group.size == 1:
            return 0.0
        remote = (group.size - group.local) / (group.size - 1)
        return num_bytes * max((1 - remote) / self.nvlink, remote * group.sharing / self.network)

    def ring(self, group: Group, num_bytes: float) -> float:
        """Each rank passes `num_bytes` on to the next; without latency.

        One link of every ring leaves a node; a node has `sharing` / `local` rings.
        """
        if group.size == 1:
            return 0.0
        rings = group.sharing / group.local
        slowest = self.nvlink if group.nodes == 1 else min(self.nvlink, self.network / rings)
        return num_bytes / slowest

    def ring_latency(self, group: Group) -> float:
        """Of passing shards once round: size - 1 messages, each as late as the slowest."""
        links = self.cluster.links
        message = links.nvlink_message_s if group.nodes == 1 else links.network_message_s
        return (group.size - 1) * message

    def all_reduce(self, group: Group, num_bytes: float) -> float:
        """Sum `num_bytes` of every rank; without latency.

        Reduce-scatter and all-gather by rings, 2 (n - 1)/n bytes per rank (Patarasuk and Yuan,
        2009), within nodes, and between nodes on a node's share: hierarchical, as NCCL does.
        """
        if group.size == 1:
            return 0.0
        inside = 2 * (group.local - 1) / group.local * num_bytes / self.nvlink
        shared = group.sharing / group.local  # groups that have ranks on a node
        between = 2 * (group.nodes - 1) / group.nodes * num_bytes * shared / self.network
        return inside + between
