"""Programs of all ranks, replayed in integers: who holds what, what is on its way, which sums hold whose shares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ringattn.geometry.masks import K_START, K_STOP, Q_START, Q_STOP
from ringattn.plan.exchanges import Exchange, Gather, Ring
from ringattn.plan.payload import Payload
from ringattn.plan.plan import BlockSlice, ComputeTiles, Program, Step, Transfer

Shares = npt.NDArray[np.int64]


def exchanges_of(world_size: int) -> list[Exchange]:
    """Every exchange that so many ranks can do."""
    doubles = [Ring(outer) for outer in range(2, world_size + 1) if world_size % outer == 0]
    return [Ring(), *doubles, Gather(), Gather(3)]


def rows_of(piece: BlockSlice, block_rows: Sequence[int]) -> list[int]:
    """The piece's rows within its block."""
    if piece.rows is None:
        return list(range(block_rows[piece.block]))
    return [row for run in piece.rows for row in run]


def rows_visited(visit: ComputeTiles, carried: Payload, num_rows: int) -> npt.NDArray[np.bool_]:
    """Which of the piece's rows a visit computes anything of."""
    start, stop = (K_START, K_STOP) if carried is Payload.KV else (Q_START, Q_STOP)
    change = np.zeros(num_rows + 1, dtype=np.int64)
    np.add.at(change, visit.tiles.table[:, start], 1)
    np.add.at(change, visit.tiles.table[:, stop], -1)
    return change.cumsum()[:-1] > 0


def check(programs: Sequence[Program], *, backward: bool) -> None:
    """Everything that can be told without tiles: messages match, nothing is used unheld, kept, lost or added twice."""
    assert len({len(p.steps) for p in programs}) == 1
    assert len({(p.carried, p.block_rows) for p in programs}) == 1
    for step in zip(*(p.steps for p in programs), strict=True):
        check_messages(step)
    if backward:
        check_home(programs)
    for rank, program in enumerate(programs):
        check_lifetimes(rank, program)


def check_messages(step: Sequence[Step]) -> None:
    """Messages between two ranks stand in the same order at both, and no two of a step look alike."""
    sent: dict[tuple[int, int], list[object]] = {}
    received: dict[tuple[int, int], list[object]] = {}
    for rank, here in enumerate(step):
        for t in here.sends:
            sent.setdefault((rank, t.peer), []).append((t.payload, t.piece))
        for t in here.receives:
            received.setdefault((t.peer, rank), []).append((t.payload, t.piece))
    assert sent == received
    for (sender, receiver), messages in sent.items():
        assert sender != receiver
        assert len(set(messages)) == len(messages)


def check_lifetimes(rank: int, program: Program) -> None:
    """Pieces are held when they are used and let go right after; every send, and every gradient, ends once."""
    own = BlockSlice(rank)
    held, coming, sending = {own}, set[BlockSlice](), Counter[Transfer]()
    adding, last_use = Counter[Transfer](), {own: 0}
    for index, step in enumerate(program.steps):
        held |= {t.piece for t in step.sends if t.piece.block == rank and t.payload is program.carried}
        used = [v.piece for v in step.visits]
        used += [t.piece for t in step.sends if t.payload is program.carried]
        for piece in used:
            if piece in coming:  # awaited here
                coming.remove(piece)
                held.add(piece)
            assert piece in held, f"rank {rank} uses {piece} in step {index} without holding it"
            last_use[piece] = index
        sums = {v.piece for v in step.visits}
        sums |= {t.piece for t in step.sends if t.payload is not program.carried}
        for t in step.receives:
            if t.payload is program.carried:
                assert t.piece not in held | coming
                coming.add(t.piece)
                last_use[t.piece] = index
        # A send needs what came before; a visit also what comes in its own step.
        at_post = {t.piece for t in step.sends if t.payload is not program.carried}
        for t in [t for t in adding if t.piece in at_post]:
            del adding[t]
        for t in step.receives:
            if t.payload is not program.carried:
                assert not adding[t]
                adding[t] += 1
        for t in [t for t in adding if t.piece in sums and t.piece not in at_post]:
            del adding[t]
        for t in step.sends:
            assert not sending[t], f"{t} cannot be told from one under way"
            sending[t] += 1
        for t in step.sent:
            assert sending[t] == 1
            del sending[t]
            if t.payload is program.carried:
                last_use[t.piece] = index
        for t in step.added:
            assert t.piece.block != rank or adding[t] == 1, "what comes home is added when the program says so"
            del adding[t]
        assert set(step.frees) <= held | coming
        assert not any(t.piece in step.frees for t in sending if t.payload is program.carried)
        held -= set(step.frees)
        coming -= set(step.frees)
    assert not held
    assert not coming
    assert not sending
    assert not adding
    assert {piece: i for i, step in enumerate(program.steps) for piece in step.frees} == last_use


def check_home(programs: Sequence[Program]) -> None:
    """Every visit's share of a gradient reaches the block's own rank once, in all of its rows."""
    world, rows = len(programs), programs[0].block_rows
    carried = programs[0].carried
    sums: list[dict[BlockSlice, Shares]] = [{} for _ in range(world)]

    def blank(piece: BlockSlice) -> Shares:
        return np.zeros((piece.num_rows(rows[piece.block]), world), dtype=np.int64)

    for step in zip(*(p.steps for p in programs), strict=True):
        flying: dict[tuple[int, int, BlockSlice], Shares] = {}
        for rank, here in enumerate(step):
            for t in here.sends:
                if t.payload is not carried:
                    # Of a piece with no work here yet there are zeros to send.
                    flying[rank, t.peer, t.piece] = sums[rank].pop(t.piece, blank(t.piece))
        for rank, here in enumerate(step):
            for t in here.receives:
                if t.payload is carried:
                    continue
                target = BlockSlice(rank) if t.piece.block == rank else t.piece
                place = rows_of(t.piece, rows) if t.piece.block == rank else slice(None)
                total = sums[rank].setdefault(target, blank(target))
                total[place] += flying.pop((t.peer, rank, t.piece))
        assert not flying
        for rank, here in enumerate(step):
            for v in here.visits:
                total = sums[rank].setdefault(v.piece, blank(v.piece))
                total[:, rank] += rows_visited(v, carried, len(total))
    for block in range(world):
        expected = blank(BlockSlice(block))
        for rank, program in enumerate(programs):
            for own_step in program.steps:
                for v in own_step.visits:
                    if v.piece.block == block:
                        place = rows_of(v.piece, rows)
                        expected[place, rank] += rows_visited(v, carried, len(place))
        assert expected.max(initial=0) <= 1, "a row is visited twice"
        np.testing.assert_array_equal(sums[block].pop(BlockSlice(block), blank(BlockSlice(block))), expected)
    assert not any(sums), "sums that found no way home"
