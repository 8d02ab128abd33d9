"""Selecting an exchange: each candidate's time is bounded from below, and the one with the least bound is taken.

A bound follows only from a call's shape, its mask and layouts, its mesh and a cost model, so every rank selects the
same exchange by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ringattn.cost.cost_model import CostModel
from ringattn.cost.lower_bound import LowerBound
from ringattn.geometry.layout import Layout
from ringattn.geometry.masks import Mask
from ringattn.plan.exchanges import EXCHANGES, Exchange, select_backward
from ringattn.plan.head_parallel import gathered_layout
from ringattn.plan.payload import AttentionShape
from ringattn.plan.plan import Phase
from ringattn.plan.workload import Workload

# Candidates within this share of the least time count as equally fast. Transfers that are hidden under compute still
# take cores and memory bandwidth, so a candidate loses to another one with no more bytes, messages and buffers.
TIE_TOLERANCE = 0.02


@dataclass(frozen=True)
class ExchangeProblem:
    """What a choice depends on, apart from the cost model.

    Args:
        shape: of the tensors.
        masks: one for all batch rows, or one for each.
        layout: which queries each rank holds.
        kv_layout: which keys and values each rank holds.
        mesh: the number of ranks along each axis, the slow one first; or of the one group.
        wanted: whether gradients of (q, k or v) will be wanted; none at all means that there is no backward.
    """

    shape: AttentionShape
    masks: tuple[Mask, ...]
    layout: Layout
    kv_layout: Layout
    mesh: tuple[int, ...]
    wanted: tuple[bool, bool]

    def __str__(self) -> str:
        s = self.shape
        masks = "; ".join(map(str, self.masks))
        return (
            f"{s.batch} x {self.layout.seq_len:,} queries x {self.kv_layout.seq_len:,} keys, "
            f"{s.heads} heads of {s.head_dim}, {s.kv_heads} kv heads, {s.itemsize} bytes an element; "
            f"{masks}; {self.layout}; {' x '.join(map(str, self.mesh))} ranks"
        )

    def workload(self, phase: Phase) -> Workload:
        """Returns one direction."""
        return Workload(self.masks, self.layout, self.kv_layout, self.shape, phase, self.wanted, self.mesh)

    def phases(self, exchange: Exchange) -> tuple[Phase, ...]:
        """Returns the directions, with what moves in each."""
        if not any(self.wanted):
            return (Phase.FORWARD,)
        layout, kv_layout, mesh = self.layout, self.kv_layout, self.mesh
        if exchange.inner is not exchange:
            groups = layout.world_size // mesh[-1]
            layout, kv_layout = gathered_layout(layout, groups)[0], gathered_layout(kv_layout, groups)[0]
            mesh = mesh[:-1] or (1,)
        args = self.masks, layout, kv_layout, self.shape, self.wanted, mesh
        return Phase.FORWARD, select_backward(exchange.inner, *args)


@dataclass(frozen=True)
class Prediction:
    """What an exchange takes.

    Args:
        forward_s, backward_s: seconds until all ranks have finished, at least.
        num_bytes: sent by the busiest rank, forward and backward, approximately.
        num_messages: sent by the busiest rank, approximately.
        imbalance: how much more the busiest rank computes than the average one.
        buffer_bytes: the most that a rank holds of received and packed rows, approximately.
    """

    forward_s: float
    backward_s: float
    num_bytes: int
    num_messages: int
    imbalance: float
    buffer_bytes: int

    @property
    def total_s(self) -> float:
        """Seconds forward and backward."""
        return self.forward_s + self.backward_s


@dataclass(frozen=True)
class Candidate:
    """An exchange that might be chosen.

    Args:
        exchange: its name, a key of EXCHANGES.
        stages: the number of parts; 1 where it has none.
        prediction: None where the exchange does not apply.
        refusal: why it cannot be chosen; None if it can.
    """

    exchange: str
    stages: int = 1
    prediction: Prediction | None = None
    refusal: str | None = None

    @property
    def value(self) -> Exchange:
        """The exchange itself."""
        return EXCHANGES[self.exchange].make(self.stages)

    def __str__(self) -> str:
        return self.exchange if self.stages == 1 else f"{self.exchange} in {self.stages} stages"


@dataclass(frozen=True)
class Choice:
    """What was chosen, and from what; `str` shows it as a table.

    Args:
        problem: what it was chosen for.
        model: by which times are predicted.
        candidates: all that were considered.
        chosen: the one among them; None if none can run.
    """

    problem: ExchangeProblem
    model: CostModel
    candidates: tuple[Candidate, ...]
    chosen: Candidate | None

    def __str__(self) -> str:
        names = ("exchange", "forward ms", "backward ms", "sent MiB", "messages", "imbalance", "buffers MiB")
        rows = [("", *names), *(self._row(candidate) for candidate in self.candidates if candidate.prediction)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [str(self.problem), str(self.model)]
        for mark, name, *numbers in rows:
            columns = [n.rjust(width) for n, width in zip(numbers, widths[2:], strict=True)]
            lines.append("  ".join([mark.ljust(widths[0]), name.ljust(widths[1]), *columns]).rstrip())
        refused = [f"{c.exchange}: cannot run; {c.refusal}" for c in self.candidates if c.refusal is not None]
        return "\n".join([*lines, "Times are lower bounds.", *dict.fromkeys(refused)])

    def _row(self, candidate: Candidate) -> tuple[str, ...]:
        found = candidate.prediction
        assert found is not None
        return (
            "->" if candidate is self.chosen else "",
            str(candidate),
            f"{found.forward_s * 1e3:,.3f}",
            f"{found.backward_s * 1e3:,.3f}",
            f"{found.num_bytes / 2**20:,.2f}",
            str(found.num_messages),
            f"{found.imbalance:.1%}",
            f"{found.buffer_bytes / 2**20:,.2f}",
        )


def candidates() -> tuple[Candidate, ...]:
    """Returns what the automatic choice considers: every exchange of the table, in all numbers of stages it names."""
    return tuple(Candidate(e.name, stages) for e in EXCHANGES.values() for stages in e.stages or (1,))


def select_exchange(
    problem: ExchangeProblem, model: CostModel, exchange: str = "auto", stages: int | None = None
) -> Choice:
    """Returns the exchange with the least bound, and what was predicted of each.

    Args:
        problem: the call.
        model: links and compute.
        exchange: a key of EXCHANGES, or "auto" for any.
        stages: how many, or None for any of those that are tried.
    """
    considered = [c for c in candidates() if exchange in ("auto", c.exchange)]
    if stages is not None:
        considered = [Candidate(name, stages) for name in dict.fromkeys(c.exchange for c in considered)]
        considered = [c for c in considered if stages == 1 or EXCHANGES[c.exchange].stages]
    judged = tuple(_judge(c, problem, model, stages is not None) for c in considered)
    return Choice(problem, model, judged, _best(judged))


def _best(judged: tuple[Candidate, ...]) -> Candidate | None:
    """Returns the first of the fastest candidates to which no other one is preferable; None if none can run."""
    able = {c: c.prediction for c in judged if c.refusal is None and c.prediction is not None}
    limit = min((found.total_s for found in able.values()), default=0.0) * (1.0 + TIE_TOLERANCE)
    costs = {c: (p.num_bytes, p.num_messages, p.buffer_bytes) for c, p in able.items() if p.total_s <= limit}

    def loses(cost: tuple[int, ...]) -> bool:
        slack = 1.0 + TIE_TOLERANCE
        pairs = [list(zip(other, cost, strict=True)) for other in costs.values()]
        return any(all(a <= slack * b for a, b in pair) and any(slack * a < b for a, b in pair) for pair in pairs)

    return next((c for c, cost in costs.items() if not loses(cost)), next(iter(costs), None))


def _judge(candidate: Candidate, problem: ExchangeProblem, model: CostModel, stages_given: bool) -> Candidate:
    """The candidate with its prediction, or with the reason why it cannot run."""
    refusal = _refusal(candidate, problem, stages_given)
    if refusal is not None:
        return replace(candidate, refusal=refusal)
    found = predict(candidate.value, problem, model)
    if model.buffer_bytes is None or found.buffer_bytes <= model.buffer_bytes:
        return replace(candidate, prediction=found)
    needed, allowed = (f"{n / 2**20:,.2f} MiB" for n in (found.buffer_bytes, model.buffer_bytes))
    how = "in one stage" if candidate.stages == 1 else f"in {candidate.stages} stages"
    refusal = f"{how} it needs about {needed} of buffers, and the model allows {allowed}"
    return replace(candidate, prediction=found, refusal=refusal)


def _refusal(candidate: Candidate, problem: ExchangeProblem, stages_given: bool) -> str | None:
    num_axes = EXCHANGES[candidate.exchange].num_axes
    if num_axes == 2 and len(problem.mesh) != 2:
        return "it needs a mesh of two axes, and there is one group"
    if num_axes == 1 and len(problem.mesh) == 2:
        return "it needs one group of all ranks, and there is a mesh of two axes"
    shards = candidate.value.shard_heads(problem.shape.heads, problem.shape.kv_heads, problem.mesh)
    if shards is not None and not stages_given:
        heads = max(sum(len(stage[place].heads) for stage in shards) for place in range(problem.mesh[-1]))
        if candidate.stages > heads:
            return f"{candidate.stages} stages are too many where a rank computes {heads} heads"
    return None


def predict(exchange: Exchange, problem: ExchangeProblem, model: CostModel) -> Prediction:
    """Returns what an exchange that applies takes."""
    bounds = [exchange.lower_bound(problem.workload(phase), model) for phase in problem.phases(exchange)]
    return Prediction(
        bounds[0].seconds,
        sum(bound.seconds for bound in bounds[1:]),
        round(float(np.sum([bound.num_bytes for bound in bounds], axis=0).max())),
        round(float(np.sum([bound.num_messages for bound in bounds], axis=0).max())),
        _imbalance(bounds[0]),
        round(max(bound.buffer_bytes for bound in bounds)),
    )


def _imbalance(bound: LowerBound) -> float:
    return float(bound.flops.max() / bound.flops.mean() - 1.0) if bound.flops.any() else 0.0
