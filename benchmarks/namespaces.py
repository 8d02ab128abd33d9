"""Networks of Linux network namespaces: the commands that build one, as data.

Each rank has a namespace, joined by a veth pair to a bridge in one more namespace, the switch. If a host has several
ranks, each host has a bridge, and its uplink joins it to the core. A token bucket (tbf) shapes both ends of a link; a
delay needs netem, which not every kernel has.

    rank 0 ── inner ──┐
                      ├ host 0 ── outer ──┐
    rank 1 ── inner ──┘                   ├ core
    rank 2 ── inner ──┐                   │
                      ├ host 1 ── outer ──┘
    rank 3 ── inner ──┘

Nothing is added to the machine's own namespace, and no namespace has a route to it, so traffic cannot leave.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

Command = list[str]

PREFIX = "ringattn-"
_BURST_S = 2e-3  # what a link may send at once after a pause, in seconds of its rate
_MIN_BURST_BYTES = 66 * 1024
_SEGMENT_BYTES = 32 * 1024  # of TCP; less than a burst, so that the kernel does not split it
_QUEUE_BYTES = 16 * 2**20  # more than TCP has in flight between a few ranks, so that nothing is dropped


@dataclass(frozen=True)
class Link:
    """A link, equal in both directions; without a rate it is as fast as the machine."""

    rate_mbit: float | None = None
    delay_ms: float = 0.0

    def shape(self, namespace: str, device: str) -> Iterator[Command]:
        """Yields the commands that shape what a device sends."""
        add, parent = ["tc", "-n", namespace, "qdisc", "add", "dev", device], ["root"]
        if self.rate_mbit is not None:
            burst = max(_MIN_BURST_BYTES, int(self.rate_mbit * 1e6 / 8 * _BURST_S))
            yield ["ip", "-n", namespace, "link", "set", device, "gso_max_size", str(_SEGMENT_BYTES)]
            rate = ["rate", f"{self.rate_mbit}mbit", "burst", str(burst), "limit", str(_QUEUE_BYTES)]
            yield [*add, "root", "handle", "1:", "tbf", *rate]
            parent = ["parent", "1:1"]
        if self.delay_ms:
            yield [*add, *parent, "handle", "2:", "netem", "delay", f"{self.delay_ms}ms", "limit", "100000"]


@dataclass(frozen=True)
class Network:
    """Hosts of ranks.

    Args:
        name: unique on this machine, with PREFIX.
        hosts, ranks_per_host: with one rank per host, its only link is the outer one.
        outer: between a host and the core.
        inner: between a rank and its host.
    """

    name: str
    hosts: int
    ranks_per_host: int
    outer: Link
    inner: Link

    @property
    def num_ranks(self) -> int:
        return self.hosts * self.ranks_per_host

    @property
    def namespaces(self) -> list[str]:
        """The namespaces of the ranks, then the switch."""
        return [self.namespace(rank) for rank in range(self.num_ranks)] + [f"{self.name}-switch"]

    def namespace(self, rank: int) -> str:
        return f"{self.name}-rank{rank}"

    def address(self, rank: int) -> str:
        """Returns a rank's address in a private range (RFC 1918), known in these namespaces only."""
        return f"10.77.{rank // 250}.{rank % 250 + 1}"

    def environment(self, rank: int) -> dict[str, str]:
        """Returns the variables that torchrun would set, and the device of gloo and NCCL."""
        local_rank, local_size = rank % self.ranks_per_host, self.ranks_per_host
        return {
            **{"RANK": str(rank), "WORLD_SIZE": str(self.num_ranks)},
            **{"LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": str(local_size)},
            **{"MASTER_ADDR": self.address(0), "MASTER_PORT": "29500", "OMP_NUM_THREADS": "1"},
            **{"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth0"},
        }

    def enter(self, rank: int, program: list[str]) -> Command:
        """Returns the command that runs a program in a rank's namespace."""
        return ["ip", "netns", "exec", self.namespace(rank), *program]

    def build(self) -> Iterator[Command]:
        """Yields the commands that make the network."""
        switch, two_levels = self.namespaces[-1], self.ranks_per_host > 1
        for namespace in self.namespaces:
            yield ["ip", "netns", "add", namespace]
        yield from _bridge(switch, "core")
        for host in range(self.hosts if two_levels else 0):
            yield from _bridge(switch, f"host{host}")
            yield ["ip", "-n", switch, "link", "add", f"up{host}", "type", "veth", "peer", "name", f"down{host}"]
            yield from _plug(switch, f"up{host}", f"host{host}", self.outer)
            yield from _plug(switch, f"down{host}", "core", self.outer)
        for rank in range(self.num_ranks):
            namespace = self.namespace(rank)
            bridge = f"host{rank // self.ranks_per_host}" if two_levels else "core"
            link = self.inner if two_levels else self.outer
            pair = ["type", "veth", "peer", "name", "eth0", "netns", namespace]
            yield ["ip", "-n", switch, "link", "add", f"rank{rank}", *pair]
            yield from _plug(switch, f"rank{rank}", bridge, link)
            # Without IPv6 addresses, the link carries only what the ranks send.
            yield ["ip", "-n", namespace, "link", "set", "eth0", "addrgenmode", "none"]
            yield ["ip", "-n", namespace, "address", "add", f"{self.address(rank)}/16", "dev", "eth0"]
            yield from link.shape(namespace, "eth0")
            yield ["ip", "-n", namespace, "link", "set", "eth0", "up"]
            yield ["ip", "-n", namespace, "link", "set", "lo", "up"]
            # BBR takes the delay of an empty queue for the length of the path; with queues in both directions it sends
            # too little.
            yield ["ip", "-n", namespace, "route", "replace", "10.77.0.0/16", "dev", "eth0", "congctl", "cubic"]

    def remove(self) -> Iterator[Command]:
        """Yields the commands that remove the network; links go with their namespaces."""
        for namespace in self.namespaces:
            yield ["ip", "netns", "delete", namespace]


def _bridge(switch: str, name: str) -> Iterator[Command]:
    yield ["ip", "-n", switch, "link", "add", name, "type", "bridge"]
    yield ["ip", "-n", switch, "link", "set", name, "addrgenmode", "none"]
    yield ["ip", "-n", switch, "link", "set", name, "up"]


def _plug(switch: str, port: str, bridge: str, link: Link) -> Iterator[Command]:
    yield ["ip", "-n", switch, "link", "set", port, "addrgenmode", "none"]
    yield from link.shape(switch, port)
    yield ["ip", "-n", switch, "link", "set", port, "master", bridge, "up"]
