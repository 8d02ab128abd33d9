"""Networks made of Linux network namespaces: the commands that build one, as data.

Each rank has a namespace of its own, joined by a veth pair to a bridge in one more namespace, the switch. With several
ranks on a host, each host has a bridge, and its uplink joins that to the core. Both ends of a link are shaped, by a
token bucket (tbf); a delay takes netem, which not every kernel has.

    rank 0 ── inner ──┐
                      ├ host 0 ── outer ──┐
    rank 1 ── inner ──┘                   ├ core
    rank 2 ── inner ──┐                   │
                      ├ host 1 ── outer ──┘
    rank 3 ── inner ──┘

Nothing is added to the machine's own namespace, and no namespace has a route to it: traffic cannot leave.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

Command = list[str]

PREFIX = "ringattn-"
PORT = 29500
_ADDRESSES = "10.77.0.0/16"
_SWITCH = "switch"
_BURST_S = 2e-3  # what a link may send at once after a rest, in seconds of its rate
_LEAST_BURST = 66 * 1024
_SEGMENT = 32 * 1024  # what TCP gives a device at once: less than a bucket, so that the kernel need not cut it up
_QUEUE = 16 * 2**20  # more than TCP has under way between a few ranks: nothing is dropped


@dataclass(frozen=True)
class Link:
    """A link, the same in both directions; rate_mbit None leaves it as fast as the machine is."""

    rate_mbit: float | None = None
    delay_ms: float = 0.0

    def shape(self, namespace: str, device: str) -> Iterator[Command]:
        """Yields the commands that shape what leaves through a device."""
        add = ["tc", "-n", namespace, "qdisc", "add", "dev", device]
        if self.rate_mbit is not None:
            burst = max(_LEAST_BURST, int(self.rate_mbit * 1e6 / 8 * _BURST_S))
            yield ["ip", "-n", namespace, "link", "set", device, "gso_max_size", str(_SEGMENT)]
            rate = ["rate", f"{self.rate_mbit}mbit", "burst", str(burst), "limit", str(_QUEUE)]
            yield [*add, "root", "handle", "1:", "tbf", *rate]
        if self.delay_ms:
            parent = ["root"] if self.rate_mbit is None else ["parent", "1:1"]
            yield [*add, *parent, "handle", "2:", "netem", "delay", f"{self.delay_ms}ms", "limit", "100000"]


@dataclass(frozen=True)
class Network:
    """Hosts of ranks.

    Args:
        name: unique on this machine, beginning with PREFIX.
        hosts: how many.
        ranks_per_host: on each. If it is 1, `inner` is not there: a rank's only link is the outer one.
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
        """On all hosts."""
        return self.hosts * self.ranks_per_host

    @property
    def namespaces(self) -> list[str]:
        """The namespaces: of the ranks, and of the switch."""
        return [self.namespace(rank) for rank in range(self.num_ranks)] + [f"{self.name}-{_SWITCH}"]

    def namespace(self, rank: int) -> str:
        """Returns the name of a rank's namespace."""
        return f"{self.name}-rank{rank}"

    def address(self, rank: int) -> str:
        """Returns a rank's address: of a private range (RFC 1918), and known in these namespaces only."""
        return f"10.77.{rank // 250}.{rank % 250 + 1}"

    def environment(self, rank: int) -> dict[str, str]:
        """Returns what torchrun would tell a rank, and the device that gloo and NCCL are to use."""
        return {
            "RANK": str(rank),
            "WORLD_SIZE": str(self.num_ranks),
            "LOCAL_RANK": str(rank % self.ranks_per_host),
            "LOCAL_WORLD_SIZE": str(self.ranks_per_host),
            "MASTER_ADDR": self.address(0),
            "MASTER_PORT": str(PORT),
            "GLOO_SOCKET_IFNAME": "eth0",
            "NCCL_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
        }

    def enter(self, rank: int, program: list[str]) -> Command:
        """Returns the command that runs a program in a rank's namespace."""
        return ["ip", "netns", "exec", self.namespace(rank), *program]

    def build(self) -> Iterator[Command]:
        """Yields the commands that make it."""
        switch = self.namespaces[-1]
        for namespace in self.namespaces:
            yield ["ip", "netns", "add", namespace]
        yield from _bridge(switch, "core")
        two_levels = self.ranks_per_host > 1
        for host in range(self.hosts if two_levels else 0):
            yield from _bridge(switch, f"host{host}")
            yield ["ip", "-n", switch, "link", "add", f"up{host}", "type", "veth", "peer", "name", f"down{host}"]
            yield from _plug(switch, f"up{host}", f"host{host}", self.outer)
            yield from _plug(switch, f"down{host}", "core", self.outer)
        for rank in range(self.num_ranks):
            here = self.namespace(rank)
            bridge = f"host{rank // self.ranks_per_host}" if two_levels else "core"
            link = self.inner if two_levels else self.outer
            pair = ["type", "veth", "peer", "name", "eth0", "netns", here]
            yield ["ip", "-n", switch, "link", "add", f"rank{rank}", *pair]
            yield from _plug(switch, f"rank{rank}", bridge, link)
            # No addresses of IPv6: nothing is on the wire but what the ranks send.
            yield ["ip", "-n", here, "link", "set", "eth0", "addrgenmode", "none"]
            yield ["ip", "-n", here, "address", "add", f"{self.address(rank)}/16", "dev", "eth0"]
            yield from link.shape(here, "eth0")
            yield ["ip", "-n", here, "link", "set", "eth0", "up"]
            yield ["ip", "-n", here, "link", "set", "lo", "up"]
            # BBR takes the time of the way without a queue for its length; with one in both directions it sends too
            # little.
            yield ["ip", "-n", here, "route", "replace", _ADDRESSES, "dev", "eth0", "congctl", "cubic"]

    def remove(self) -> Iterator[Command]:
        """Yields the commands that undo it; links go with their namespaces."""
        for namespace in self.namespaces:
            yield ["ip", "netns", "delete", namespace]


def _bridge(switch: str, name: str) -> Iterator[Command]:
    yield ["ip", "-n", switch, "link", "add", name, "type", "bridge"]
    yield ["ip", "-n", switch, "link", "set", name, "addrgenmode", "none"]
    yield ["ip", "-n", switch, "link", "set", name, "up"]


def _plug(switch: str, port: str, bridge: str, link: Link) -> Iterator[Command]:
    """A port of the switch, shaped as its link."""
    yield ["ip", "-n", switch, "link", "set", port, "addrgenmode", "none"]
    yield from link.shape(switch, port)
    yield ["ip", "-n", switch, "link", "set", port, "master", bridge, "up"]
