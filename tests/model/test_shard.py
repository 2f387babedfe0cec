"""Tensor parallelism: ranks as threads of one process, against the unsharded model."""

import threading
from typing import NamedTuple

import pytest
import torch

from csps.checkpoint.config import read_config
from csps.checkpoint.locate import locate
from csps.model.llama import Llama
from csps.model.loader import load_model
from csps.model.shard import ModelPart, part_config, tensor_parallel, whole_model
from csps.parallel.overlap import NothingToWaitFor
from tests.checkpoints import write_gguf, write_tiny
from tests.model.reference import load, logits, random_tokens


class Group:
    """Sums over threads, in place, as an all-reduce does."""

    def __init__(self, size):
        self._barrier = threading.Barrier(size, timeout=30)
        self._parts = [None] * size

    def reducer(self, rank):
        def reduce(x):
            assert x.is_contiguous()
            self._parts[rank] = x.clone()
            self._barrier.wait()
            x.copy_(torch.stack(self._parts).sum(0))
            self._barrier.wait()
            return NothingToWaitFor()

        return reduce


class Rank(NamedTuple):
    """A resident part of the weights, and the part of it that the rank runs in the TP layout."""

    model: Llama
    resident: ModelPart
    part: ModelPart


def load_ranks(path, tp, sp=1) -> list[Rank]:
    """Ranks of a mesh, in order s * tp + t; those that share `t` share the model object."""
    checkpoint = locate(str(path))
    config = read_config(checkpoint)
    residents = whole_model(config).split(tp)
    models = [
        load_model(
            checkpoint, config, dtype=torch.float32, device="cpu", max_position=512, part=part
        )
        for part in residents
    ]
    return [
        Rank(models[t], residents[t], residents[t].split(sp)[s])
        for s in range(sp)
        for t in range(tp)
    ]


def views(ranks, group, num_pieces=1):
    """Each rank's view of its weights; together they are the whole model."""
    return [
        tensor_parallel(
            rank.model,
            rank.resident,
            rank.part,
            rank=index,
            size=len(ranks),
            reduce=group.reducer(index),
            num_pieces=num_pieces,
        )
        for index, rank in enumerate(ranks)
    ]


def run_ranks(models, tokens):
    results = [None] * len(models)

    def run(rank):
        results[rank] = logits(models[rank], tokens)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def together(models, tokens):
    """Logits of all ranks, side by side."""
    return torch.cat(run_ranks(models, tokens), dim=1)


# All factorisations of 2, 3, 4, 6 and 9 ranks; the tiny models have 6 query and 3 KV heads.
MESHES = [
    (sp, size // sp) for size in (2, 3, 4, 6, 9) for sp in range(1, size + 1) if size % sp == 0
]


@pytest.mark.parametrize(("sp", "tp"), MESHES)
@pytest.mark.parametrize(
    ("kind", "overrides"),
    [("llama", {"attention_bias": True, "mlp_bias": True}), ("qwen2", {}), ("qwen3", {})],
)
def test_ranks_equal_one(tmp_path, kind, overrides, sp, tp):
    write_tiny(kind, tmp_path, **overrides)
    tokens = random_tokens(30)
    models = views(load_ranks(tmp_path, tp, sp), Group(sp * tp))
    torch.testing.assert_close(
        together(models, tokens), logits(load(tmp_path), tokens), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("num_tokens", [383, 384, 389])
def test_sums_in_pieces(tmp_path, num_tokens):
    """Just under what is cut into pieces, evenly, and not."""
    write_tiny("llama", tmp_path, attention_bias=True, mlp_bias=True)
    tokens = random_tokens(num_tokens)
    models = views(load_ranks(tmp_path, 2), Group(2), num_pieces=3)
    torch.testing.assert_close(
        together(models, tokens), logits(load(tmp_path), tokens), atol=1e-4, rtol=0
    )


def test_gguf_ranks_equal_one(tmp_path):
    path = write_gguf(write_tiny("llama", tmp_path / "hf"), tmp_path / "model.gguf")
    tokens = random_tokens(30)
    models = views(load_ranks(path, 2), Group(2))
    torch.testing.assert_close(
        together(models, tokens), logits(load(path), tokens), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(("sp", "tp"), MESHES)
def test_views_are_no_copies(tmp_path, sp, tp):
    """Every weight a rank runs with lies in the storage that its mesh row loaded."""
    write_tiny("llama", tmp_path, attention_bias=True)
    ranks = load_ranks(tmp_path, tp, sp)
    for rank, view in zip(ranks, views(ranks, Group(sp * tp)), strict=True):
        loaded = {tensor.untyped_storage().data_ptr() for tensor in storages(rank.model)}
        assert {tensor.untyped_storage().data_ptr() for tensor in storages(view)} <= loaded


def storages(model):
    return [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.numel()]


def test_lanes_share_weights_and_not_their_groups(tmp_path):
    """Two lanes of the same ranks, run side by side, each sum within their own group."""
    write_tiny("llama", tmp_path, attention_bias=True)
    tokens = random_tokens(30)
    ranks = load_ranks(tmp_path, 2)
    lanes = [views(ranks, group) for group in (Group(2), Group(2))]
    results = [None, None]

    def run(lane):
        results[lane] = together(lanes[lane], tokens)

    threads = [threading.Thread(target=run, args=(lane,)) for lane in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        torch.testing.assert_close(result, logits(load(tmp_path), tokens), atol=1e-4, rtol=0)


def test_a_rank_holds_its_part_only(tmp_path):
    config = read_config(locate(str(write_tiny("llama", tmp_path))))
    parts = [part_config(config, part) for part in whole_model(config).split(2)]
    assert [part.num_kv_heads for part in parts] == [1, 2]
    assert [part.num_heads for part in parts] == [2, 4]
    assert sum(part.intermediate_size for part in parts) == config.intermediate_size
    assert all(part.head_dim == config.head_dim for part in parts)
    first, second = (rank.model for rank in load_ranks(tmp_path, 2))
    whole = load(tmp_path)
    for ours, left, right in zip(whole.layers, first.layers, second.layers, strict=True):
        # A range of KV heads is a contiguous range of rows of the fused weight.
        rows = torch.cat((left.attention.qkv.weight, right.attention.qkv.weight))
        assert torch.equal(rows, ours.attention.qkv.weight)
        columns = torch.cat((left.mlp.down.weight, right.mlp.down.weight), dim=1)
        assert torch.equal(columns, ours.mlp.down.weight)
