"""The `in` phase of sparse prefill, up to the choice: rows out, masses back, votes.

Five exchanges, each one message per peer: sampled rows; their log-sum-exps by owner; block
masses; what each choice would keep and recall; then (csps.attention.sparse) the choice itself.
The caller computes something else between `post_*` and the next step.

Suffixes: K KV heads, N tiles of one rank, M rows that choose, E probes, J blocks, V visible
(tile, block) pairs, B tokens, G query heads per KV head, D head dim.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from csps.attention.backends import Kernels, RowScores
from csps.attention.means import keys_per_mean, mass_by_means, mean_keys
from csps.attention.recall import Outcome, Verdict, judge, recall_of, widened
from csps.attention.score import BlockKeys
from csps.attention.select import Rows, RowSampler, keep_by_distance, visible_blocks
from csps.attention.shards import SparseSequence
from csps.attention.sight import Sight
from csps.core.attention import AttentionKind, CsaConfig, Estimate
from csps.parallel.packets import Arrival, Packets, Part, Slot


@dataclass(frozen=True, slots=True)
class Choice:
    """`keep` bool [K, N, J] of this rank's tiles over all blocks; the verdict is every rank's."""

    keep: Tensor
    verdict: Verdict


class Selection:
    """One layer's choice for one sequence. Call the methods in the order they stand."""

    def __init__(
        self,
        seq: SparseSequence,
        sight: Sight,
        sampler: RowSampler,
        packets: Packets,
        kernels: Kernels,
        config: CsaConfig,
        layer: int,
        first_head: int,
    ) -> None:
        self._seq, self._sight, self._sampler = seq, sight, sampler
        self._packets, self._kernels, self._config = packets, kernels, config
        self._layer, self._first_head = layer, first_head
        self._me = packets.rank
        self._peers = tuple(rank for rank in sight.ranks if rank != self._me)
        self._scores: dict[int, RowScores] = {}

    def post_rows(self, q_NBKGD: Tensor, keys: BlockKeys) -> None:
        """Sample this rank's tiles and send the rows to the owners of what they see.

        `keys`: of this rank's blocks.
        """
        me, sight = self._me, self._sight
        self._num_kv_heads, self._head_dim = q_NBKGD.shape[2], q_NBKGD.shape[4]
        self._device, self._dtype = q_NBKGD.device, q_NBKGD.dtype
        self._keys = keys
        self._means = {me: mean_keys(keys.gathered)} if self._by_means else {}
        self._probes = self._sampler.draw(self._layer, self._seq.num_blocks)
        self._rows = self._sampler.take(self._probes, sight.tiles_on_device[me], q_NBKGD)
        outgoing = {}
        for owner in self._peers:
            first = sight.first(me, owner)
            rows = self._rows
            outgoing[owner] = [
                Part("rows", rows.chosen[:, first:]),
                Part("rows", rows.scale[:, first:]),
                Part("rows", rows.probes[:, first:]),
                *(Part("summary", means.to(self._dtype)) for means in self._means.values()),
            ]
        incoming = {peer: self._row_slots(peer) for peer in self._peers}
        self._rows_arrival = self._post(outgoing, incoming)

    def score_own(self) -> None:
        """This rank's rows against its own keys."""
        self._score(self._me, self._rows)

    def post_lse(self) -> None:
        """Score the peers' rows; tell every owner what it needs to normalise."""
        for requester, (chosen, scale, probes, *means) in self._rows_arrival.wait().items():
            self._score(requester, Rows(chosen, scale, probes))
            self._means.update((requester, part.float()) for part in means)
        me = self._me
        outgoing, incoming = {}, {}
        for peer in self._peers:
            outgoing[peer] = [
                Part("lse", self._scores[r].lse[:, self._skip(r, me, peer) :])
                for r in self._sight.ranks
            ]
            incoming[peer] = [
                Slot("lse", self._lse_shape(r, peer, me), torch.float32) for r in self._sight.ranks
            ]
        self._lse_arrival = self._post(outgoing, incoming)

    def post_mass(self) -> None:
        """Normalise, and reply to each requester with its tiles' masses in the blocks here."""
        me, sight = self._me, self._sight
        theirs = self._lse_arrival.wait()
        outgoing, incoming = {}, {}
        for index, requester in enumerate(sight.ranks):
            total = self._scores[requester].lse.clone()
            for owner in self._peers:
                lse = theirs[owner][index]
                tail = total[:, total.shape[1] - lse.shape[1] :]
                tail.copy_(torch.logaddexp(tail, lse))
            masses = self._masses(requester, total)
            if requester == me:
                self._own_mass = masses
            else:
                # What its tiles cannot see does not travel.
                first = sight.first(requester, me) * len(sight.blocks[me])
                pairs = sight.asked(requester) - first
                outgoing[requester] = [
                    Part("mass", mass.flatten(1, 2).index_select(1, pairs)) for mass in masses
                ]
                incoming[requester] = self._mass_slots(sight.num_pairs(me, requester))
        self._scores.clear()
        self._mass_arrival = self._post(outgoing, incoming)

    def post_votes(self, q_KNRD: Tensor, diagonal_lse_KNR: Tensor) -> None:
        """Choose for this rank's tiles; tell all ranks what that keeps and recalls.

        The tiles' queries and their diagonals' log-sum-exps serve the estimate by means alone.
        """
        chosen, probes = self._assemble_mass()
        if self._by_means:
            chosen = self._mass_by_means(q_KNRD, diagonal_lse_KNR)
        self._keeps = self._choose(chosen)
        kept = torch.stack([keep.sum((1, 2)) for keep in self._keeps]).float()
        recalls = torch.stack([recall_of(probes, keep) for keep in self._keeps])
        self._votes = [kept, recalls]
        votes = [Part("vote", vote) for vote in self._votes]
        incoming = {
            peer: [Slot("vote", shape, torch.float32) for shape in self._vote_shapes(peer)]
            for peer in self._peers
        }
        self._votes_arrival = self._post(dict.fromkeys(self._peers, votes), incoming)

    def decide(self) -> Choice:
        """What every KV head runs with, by the votes of all ranks."""
        kept, recalls = self._read_votes()
        # In the order of tiles: sums must not depend on who computed which.
        tiles = np.concatenate([self._sight.tiles[rank] for rank in self._sight.ranks])
        order = np.argsort(tiles)
        verdict = judge(
            np.sum(kept, axis=0, dtype=np.float64),
            self._sight.causal_pairs,
            np.concatenate(recalls, axis=2)[:, :, order],
            self._gammas,
            self._config,
            layer=self._layer,
            first_head=self._first_head,
            falls_back=self._seq.params.kind is AttentionKind.CSA,
        )
        visible = visible_blocks(self._sight.tiles_on_device[self._me], self._seq.num_blocks)
        by_head = [
            visible if outcome is Outcome.DENSE else self._keeps[outcome][head]
            for head, outcome in enumerate(verdict.outcomes)
        ]
        return Choice(torch.stack(by_head), verdict)

    # Parts of the steps

    def _post(self, outgoing: dict[int, list[Part]], incoming: dict[int, list[Slot]]) -> Arrival:
        return self._packets.post(outgoing, incoming, self._device)

    @property
    def _by_means(self) -> bool:
        params = self._seq.params
        return params.kind is AttentionKind.CSA and self._config.estimate is Estimate.MEANS

    def _mass_by_means(self, q_KNRD: Tensor, diagonal_lse_KNR: Tensor) -> Tensor:
        size, num_blocks = self._seq.block_size, self._seq.num_blocks
        means = q_KNRD.new_zeros(
            self._num_kv_heads, num_blocks, size // keys_per_mean(size), self._head_dim,
            dtype=torch.float32,
        )  # fmt: skip
        for owner, part in self._means.items():
            means[:, self._sight.blocks_on_device[owner]] = part
        q = q_KNRD.float() * self._head_dim**-0.5
        tiles = self._sight.tiles[self._me]
        return mass_by_means(q, diagonal_lse_KNR, means, keys_per_mean(size), tiles)

    def _row_slots(self, requester: int) -> list[Slot]:
        heads, sampler, dim = self._num_kv_heads, self._sampler, self._head_dim
        num_tiles = len(self._sight.seen(requester, self._me))
        size, num_blocks = self._seq.block_size, len(self._sight.blocks[requester])
        means = Slot("summary", (heads, num_blocks, size // keys_per_mean(size), dim), self._dtype)
        return [
            Slot("rows", (heads, num_tiles, sampler.num_chosen, dim), torch.int8),
            Slot("rows", (heads, num_tiles, sampler.num_chosen), torch.float16),
            Slot("rows", (heads, num_tiles, sampler.num_probes, dim), self._dtype),
            *([means] if self._by_means else []),
        ]

    def _score(self, requester: int, rows: Rows) -> None:
        first = self._sight.first(requester, self._me)
        tiles = self._sight.tiles_on_device[requester][first:]
        offsets = self._sampler.offsets(self._probes, tiles)
        positions = tiles[:, None] * self._seq.block_size + offsets
        blocks = self._sight.blocks_on_device[self._me]
        self._scores[requester] = self._kernels.score(rows, positions, tiles, self._keys, blocks)

    def _skip(self, requester: int, owner: int, other: int) -> int:
        """Tiles that see `owner` but not `other`: `other` needs no log-sum-exp of them."""
        sight = self._sight
        return max(sight.first(requester, other) - sight.first(requester, owner), 0)

    def _lse_shape(self, requester: int, owner: int, other: int) -> tuple[int, int, int]:
        num_tiles = len(self._sight.seen(requester, owner)) - self._skip(requester, owner, other)
        return self._num_kv_heads, num_tiles, self._sampler.num_chosen + self._sampler.num_probes

    def _masses(self, requester: int, total_lse_KNR: Tensor) -> tuple[Tensor, Tensor]:
        """Mean mass [K, N, J] in the blocks here and the probes' [K, N, J, E], fp16."""
        scores = self._scores[requester]
        mean, probes = scores.masses(total_lse_KNR, self._sampler.num_chosen)
        return mean.half(), probes.half()

    def _mass_slots(self, num_pairs: int) -> list[Slot]:
        heads = self._num_kv_heads
        return [
            Slot("mass", (heads, num_pairs), torch.float16),
            Slot("mass", (heads, num_pairs, self._sampler.num_probes), torch.float16),
        ]

    def _assemble_mass(self) -> tuple[Tensor, Tensor]:
        """Over all owners' blocks: mean mass [K, N, J] fp16, the probes' [K, N, E, J] fp32."""
        me, sight = self._me, self._sight
        if not self._peers:
            mean, probes = self._own_mass
            return mean, probes.float().transpose(2, 3)
        shape = self._num_kv_heads, len(sight.tiles[me]), self._seq.num_blocks
        chosen = torch.zeros(shape, dtype=torch.float16, device=self._device)
        probes = torch.zeros((*shape, self._sampler.num_probes), device=self._device)
        for mass, own in zip((chosen, probes), self._own_mass, strict=True):
            mass[:, :, sight.blocks_on_device[me]] = own.to(mass.dtype)
        for owner, parts in self._mass_arrival.wait().items():
            for mass, part in zip((chosen, probes), parts, strict=True):
                mass.flatten(1, 2).index_copy_(1, sight.wanted(owner), part.to(mass.dtype))
        return chosen, probes.transpose(2, 3)

    @property
    def _gammas(self) -> list[float]:
        params = self._seq.params
        if params.kind is AttentionKind.CSA_DISTANCE:
            return [0.0]
        return [params.gamma, widened(params.gamma)]

    def _choose(self, mass_KNJ: Tensor) -> list[Tensor]:
        tiles, params = self._sight.tiles_on_device[self._me], self._seq.params
        if params.kind is AttentionKind.CSA_DISTANCE:
            keep = keep_by_distance(tiles, self._seq.num_blocks, params.window_blocks)
            return [keep.expand(self._num_kv_heads, -1, -1)]
        return self._kernels.choose(mass_KNJ, tiles, self._gammas)

    def _vote_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Pairs kept [choices, K], recalls [choices, K, N, E]."""
        choices = len(self._gammas), self._num_kv_heads
        return choices, (*choices, len(self._sight.tiles[rank]), self._sampler.num_probes)

    def _read_votes(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Pairs kept and recalls of every rank, in one copy to the host."""
        votes = self._votes_arrival.wait()
        votes[self._me] = self._votes
        parts = [part for rank in self._sight.ranks for part in votes[rank]]
        packed = torch.cat([part.flatten() for part in parts]).cpu()
        sizes = [part.numel() for part in parts]
        read = [
            values.view(part.shape).numpy()
            for values, part in zip(packed.split(sizes), parts, strict=True)
        ]
        return read[::2], read[1::2]
