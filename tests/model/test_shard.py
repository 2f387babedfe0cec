"""Tensor parallelism: ranks as threads of one process, against the unsharded model."""

import threading

import pytest
import torch

from csps.checkpoint.config import read_config
from csps.checkpoint.locate import locate
from csps.core.errors import ConfigError
from csps.model.loader import load_model
from csps.model.shard import kv_head_range, shard_config, tensor_parallel
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
            return x

        return reduce


def load_ranks(path, tp_size):
    checkpoint = locate(str(path))
    config = read_config(checkpoint)
    return [
        load_model(
            checkpoint,
            config,
            dtype=torch.float32,
            device="cpu",
            max_position=512,
            tp_rank=rank,
            tp_size=tp_size,
        )
        for rank in range(tp_size)
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


@pytest.mark.parametrize("tp_size", [2, 3])
@pytest.mark.parametrize(
    ("kind", "overrides"),
    [("llama", {"attention_bias": True, "mlp_bias": True}), ("qwen2", {}), ("qwen3", {})],
)
def test_ranks_equal_one(tmp_path, kind, overrides, tp_size):
    write_tiny(kind, tmp_path, **overrides)
    tokens = random_tokens(30)
    expected = logits(load(tmp_path), tokens)
    group = Group(tp_size)
    models = [
        tensor_parallel(model, group.reducer(rank))
        for rank, model in enumerate(load_ranks(tmp_path, tp_size))
    ]
    for result in run_ranks(models, tokens):
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)


def test_gguf_ranks_equal_one(tmp_path):
    path = write_gguf(write_tiny("llama", tmp_path / "hf"), tmp_path / "model.gguf")
    tokens = random_tokens(30)
    group = Group(2)
    models = [tensor_parallel(m, group.reducer(r)) for r, m in enumerate(load_ranks(path, 2))]
    for result in run_ranks(models, tokens):
        torch.testing.assert_close(result, logits(load(path), tokens), atol=1e-4, rtol=0)


def test_lanes_share_weights_and_not_their_groups(tmp_path):
    """Two lanes of the same ranks, run side by side, each sum within their own group."""
    write_tiny("llama", tmp_path, attention_bias=True)
    tokens = random_tokens(30)
    expected = logits(load(tmp_path), tokens)
    ranks = load_ranks(tmp_path, 2)
    lanes = [
        [tensor_parallel(model, group.reducer(rank)) for rank, model in enumerate(ranks)]
        for group in (Group(2), Group(2))
    ]
    for rank, model in enumerate(ranks):
        storages = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        for lane in lanes:
            own = {t.data_ptr() for t in (*lane[rank].parameters(), *lane[rank].buffers())}
            assert own == storages
    results = [None, None]

    def run(lane):
        results[lane] = run_ranks(lanes[lane], tokens)

    threads = [threading.Thread(target=run, args=(lane,)) for lane in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for lane in results:
        for result in lane:
            torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)


def test_a_rank_holds_its_part_only(tmp_path):
    config = read_config(locate(str(write_tiny("llama", tmp_path))))
    parts = [shard_config(config, rank, 2) for rank in range(2)]
    assert [part.num_kv_heads for part in parts] == [1, 2]
    assert [part.num_heads for part in parts] == [2, 4]
    assert sum(part.intermediate_size for part in parts) == config.intermediate_size
    assert all(part.head_dim == config.head_dim for part in parts)
    first, second = load_ranks(tmp_path, 2)
    whole = load(tmp_path)
    for ours, left, right in zip(whole.layers, first.layers, second.layers, strict=True):
        # A range of KV heads is a contiguous range of rows of the fused weight.
        rows = torch.cat((left.attention.qkv.weight, right.attention.qkv.weight))
        assert torch.equal(rows, ours.attention.qkv.weight)
        columns = torch.cat((left.mlp.down.weight, right.mlp.down.weight), dim=1)
        assert torch.equal(columns, ours.mlp.down.weight)


@pytest.mark.parametrize("tp_size", [1, 2, 3])
def test_kv_head_ranges_cover_all_heads_once(tmp_path, tp_size):
    config = read_config(locate(str(write_tiny("llama", tmp_path))))
    heads = [h for r in range(tp_size) for h in range(*kv_head_range(config, r, tp_size))]
    assert heads == list(range(config.num_kv_heads))


def test_more_ranks_than_kv_heads(tmp_path):
    config = read_config(locate(str(write_tiny("llama", tmp_path))))
    with pytest.raises(ConfigError, match=r"--tp 4: the model has 3 KV heads"):
        shard_config(config, 0, 4)
