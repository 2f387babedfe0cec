"""Files in deploy/ say what the command line understands, and agree with each other."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from csps.cli import app

DEPLOY = Path(__file__).parents[2] / "deploy"
COMMANDS = typer.main.get_command(app).commands
LWS = "leaderworkerset.sigs.k8s.io"


def known_flags(command: str) -> set[str]:
    return {name for param in COMMANDS[command].params for name in param.opts}


def flags_in(text: str) -> set[str]:
    """Long flags, without their values."""
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes" / name).read_text()))


@pytest.fixture(scope="module")
def group() -> dict[str, Any]:
    return documents("csps.yaml")[0]["spec"]["leaderWorkerTemplate"]


def pods(group: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name in ("leaderTemplate", "workerTemplate"):
        yield group[name]["spec"]


def container(group: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [c for c in group["leaderTemplate"]["spec"]["containers"] if c["name"] == name]
    return found


@pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sbatch"])
def test_scripts_parse(name: str) -> None:
    subprocess.run(["bash", "-n", DEPLOY / name], check=True)


def test_the_slurm_script_gives_serve_flags_that_it_has() -> None:
    script = (DEPLOY / "slurm.sbatch").read_text()
    serve = script[script.index("-m csps serve") : script.index("coordinator=$!")]
    assert flags_in(serve) >= {"--model", "--ranks", "--control"}
    assert flags_in(serve) <= known_flags("serve")


def test_the_torchrun_script_gives_flags_that_worker_has() -> None:
    script = (DEPLOY / "torchrun.sh").read_text()
    assert flags_in(script[script.index("-m csps worker") :]) <= known_flags("worker")


def test_containers_have_flags_of_their_commands(group: dict[str, Any]) -> None:
    coordinator, ranks = container(group, "coordinator"), container(group, "ranks")
    assert coordinator["command"] == ["csps", "serve"]
    assert flags_in("\n".join(coordinator["args"])) <= known_flags("serve")
    assert ranks["command"] == ["/opt/csps/deploy/torchrun.sh"]
    assert flags_in("\n".join(ranks["args"])) <= known_flags("worker")


def test_args_that_are_commented_out_are_flags_of_serve() -> None:
    text = (DEPLOY / "kubernetes/csps.yaml").read_text()
    off = set(re.findall(r"^ *# - (--[a-z-]+)", text, re.MULTILINE))
    assert off == {"--api-key-file"}
    assert off <= known_flags("serve")


def test_as_many_ranks_join_as_the_coordinator_waits_for(group: dict[str, Any]) -> None:
    ranks = container(group, "ranks")
    gpus = ranks["resources"]["limits"]["nvidia.com/gpu"]
    assert {"name": "NPROC_PER_NODE", "value": str(gpus)} in ranks["env"]
    assert f"--ranks={group['size'] * gpus}" in container(group, "coordinator")["args"]
    assert container(group, "ranks") in group["workerTemplate"]["spec"]["containers"]


def test_probes_and_services_name_ports_that_are_open(group: dict[str, Any]) -> None:
    args = container(group, "coordinator")["args"]
    for pod in pods(group):
        for one in pod["containers"]:
            ports = {port["name"]: port["containerPort"] for port in one["ports"]}
            for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
                (how,) = {"grpc", "tcpSocket", "httpGet"} & one[kind].keys()
                assert one[kind][how]["port"] in {*ports, *ports.values()}, (one["name"], kind)
    open_ports = {p["name"]: p["containerPort"] for p in container(group, "coordinator")["ports"]}
    assert f"--port={open_ports['grpc']}" in args
    assert f"--http-port={open_ports['http']}" in args
    assert f"--control=0.0.0.0:{open_ports['control']}" in args
    assert f"--metrics-port={open_ports['metrics']}" in args
    assert container(group, "ranks")["args"][0] == f"$(LWS_LEADER_ADDRESS):{open_ports['control']}"
    ports = documents("csps.yaml")[1]["spec"]["ports"]
    assert [port["targetPort"] for port in ports] == ["grpc", "http"]
    assert [port["port"] for port in ports] == [open_ports["grpc"], open_ports["http"]]


def test_what_is_mounted_is_there(group: dict[str, Any]) -> None:
    for pod in pods(group):
        volumes = {volume["name"] for volume in pod["volumes"]}
        for one in pod["containers"]:
            assert {mount["name"] for mount in one["volumeMounts"]} <= volumes


def test_ranks_outlive_the_coordinator_and_kubernetes_waits_for_both(group: dict[str, Any]) -> None:
    waits = {}
    for name in ("coordinator", "ranks"):
        _, seconds = container(group, name)["lifecycle"]["preStop"]["exec"]["command"]
        waits[name] = int(seconds)
    drain_s = 11  # csps.coordinator.server: DRAIN_S, CLOSE_S, LEAVE_S
    assert waits["ranks"] > waits["coordinator"] + drain_s
    for pod in pods(group):
        assert pod["terminationGracePeriodSeconds"] > waits["ranks"]


def test_selectors_find_the_group() -> None:
    workers, service = documents("csps.yaml")
    name = workers["metadata"]["name"]
    assert service["spec"]["selector"] == {f"{LWS}/name": name, f"{LWS}/worker-index": "0"}
    assert service["metadata"]["name"] != name, "the controller makes a service of that name"
    (policy,) = documents("network-policy.yaml")
    assert policy["spec"]["podSelector"]["matchLabels"] == {f"{LWS}/name": name}


def test_the_network_policy_opens_what_others_may_reach(group: dict[str, Any]) -> None:
    (policy,) = documents("network-policy.yaml")
    within, others = policy["spec"]["ingress"]
    assert "ports" not in within
    reachable = {port["port"] for port in others["ports"]}
    coordinator, ranks = container(group, "coordinator"), container(group, "ranks")
    ports = {p["name"]: p["containerPort"] for c in (coordinator, ranks) for p in c["ports"]}
    assert reachable == {ports[name] for name in ("grpc", "http", "metrics", "rank-metrics")}
    assert ports["control"] not in reachable
