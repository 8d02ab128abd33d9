"""Runs the programs of all ranks with numbers from a cost model in place of tensors: how long each rank takes.

Each rank has a clock. A message leaves when both its ranks have posted it and its links are free: on each axis a rank
sends, and receives, one message at a time, and both at once. Messages travel while ranks compute. A rank waits for what
the executor waits for, in the same place. Choices by lower bounds are judged by this.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from ringattn.cost.cost_model import CostModel
from ringattn.plan.exchanges import Exchange, build_plan
from ringattn.plan.exchanges.ulysses import all_to_all_bytes, gather_bytes, scatter_bytes
from ringattn.plan.head_parallel import gathered_layout, replicates_kv_heads
from ringattn.plan.head_shards import HeadShard
from ringattn.plan.plan import BlockSlice, Phase, Program, Transfer
from ringattn.plan.select_exchange import ExchangeProblem
from ringattn.plan.workload import Workload


@dataclass
class Clocks:
    """The state of all ranks.

    Args:
        model: links and compute.
        world_size: the number of ranks.
    """

    model: CostModel
    world_size: int
    now: list[float] = field(init=False)
    busy: list[float] = field(init=False)
    sent_bytes: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.now, self.busy = [0.0] * self.world_size, [0.0] * self.world_size
        self.sent_bytes = [0] * self.world_size
        # By axis, 0 the fast one: until when a rank's outgoing link, and its incoming one, is in use.
        self._out = [[0.0] * self.world_size for _ in range(2)]
        self._in = [[0.0] * self.world_size for _ in range(2)]

    def spend(self, rank: int, seconds: float) -> None:
        """A rank computes or copies."""
        self.now[rank] += seconds
        self.busy[rank] += seconds

    def copy(self, rank: int, num_bytes: float) -> None:
        """A rank copies bytes."""
        self.spend(rank, num_bytes / self.model.compute.copy_bytes_per_s)

    def wait(self, rank: int, arrival: float) -> None:
        """A rank waits for a message."""
        self.now[rank] = max(self.now[rank], arrival)

    def send(self, posted: Sequence[float], source: int, target: int, axis: int, num_bytes: float) -> float:
        """A message of some bytes leaves; returns when it arrives. One of no bytes is not sent."""
        if not num_bytes:
            return 0.0
        link = self.model.links[axis]
        ready = max(posted[source], posted[target], self._out[axis][source], self._in[axis][target])
        end = ready + num_bytes / link.bytes_per_s
        self._out[axis][source] = self._in[axis][target] = end
        self.sent_bytes[source] += int(num_bytes)
        return end + link.latency_s


class _Rank:
    """One rank of some programs, and what it holds.

    Args:
        clocks: of all ranks.
        rank: its number there.
        index: its number in the programs.
        program: its steps.
        workload: of the programs.
    """

    def __init__(self, clocks: Clocks, rank: int, index: int, program: Program, workload: Workload) -> None:
        self.clocks, self.rank, self.program, self.workload = clocks, rank, program, workload
        self.own = BlockSlice(index)
        self.arrivals: dict[BlockSlice, float] = {}
        self.returns: dict[BlockSlice, dict[Transfer, float]] = {}
        self.sends: dict[Transfer, float] = {}
        self.packed: set[BlockSlice] = set()

    def before_posting(self, step: int) -> None:
        """Waits for what the step's sends need, and packs slices of the own block."""
        for t in self.program.steps[step].sends:
            if t.payload is not self.program.moving:
                self._accumulate(t.slice)
                continue
            self.clocks.wait(self.rank, self.arrivals.pop(t.slice, 0.0))
            if t.slice.block == self.own.block and t.slice not in self.packed:
                self.packed.add(t.slice)
                self.clocks.copy(self.rank, self.num_bytes(t))

    def arrive(self, t: Transfer, arrival: float) -> None:
        """Notes when a received message arrives."""
        if t.payload is self.program.moving:
            self.arrivals[t.slice] = arrival
        else:
            self.returns.setdefault(self._target(t), {})[t] = arrival

    def after_posting(self, step: int) -> None:
        """Computes, and waits for what the step lists."""
        compute = self.clocks.model.compute
        rate = compute.backward_flops_per_s if self.workload.phase.is_backward else compute.flops_per_s
        for c in self.program.steps[step].computes:
            self.clocks.wait(self.rank, self.arrivals.pop(c.slice, 0.0))
            if c.slice.block != self.own.block:
                self._accumulate(c.slice)
            flops = c.tiles.area(self.workload.num_copies) * self.workload.flops_per_pair
            self.clocks.spend(self.rank, flops / rate + compute.launch_s)
        for t in self.program.steps[step].wait_returns:
            pending = self.returns.get(self._target(t), {})
            if t in pending:
                self.clocks.wait(self.rank, pending.pop(t))
                if t.slice.block == self.own.block:
                    self.clocks.copy(self.rank, self.num_bytes(t))
        for t in self.program.steps[step].wait_sends:
            self.clocks.wait(self.rank, self.sends.pop(t))

    def num_bytes(self, t: Transfer) -> int:
        """The bytes of a message."""
        return self.program.rows_of(t) * self.workload.shape.row_bytes(t.payload)

    def _accumulate(self, block_slice: BlockSlice) -> None:
        for arrival in self.returns.pop(block_slice, {}).values():
            self.clocks.wait(self.rank, arrival)

    def _target(self, t: Transfer) -> BlockSlice:
        return self.own if t.slice.block == self.own.block else t.slice


def run_programs(
    clocks: Clocks, ranks: Sequence[int], programs: Sequence[Program], workload: Workload, first_axis: int = 0
) -> None:
    """Runs the programs of some ranks.

    Args:
        clocks: of all ranks.
        ranks: which of them run program 0, 1, ...
        programs: one direction of each.
        workload: of the programs.
        first_axis: the axis of the clocks that is the fast one of the programs.
    """
    states = [_Rank(clocks, rank, index, programs[index], workload) for index, rank in enumerate(ranks)]
    num_inner = len(ranks) // workload.pattern.num_outer
    for step in range(len(programs[0].steps)):
        for state in states:
            state.before_posting(step)
        posted = list(clocks.now)
        for state, t in _in_order(states, step):
            axis = int(state.own.block // num_inner != t.peer // num_inner)
            target = states[t.peer]
            arrival = clocks.send(posted, state.rank, target.rank, min(axis + first_axis, 1), state.num_bytes(t))
            state.sends[t] = arrival
            target.arrive(replace(t, peer=state.own.block), arrival)
        for state in states:
            state.after_posting(step)


def _in_order(states: Sequence[_Rank], step: int) -> Iterable[tuple[_Rank, Transfer]]:
    """The step's messages in rounds, in each of which a rank sends one: the nearest peer first, returns last."""
    world = len(states)
    rounds: dict[tuple[int, int, int], list[tuple[_Rank, Transfer]]] = {}
    for state in states:
        counts: dict[tuple[int, int], int] = {}
        for t in state.program.steps[step].sends:
            kind = int(t.payload is not state.program.moving), (t.peer - state.own.block) % world
            number = counts.get(kind, 0)
            counts[kind] = number + 1
            rounds.setdefault((*kind, number), []).append((state, t))
    for key in sorted(rounds):
        yield from rounds[key]


def simulate_direction(exchange: Exchange, workload: Workload, model: CostModel) -> Clocks:
    """Returns the clocks of all ranks after one direction of an exchange."""
    clocks = Clocks(model, workload.layout.world_size)
    shards = exchange.shard_heads(workload.shape.heads, workload.shape.kv_heads, workload.mesh)
    if shards is None:
        run_programs(clocks, range(clocks.world_size), _programs(exchange, workload), workload)
        return clocks
    width = workload.mesh[-1]
    groups = clocks.world_size // width
    layouts = [gathered_layout(held, groups)[0] for held in (workload.layout, workload.kv_layout)]
    inner = replace(workload, layout=layouts[0], kv_layout=layouts[1], mesh=workload.mesh[:-1] or (1,))
    programs = _programs(exchange.inner, inner)
    scatter, gather = scatter_bytes(workload), gather_bytes(workload, replicates_kv_heads(shards))
    arrivals = _all_to_all(clocks, workload, groups, width, shards[0], scatter)
    returning: list[list[float]] | None = None
    returned: list[float] = []
    for stage, stage_shards in enumerate(shards):
        _land(clocks, arrivals, all_to_all_bytes(workload, groups, stage_shards, scatter)[1].ravel().tolist())
        if stage + 1 < len(shards):
            arrivals = _all_to_all(clocks, workload, groups, width, shards[stage + 1], scatter)
        for place, shard in enumerate(stage_shards):
            if shard.heads:
                part = replace(inner, shape=workload.shape.of_heads(len(shard.heads), len(shard.kv_heads)))
                ranks = [group * width + place for group in range(groups)]
                run_programs(clocks, ranks, programs, part, first_axis=1)
        if returning is not None:
            _land(clocks, returning, returned)
        returning = _all_to_all(clocks, workload, groups, width, stage_shards, gather, back=True)
        returned = all_to_all_bytes(workload, groups, stage_shards, gather)[0].ravel().tolist()
    if returning is not None:
        _land(clocks, returning, returned)
    return clocks


def _programs(exchange: Exchange, workload: Workload) -> list[Program]:
    """One direction of every rank, without gradients that are not wanted."""
    back = workload.phase if workload.phase.is_backward else Phase.BACKWARD
    found = []
    for rank in range(workload.layout.world_size):
        plan = build_plan(exchange, workload.masks, workload.layout, workload.kv_layout, rank, back, mesh=workload.mesh)
        program = plan.backward if workload.phase.is_backward else plan.forward
        if workload.phase.is_backward and not workload.returning_row_bytes:
            program = program.without_returns()
        found.append(program)
    return found


def _all_to_all(
    clocks: Clocks,
    workload: Workload,
    groups: int,
    width: int,
    shards: Sequence[HeadShard],
    row_bytes: tuple[int, int],
    *,
    back: bool = False,
) -> list[list[float]]:
    """Posts an all-to-all within each group; returns the arrivals that each rank waits for, its own sends included."""
    heads = [(len(s.heads), len(s.kv_heads)) for s in shards]
    rows = [
        [held.num_tokens(rank) for rank in range(clocks.world_size)] for held in (workload.layout, workload.kv_layout)
    ]

    def num_bytes(holder: int, computer: int) -> int:
        number, kv_number = heads[computer % width]
        per_row = rows[0][holder] * number * row_bytes[0] + rows[1][holder] * kv_number * row_bytes[1]
        return workload.shape.batch * per_row

    arrivals: list[list[float]] = [[] for _ in range(clocks.world_size)]
    ranks, hops = range(clocks.world_size), range(1, width)
    peers = [(rank, rank // width * width + (rank % width + hop) % width) for hop in hops for rank in ranks]
    for source, target in peers:
        amount = num_bytes(target, source) if back else num_bytes(source, target)
        clocks.copy(source, amount)
    posted = list(clocks.now)
    for source, target in peers:
        amount = num_bytes(target, source) if back else num_bytes(source, target)
        arrival = clocks.send(posted, source, target, 0, amount)
        arrivals[source].append(arrival)
        arrivals[target].append(arrival)
    return arrivals


def _land(clocks: Clocks, arrivals: list[list[float]], received: Sequence[float]) -> None:
    """Every rank waits for an all-to-all, and copies what it received into place."""
    for rank, times in enumerate(arrivals):
        for arrival in times:
            clocks.wait(rank, arrival)
        clocks.copy(rank, received[rank])


def simulate(exchange: Exchange, problem: ExchangeProblem, model: CostModel) -> float:
    """Returns the seconds of a call, forward and backward."""
    return sum(
        max(simulate_direction(exchange, problem.workload(phase), model).now, default=0.0)
        for phase in problem.phases(exchange)
    )
