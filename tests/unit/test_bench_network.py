"""What the network bench decides before any link is made, and what it makes of readings."""

import itertools
from ipaddress import IPv4Network

import pytest

from csps.bench.cli_network import attention_kinds, network
from csps.bench.corpus import library_source
from csps.bench.namespaces import (
    BURST_BYTES,
    MAX_RANKS,
    Links,
    NamespaceError,
    free_network,
    owner,
    qdiscs,
    requirements,
)
from csps.bench.network import Prompts, Variant, figures, summary, variants
from csps.core.attention import AttentionKind
from csps.core.errors import ConfigError
from csps.core.request import FinishReason
from csps.rpc.client import Complete

DENSE, CSA, DISTANCE = AttentionKind


def test_all_that_is_missing_is_named() -> None:
    assert requirements(True, lambda tool: f"/sbin/{tool}") == []
    assert requirements(True, {"ip": "/sbin/ip"}.get) == ["no tc found"]
    assert requirements(False, {}.get) == ["not run by root", "no ip found", "no tc found"]


def test_a_namespace_tells_its_owner() -> None:
    links = Links(3, 100, 0.0, IPv4Network("10.213.7.0/24"), pid=4_194_304)
    for name in (links.hub, links.name(0), links.name(199)):
        assert owner(name) == 4_194_304
    for name in ("csps-12", "csps-x-hub", "csps-12-hub2", "xcsps-12-hub", "csps-12-r", "blue"):
        assert owner(name) is None


def test_every_end_of_the_links_has_its_own_address() -> None:
    links = Links(MAX_RANKS, 100, 0.0, IPv4Network("10.213.7.0/24"), pid=1)
    addresses = {links.host, *map(links.address, range(MAX_RANKS))}
    assert len(addresses) == MAX_RANKS + 1
    assert str(links.network.broadcast_address) not in addresses
    assert links.inside(2, "true") == ["ip", "netns", "exec", "csps-1-r2", "true"]


def test_a_network_that_no_route_leads_to() -> None:
    routes = ["default", "0.0.0.0/0", "10.0.0.0/8", "10.213.0.0/16", "192.168.0.0/24"]
    assert free_network(routes[:3], first=9) == IPv4Network("10.213.9.0/24")
    near = ["10.213.9.0/24", "10.213.10.5", "10.213.11.128/25", "10.213.12.0/23"]
    assert free_network(near, first=256 + 9) == IPv4Network("10.213.14.0/24")
    assert free_network(["10.213.255.0/24"], first=255) == IPv4Network("10.213.0.0/24")
    with pytest.raises(NamespaceError, match=r"no free network in 10\.213\.0\.0/16"):
        free_network(routes, first=9)


def test_rate_and_delay_of_an_interface() -> None:
    (limit,) = (list(command) for command in qdiscs("ns", "eth0", 200))
    assert limit[:7] == ["tc", "-n", "ns", "qdisc", "add", "dev", "eth0"]
    assert limit[7:13] == ["root", "tbf", "rate", "200mbit", "burst", str(BURST_BYTES)]
    delay, limit = (list(command) for command in qdiscs("ns", "eth0", 200, 0.1))
    assert delay[7:13] == ["root", "handle", "1:", "netem", "delay", "0.1ms"]
    assert limit[7:12] == ["parent", "1:1", "tbf", "rate", "200mbit"]


def test_sparse_kinds_run_without_the_pipeline_too() -> None:
    names = [variant.name for variant in variants([DENSE, CSA, DISTANCE])]
    assert names[:3] == ["dense", "csa", "csa-distance"]
    assert names[3:] == ["csa, no pipeline", "csa-distance, no pipeline"]
    assert [variant.pipeline for variant in variants([CSA])] == [True, False]


def test_kinds_by_commas() -> None:
    assert attention_kinds("csa,dense,csa") == [CSA, DENSE]
    with pytest.raises(ConfigError, match=r"--attention: .*csa-distance, got 'csa,,'"):
        attention_kinds("csa,,")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("ranks", "1,2"),
        ("ranks", f"{MAX_RANKS + 1}"),
        ("ranks", "two"),
        ("mbit", "0"),
        ("mbit", "fast"),
        ("attention", "sparse"),
        ("gamma", 1.5),
        ("gamma", float("nan")),
    ],
)
def test_a_wrong_flag_is_named(flag: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^--{flag}: "):
        network(**{flag: value})


@pytest.mark.parametrize(("num_tokens", "rounds"), [(5, 3), (3000, 2)])
def test_no_two_prompts_of_a_server_begin_alike(num_tokens: int, rounds: int) -> None:
    token_ids = range(Prompts.num_needed(num_tokens, rounds))
    prompts = Prompts(token_ids, num_tokens, rounds)
    shifts = range(len(AttentionKind))
    measured = [prompts.measured(*pair) for pair in itertools.product(range(rounds), shifts)]
    assert {len(prompt) for prompt in measured} == {num_tokens}
    warm_ups = [prompts.warm_up(shift) for shift in shifts]
    assert {len(prompt) for prompt in warm_ups} == {min(num_tokens, 2048)}
    starts = [prompt[0] for prompt in measured + warm_ups]
    assert len(set(starts)) == len(starts)


def test_library_source_is_as_long_as_asked() -> None:
    text = library_source(300_000)
    assert len(text) == 300_000
    assert text == library_source(400_000)[:300_000]
    assert "\ndef " in text


def test_figures_of_a_run_and_their_medians() -> None:
    complete = Complete(FinishReason.LENGTH, 600, 1, 0.0, 0.1, 2.5, 2.5)

    def run(exposed_s: float) -> dict[str, object]:
        delta: dict[str, object] = {
            "wall_s": 2.0, "compute_s": 3.0, "comm_s": 1.0, "exposed_comm_s": exposed_s,
            "received_by_rank": [10, 30],
        }  # fmt: skip
        return figures(complete, 2.6, delta)

    one = run(0.8)
    assert one["exposed_share"] == pytest.approx(0.8 / (2 * 2.0))
    assert (one["ttft_s"], one["prefill_s"], one["received_bytes_max"]) == (2.5, 2.0, 30)
    assert one["sparse"] is None
    result = summary(Variant(CSA, pipeline=False), [run(0.1), run(0.9), run(0.4)])
    assert (result["variant"], result["kind"]) == ("csa, no pipeline", "csa")
    assert result["exposed_comm_s"] == 0.4
    assert result["exposed_share"] == pytest.approx(0.1)
    assert len(result["runs"]) == 3
