"""Two nodes on one machine: network namespaces with an address each and a cable between them, which can be pulled.

A run over both gives what one process does; a node that dies or cannot be reached any more ends the other with a word about
it; started again, the run goes on.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, small_arguments
from test_train import LOSSES, STEADY, WEIGHTS, assert_same_weights, assert_weights_move, log, losses

pytestmark = pytest.mark.long
Run = Callable[..., Any]
CABLE, STRAY = "cable0", "stray0"
"""Interfaces of each node: to the other one, and to nowhere, as where a firewall drops what is sent."""

ADDRESSES = ("10.77.0.1", "10.77.0.2")


class Node:
    """A network namespace with a host name of its own."""

    def __init__(self, name: str, number: int) -> None:
        self.name, self.number, self.address = name, number, ADDRESSES[number]
        self.said = ""
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, port: int, *command: str) -> None:
        """torchrun on this node, its output in NAME.txt; the first node has the rendezvous."""
        torchrun = [
            *(
                "-m",
                "torch.distributed.run",
                "--nnodes=2",
                "--nproc_per_node=1",
                "--rdzv_backend=c10d",
                "--rdzv_id=test",
            ),
            *(f"--rdzv_endpoint={ADDRESSES[0]}:{port}", f"--rdzv_conf=is_host={int(self.number == 0)}"),
            f"--local_addr={self.address}",
        ]
        named = ["unshare", "--uts", "sh", "-c", f'hostname {self.name}; exec "$@"', "-"]
        environment = os.environ | {"GLOO_SOCKET_IFNAME": CABLE, "PYTHONPATH": str(ROOT)}
        with Path(f"{self.name}.txt").open("w") as output:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *named, sys.executable, *torchrun, *command],
                stdout=output, stderr=subprocess.STDOUT, env=environment,
            )  # fmt: skip

    def output(self) -> str:
        return Path(f"{self.name}.txt").read_text()

    def wait_for(self, text: str, seconds: float = 200) -> None:
        until = time.monotonic() + seconds
        while text not in self.output():
            assert self.process is not None
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < until, self.output()
            time.sleep(0.02)

    def ends(self, seconds: float = 200) -> int:
        """The launcher's status."""
        assert self.process is not None
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{self.name} has not ended within {seconds} s:\n{self.output()}")

    def kill(self) -> None:
        """Launcher and ranks alike, as a machine that loses its power; but what has been sent still arrives."""
        pids = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True).stdout.split()
        if pids:
            subprocess.run(["kill", "-KILL", *pids], stderr=subprocess.DEVNULL)
        if self.process is not None:
            self.process.wait(10)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def network() -> Iterator[list[Node]]:
    """The nodes; nothing of them is left behind."""
    if shutil.which("ip") is None:
        pytest.skip("no `ip` here: apt-get install iproute2")
    nodes = [Node(f"node{number + 1}-{os.getpid()}", number) for number in (0, 1)]
    try:
        try:
            for node in nodes:
                ip("netns", "add", node.name)
            ip("link", "add", CABLE, "netns", nodes[0].name, "type", "veth", "peer", CABLE, "netns", nodes[1].name)
        except subprocess.CalledProcessError as refused:
            pytest.skip(f"network namespaces cannot be made here: {refused.stderr.strip()}")
        for node in nodes:
            inside = ("-n", node.name)
            ip(*inside, "link", "set", "lo", "up")
            ip(*inside, "addr", "add", f"{node.address}/24", "dev", CABLE)
            ip(*inside, "link", "set", CABLE, "up")
            ip(*inside, "link", "add", STRAY, "type", "veth", "peer", "end0")
            ip(*inside, "addr", "add", f"{node.address.replace('77', '78')}/24", "dev", STRAY)
            for name in (STRAY, "end0"):
                ip(*inside, "link", "set", name, "up")
            for address in ADDRESSES:
                other = ("lladdr", "02:00:00:00:00:01", "dev", STRAY)
                ip(*inside, "neigh", "replace", address.replace("77", "78"), *other)
        yield nodes
    finally:
        for node in nodes:
            node.kill()
            subprocess.run(["ip", "netns", "del", node.name], capture_output=True)


@pytest.fixture
def nodes(network: list[Node]) -> Iterator[list[Node]]:
    """Nothing runs on them, and the cable is in."""
    yield network
    for node in network:
        node.kill()
        ip("-n", node.name, "link", "set", CABLE, "up")


def launch(nodes: list[Node], port: int, *runs: list[str]) -> None:
    """The same runs, one after another, on both nodes."""
    tasks = Path(f"{port}.json")
    tasks.write_text(json.dumps([["train", *arguments] for arguments in runs]))
    for node in nodes:
        node.start(port, str(ROOT / "tests" / "rank_runs.py"), str(tasks))


def told(node: Node, *ways: str) -> None:
    """Its output names what happened, once, in one of these ways."""
    lines = [line for line in node.output().splitlines() if "posttrain: error: " in line]
    assert len(lines) == 1, node.output()
    assert any(way in lines[0] for way in ways), lines[0]
    assert "continues at its last checkpoint" in lines[0]


def test_a_node_is_killed_and_the_run_goes_on(nodes: list[Node], run: Run) -> None:
    """Both sides of it: the node without and, later, the node with the rendezvous is lost."""
    first, second = nodes
    sharded = small_arguments("distribution=fsdp", *STEADY, "train.steps=4", "run.dir=sharded")
    long = ["train.steps=60", "train.eval_every=60", "train.save_every=10", "train.keep_checkpoints=9", "optim.lr=3e-4"]
    arguments = small_arguments(*STEADY, *long, "run.dir=nodes")
    launch(nodes, 29501, sharded, arguments)
    first.wait_for("step 12/60")
    second.kill()
    began = time.monotonic()
    assert first.ends(60) == 1
    assert time.monotonic() - began < 40
    told(first, f"rank 0 on {first.name} lost another rank, which ended, or was killed, without a word")
    assert "2 processes (FSDP, gloo)" in first.output()
    assert "2 processes (DDP, gloo)" in first.output()
    assert "processes (" not in second.output(), "rank 0 alone says it"
    assert not Path("nodes/summary.json").exists()

    endless = small_arguments("train.steps=100000", "train.eval_every=50000", "run.dir=endless")
    launch(nodes, 29502, arguments, endless)
    first.wait_for("step 5/100000")
    first.kill()
    began = time.monotonic()
    assert second.ends(60) == 1
    assert time.monotonic() - began < 40
    told(second, f"rank 1 on {second.name} lost another rank", "rank 1 ends: the launch's store at 10.77.0.1:")

    assert "continues at step" in first.output()
    for made, options in (("sharded", ("train.steps=4",)), ("nodes", long)):
        run(*STEADY, *options, f"run.dir={made}-whole")
        assert [line["step"] for line in log(made)] == [line["step"] for line in log(f"{made}-whole")]
        assert losses(made) == pytest.approx(losses(f"{made}-whole"), rel=LOSSES)
        assert_same_weights(made, f"{made}-whole", WEIGHTS)
    assert_weights_move("nodes")


def apart(nodes: list[Node], interface: str) -> list[dict[str, Any]]:
    """What makes a rank of each node."""
    environment = {
        "MASTER_ADDR": ADDRESSES[0],
        "GLOO_SOCKET_IFNAME": interface,
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
    }
    return [{"namespace": node.name, "environment": environment} for node in nodes]


def test_a_cable_that_is_pulled(nodes: list[Node], posttrain_process: Run) -> None:
    """No connection closes: each side waits for the other. Put in again soon, it does no harm."""
    pulled = f"ip link set {CABLE} down"
    times = {"posttrain.alarm:SILENT_S": 8, "posttrain.alarm:BEAT_S": 1}
    step = "posttrain.train:check_finite"
    done = posttrain_process(
        "train.steps=100000", "train.eval_every=50000", "run.dir=r", ranks=2, each=apart(nodes, CABLE), on_rank=1, set=times,
        commands=[[step, 3, f"{pulled}; sleep 2; ip link set {CABLE} up"], [step, 6, pulled]], others={"set": times},
    )  # fmt: skip
    assert done["statuses"] == [1, 1], done["output"]
    assert "step 5/" in done["output"]
    assert "step 9/" not in done["output"]
    assert (
        f"posttrain: error: rank 1 on {nodes[1].name} has said nothing for 8 s: its machine is down" in done["output"]
    )
    assert f"posttrain: error: rank 1 ends: the launch's store at {ADDRESSES[0]}:" in done["output"]
    assert "has not answered for 8 s: the machine of rank 0 is down, or the network to it" in done["output"]
    assert done["seconds"] < 60


def test_the_wrong_network(nodes: list[Node], posttrain_process: Run) -> None:
    """The store answers, but what the ranks send each other goes nowhere: the process group is never made."""
    done = posttrain_process("distribution.connect_seconds=4", "run.dir=r", ranks=2, each=apart(nodes, STRAY))
    assert done["statuses"] == [1, 1], done["output"]
    for rank, node in enumerate(nodes):
        assert f"posttrain: error: rank {rank} of 2 on {node.name} has waited 4 s for the first sum" in done["output"]
    assert f"store is at {ADDRESSES[0]}:" in done["output"]
    assert f"GLOO_SOCKET_IFNAME={STRAY}" in done["output"]
    assert "distribution.connect_seconds" in done["output"]
    assert not Path("r").exists()
