"""The parts of sparse prefill, one at a time, in one process."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from csps.attention.means import keys_per_mean, mass_by_means, mean_keys
from csps.attention.recall import Outcome, judge, recall_of, widened
from csps.attention.score import Scores, score
from csps.attention.select import RowSampler, keep_by_distance, keep_by_mass, visible_blocks
from csps.attention.sparse_context import page_lists
from csps.attention.transfer import (
    Fetch,
    KVShape,
    MicroPartition,
    kv_parts,
    kv_slots,
    micro_partitions,
    pack_bits,
    plan_fetches,
    read_demands,
    read_kv,
    unpack_bits,
)
from csps.core.attention import CsaConfig, Wire


def sampler(block_size: int = 64, rows: int = 8, seed: int = 0) -> RowSampler:
    return RowSampler(
        block_size=block_size,
        num_kv_heads=2,
        group_size=3,
        rows_per_tile=rows,
        seed=seed,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize(("block_size", "rows", "chosen"), [(64, 8, 24), (16, 8, 24), (4, 8, 6)])
def test_rows_are_staggered_and_probes_are_others(block_size, rows, chosen) -> None:
    found = sampler(block_size, rows)
    assert found.num_chosen == chosen
    tiles, probes = torch.tensor([0, 3, 9]), found.draw(5, 10)
    offsets = found.offsets(probes, tiles).numpy()
    assert offsets.shape == (2, 3, chosen + 2)
    assert offsets.min() >= 0
    assert offsets.max() < block_size
    if chosen <= block_size:
        assert len(set(offsets[0, 0, :chosen])) == chosen  # no position twice over the heads
    q = torch.randn(3, block_size, 2, 3, 16)
    rows_taken = found.take(probes, tiles, q)
    by_head = chosen // 3
    for head in range(2):
        for tile in range(3):
            probe = rows_taken.probes[head, tile, 1]
            (group,) = [
                g for g in range(3)
                if (q[tile, offsets[head, tile, -1], head, g] == probe).all()
            ]  # fmt: skip
            places = offsets[head, tile, group * by_head : (group + 1) * by_head]
            assert offsets[head, tile, -1] not in places


def test_rows_survive_int8_and_probes_are_exact() -> None:
    found, tiles = sampler(), torch.tensor([1, 2])
    probes = found.draw(0, 3)
    q = torch.randn(2, 64, 2, 3, 16)
    chosen, _ = found.take(probes, tiles, q).scaled()
    offsets = found.offsets(probes, tiles)
    for index in range(24):
        place = offsets[1, 0, index]
        exact = q[0, place, 1, index // 8] * 16**-0.5
        torch.testing.assert_close(chosen[1, 0, index], exact, rtol=0, atol=0.01)


def test_probes_depend_on_seed_layer_and_tile_alone() -> None:
    drawn = sampler(seed=3).draw(7, 10)
    for some, everything in zip(sampler(seed=3).draw(7, 4), drawn, strict=True):
        assert (some == everything[:4]).all()
    for other in (sampler(seed=4).draw(7, 10), sampler(seed=3).draw(8, 10)):
        assert (other.offsets != drawn.offsets).any()


def true_mass(scores: Scores, lse: torch.Tensor) -> torch.Tensor:
    return scores.mass * torch.exp(scores.peak - lse).unsqueeze(-1)


def test_scores_are_the_softmax_mass_by_block() -> None:
    """Of a shard that holds blocks 0, 1 and 4; tile 4 is this rank's own."""
    size, dim = 8, 16
    blocks, tiles = torch.tensor([0, 1, 4]), torch.tensor([1, 3, 4])
    keys = torch.randn(2, 3, size, dim)
    chosen, probes = 3 * torch.randn(2, 3, 5, dim), 3 * torch.randn(2, 3, 2, dim)
    offsets = torch.tensor([0, 1, 3, 5, 6, 2, 7])
    positions = (tiles[:, None] * size + offsets).expand(2, -1, -1)
    found = score(chosen, probes, positions, tiles, keys, blocks)
    rows = torch.cat((chosen, probes), dim=2)
    scores = torch.einsum("knrd,kjbd->knrjb", rows, keys)
    at = blocks[:, None] * size + torch.arange(size)
    scores.masked_fill_(at > positions[..., None, None], -torch.inf)
    lse = scores.flatten(3).logsumexp(3)
    mass = (scores - lse[..., None, None]).exp().sum(4)
    # Tile 1 at offset 0 of block 1 sees block 0 and a key: never nothing.
    torch.testing.assert_close(
        true_mass(found, lse)[:, :, 5:], mass[:, :, 5:], rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(found.lse[:, :, 5:], lse[:, :, 5:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        true_mass(found, found.lse)[:, :, :5], mass[:, :, :5], rtol=0.08, atol=0.01
    )


def test_a_row_that_sees_nothing_here_has_no_mass() -> None:
    keys = torch.randn(1, 2, 4, 8)
    rows, none = torch.randn(1, 1, 3, 8), torch.randn(1, 1, 0, 8)
    positions = torch.tensor([[[4, 5, 7]]])
    found = score(rows, none, positions, torch.tensor([1]), keys, torch.tensor([5, 6]))
    assert (found.mass == 0).all()
    assert torch.isneginf(found.lse).all()


def test_the_fewest_blocks_reach_gamma() -> None:
    mass = torch.tensor([[[0.05, 0.3, 0.02, 0.2, 0.1, 0.08, 0.25, 0.0]]])
    tile = torch.tensor([6])
    (keep,) = keep_by_mass(mass, tile, [0.9])
    # Sink 0, window 5 and diagonal 6 have 0.38; 1, 3 and 4 make 0.98.
    assert np.flatnonzero(keep[0, 0]).tolist() == [0, 1, 3, 4, 5, 6]
    half, everything = keep_by_mass(mass, tile, [0.5, 1.0])
    assert np.flatnonzero(half[0, 0]).tolist() == [0, 1, 5, 6]
    assert np.flatnonzero(everything[0, 0]).tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_more_gamma_keeps_more() -> None:
    mass = torch.rand(2, 30, 30).softmax(-1)
    tiles = torch.arange(30)
    low, high = keep_by_mass(mass, tiles, [0.5, 0.9])
    assert (low <= high).all()
    assert (high <= visible_blocks(tiles, 30)).all()


def fewest(mass_J: np.ndarray, tile: int, gamma: float) -> list[int]:
    """Forced blocks, then the largest until they reach gamma, in whole numbers of 2**-24."""
    units = np.round(mass_J.astype(np.float16).astype(np.float64) * 2**24).astype(int)
    kept = sorted({0, max(tile - 1, 0), tile})
    total = units[: tile + 1].sum()
    for block in sorted(set(range(tile + 1)) - set(kept), key=lambda block: -units[block]):
        if units[kept].sum() >= gamma * total:
            break
        kept.append(block)
    return sorted(kept)


@pytest.mark.parametrize("concentration", [0.02, 0.3, 5.0])
def test_the_choice_is_that_of_sorting(concentration: float) -> None:
    """Of fp16 masses, many of them equal, many 0; some tiles have all theirs where they must."""
    generator = np.random.default_rng(int(concentration * 100))
    tiles = np.array([0, 1, 2, 9, 23, 30, 47])
    mass = generator.gamma(concentration, size=(2, len(tiles), 48)) + 1e-30
    mass *= np.arange(48) <= tiles[:, None]
    mass[1] = np.round(mass[1] * 8) / 8 + (np.arange(48) == 0)
    mass[0, 3, 1:9] = 0.0
    mass /= mass.sum(2, keepdims=True)
    gammas = [0.3, 0.6, 0.95, 0.9875]
    found = keep_by_mass(torch.from_numpy(mass).float(), torch.from_numpy(tiles), gammas)
    for gamma, keep in zip(gammas, found, strict=True):
        for head, row in np.ndindex(2, len(tiles)):
            expected = fewest(mass[head, row], tiles[row], gamma)
            assert keep[head, row].nonzero().flatten().tolist() == expected


def test_of_equal_masses_the_first_are_kept() -> None:
    """One eighth each: 5 / 8 are the three forced ones and two more."""
    (keep,) = keep_by_mass(torch.full((1, 1, 9), 0.125), torch.tensor([7]), [0.6])
    assert keep[0, 0].nonzero().flatten().tolist() == [0, 1, 2, 6, 7]


def test_a_row_without_mass_keeps_what_it_must() -> None:
    (keep,) = keep_by_mass(torch.zeros(1, 1, 9), torch.tensor([7]), [0.9])
    assert keep[0, 0].nonzero().flatten().tolist() == [0, 6, 7]


def test_distance_keeps_fewer_the_farther() -> None:
    keep = keep_by_distance(torch.tensor([63]), 64, 8)[0].numpy()
    assert keep[0]
    assert keep[56:].all()
    kept = [keep[64 - 2 * d : 64 - d].mean() for d in (8, 16, 32)]
    assert kept == [0.5, 0.25, 0.125]


def test_means_underestimate_a_sharp_match_and_know_uniform_mass() -> None:
    size, dim, tiles = 64, 16, np.array([0, 3])
    keys = torch.zeros(1, 4, size, dim)
    q = torch.zeros(1, 2, 6, dim)
    diagonal = torch.full((1, 2, 6), float(np.log(size)))
    num_keys = keys_per_mean(size)
    mass = mass_by_means(q, diagonal, mean_keys(keys), num_keys, tiles)
    torch.testing.assert_close(mass[0, 1], torch.full((4,), 0.25))
    torch.testing.assert_close(mass[0, 0], torch.tensor([1.0, 0, 0, 0]))
    keys[0, 1, 5] = 10.0
    q += 1.0
    sharp = mass_by_means(q, diagonal, mean_keys(keys), num_keys, tiles)[0, 1]
    assert 0.25 < sharp[1] < 0.9999


# Recall and what follows from it


def judged(kept: float, recalls: np.ndarray, **settings: float):
    return judge(
        np.array([[kept], [kept]]),
        100,
        np.broadcast_to(recalls[:, None], (2, 1, len(recalls), 2)),
        [0.9, widened(0.9)],
        CsaConfig(**settings),
        layer=0,
        first_head=0,
        falls_back=True,
    ).outcomes[0]


def test_what_a_head_does() -> None:
    good = np.full(50, 0.95)
    assert judged(30, good) is Outcome.ASKED
    assert judged(80, good) is Outcome.DENSE  # nothing to save
    assert judged(30, good[:5]) is Outcome.DENSE  # too few probes to know
    assert judged(30, good - 0.1) is Outcome.DENSE  # below the floor, widened too
    some_miss = good + 0.02
    some_miss[:4] = 0.6
    assert judged(30, some_miss, min_recall_p5=0.0) is Outcome.ASKED
    assert judged(30, some_miss) is Outcome.DENSE  # its rare rows are lost


def test_a_head_widens_before_it_gives_up() -> None:
    bad, good = np.full(50, 0.8), np.full(50, 0.97)
    recalls = np.stack([bad, good])[:, None, :, None].repeat(2, axis=3)
    verdict = judge(
        np.array([[20], [40]]), 100, recalls, [0.9, widened(0.9)],
        CsaConfig(), layer=3, first_head=2, falls_back=True,
    )  # fmt: skip
    (report,) = verdict.reports
    assert verdict.outcomes == (Outcome.WIDENED,)
    assert (report.layer, report.head, report.gamma, report.density) == (3, 2, 0.975, 0.4)
    assert report.recall_mean == pytest.approx(0.97)
    assert verdict.recalls.tolist() == good.tolist()


def test_what_decides_is_not_what_is_reported() -> None:
    recalls = np.stack([np.full((2, 1, 50), 0.95), np.full((2, 1, 50), 0.91)], axis=3)
    verdict = judge(
        np.array([[20], [40]]), 100, recalls, [0.9, widened(0.9)], CsaConfig(),
        layer=0, first_head=0, falls_back=True,
    )  # fmt: skip
    assert verdict.outcomes == (Outcome.ASKED,)
    assert verdict.reports[0].recall_mean == pytest.approx(0.91)


def test_recall_is_the_mass_in_kept_blocks() -> None:
    mass = torch.tensor([[[[0.5, 0.3, 0.2]]]])
    keep = torch.tensor([[[True, False, True]]])
    assert recall_of(mass, keep).item() == pytest.approx(0.7)


# Transfers


def shape(wire: Wire = Wire.MODEL) -> KVShape:
    return KVShape(block_size=4, group_size=3, head_dim=8, dtype=torch.float32, wire=wire)


def planned(keep: np.ndarray, partitions: Sequence[MicroPartition]) -> list[Fetch]:
    (demand,) = read_demands([torch.from_numpy(keep)], partitions)
    return plan_fetches(demand, partitions, shape())


@pytest.mark.parametrize("num_kv_heads", [1, 2, 3, 8])
def test_every_block_travels_once_and_only_if_wanted(num_kv_heads: int) -> None:
    keep = np.random.default_rng(0).random((num_kv_heads, 40, 12)) < 0.05
    partitions = micro_partitions(num_kv_heads, 2)
    assert len(partitions) > 1
    fetched = [set() for _ in range(num_kv_heads)]
    plan = planned(keep, partitions)
    assert sum(fetch.fetched_pairs for fetch in plan) == keep.sum()
    for partition, fetch in zip(partitions, plan, strict=True):
        for head, blocks in zip(partition.heads, fetch.blocks, strict=True):
            assert not fetched[head] & set(blocks.tolist())
            fetched[head] |= set(blocks.tolist())
            tiles = partition.tiles(40)
            assert set(np.flatnonzero(keep[head, tiles].any(0))) <= fetched[head]
    for head in range(num_kv_heads):
        assert fetched[head] == set(np.flatnonzero(keep[head].any(0)))


def test_few_tiles_that_want_much_ship_their_queries() -> None:
    keep = np.zeros((2, 40, 30), dtype=bool)
    keep[0, 7] = True  # one tile wants all: 30 blocks against one tile
    keep[1, :, 2] = True  # all want one
    first, second = planned(keep, micro_partitions(2, 2))
    assert (first.fetched_pairs, first.shipped_pairs) == (0, 30)
    assert (second.fetched_pairs, second.shipped_pairs) == (40, 0)
    assert (first.num_blocks, [list(t) for t in first.tiles]) == (0, [[7]])
    assert ([list(b) for b in second.blocks], second.num_tiles) == ([[2]], 0)


@pytest.mark.parametrize("wire", list(Wire))
def test_blocks_on_the_wire(wire: Wire) -> None:
    keys, values = torch.randn(2, 5, 4, 8)
    parts, slots = kv_parts(keys, values, wire), kv_slots(5, shape(wire))
    for part, slot in zip(parts, slots, strict=True):
        assert (tuple(part.tensor.shape), part.tensor.dtype) == (slot.shape, slot.dtype)
    assert sum(slot.num_bytes for slot in slots) == 5 * shape(wire).block_bytes
    read = read_kv([part.tensor for part in parts], shape(wire))
    tolerance = 0.0 if wire is Wire.MODEL else 0.02
    torch.testing.assert_close(read, (keys, values), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("num_flags", [0, 1, 8, 13, 64])
def test_bits_on_the_wire(num_flags: int) -> None:
    flags = torch.rand(num_flags) < 0.5
    bits = pack_bits(flags)
    assert bits.dtype is torch.uint8
    assert len(bits) == -(-num_flags // 8)
    assert unpack_bits(bits, num_flags).tolist() == flags.tolist()


def test_page_lists_are_the_pages_of_kept_blocks() -> None:
    keep = torch.rand(3, 5, 7) < 0.4
    keep[1, 2] = False
    table = torch.randperm(1000)[:21].view(3, 7)
    starts, pages, longest = page_lists(keep, table, int(keep.sum()))
    assert starts.dtype is pages.dtype is torch.int32
    for item, (head, tile) in enumerate(np.ndindex(3, 5)):
        assert (
            pages[starts[item] : starts[item + 1]].tolist()
            == table[head][keep[head, tile]].tolist()
        )
    assert starts[-1] == len(pages)
    assert starts.diff().max() <= longest
