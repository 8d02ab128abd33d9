"""Choosing an exchange: what each would take is predicted, and the fastest that can run is chosen.

A prediction follows from a call's sizes, its mask and layouts, the shape of its mesh and a cost model, and from nothing
else: so every rank comes to the same choice by itself.

Candidates are simulated in the order of their bounds, and none whose bound says that it is not the fastest. Where there
are so many messages that simulating them takes seconds, the bounds alone decide.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from ringattn.cost.cost_model import CostModel
from ringattn.cost.lower_bounds import LowerBound, lower_bound, ulysses_lower_bound
from ringattn.cost.simulation import simulate
from ringattn.cost.spread_timetable import spread_timetable_for
from ringattn.cost.timetable import Timetable
from ringattn.cost.timetables import Scene, timetable_for
from ringattn.geometry.layout import Layout
from ringattn.geometry.masks import Mask
from ringattn.plan.exchanges import Exchange, Gather, Ring, select_backward
from ringattn.plan.head_parallel import gathered_layout
from ringattn.plan.payload import AttentionShape
from ringattn.plan.plan import Phase
from ringattn.types import Floats

_SPREADING = ("ulysses", "hybrid")
_ON_MESHES = ("double ring", "hybrid")


@dataclass(frozen=True)
class ExchangeProblem:
    """What a choice depends on, apart from the cost model.

    Args:
        sizes: of the tensors.
        masks: one for all batch rows, or one for each.
        layout: who holds which queries.
        kv_layout: who holds which keys and values.
        mesh: how many ranks along each axis, the slow one first; or of the one group.
        wanted: whether gradients of (q, k or v) will be; none at all means that there is no backward.
    """

    sizes: AttentionShape
    masks: tuple[Mask, ...]
    layout: Layout
    kv_layout: Layout
    mesh: tuple[int, ...]
    wanted: tuple[bool, bool]

    def __str__(self) -> str:
        s = self.sizes
        masks = "; ".join(map(str, self.masks))
        return (
            f"{s.batch} x {self.layout.seq_len:,} queries x {self.kv_layout.seq_len:,} keys, "
            f"{s.heads} heads of {s.head_dim}, {s.kv_heads} kv heads, {s.itemsize} bytes an element; "
            f"{masks}; {self.layout}; {' x '.join(map(str, self.mesh))} ranks"
        )


@dataclass(frozen=True)
class Prediction:
    """What an exchange would take.

    Args:
        forward_s, backward_s: seconds until all ranks are through.
        num_bytes: what the busiest rank sends, forward and backward.
        num_messages: how many messages the busiest rank sends.
        imbalance: how much more the busiest rank computes than the average one.
        buffer_bytes: the most that a rank holds at once of what it receives and sends.
        simulated: if not, these are sums only: it takes at least so many seconds, and the rest is about so much.
    """

    forward_s: float
    backward_s: float
    num_bytes: int
    num_messages: int
    imbalance: float
    buffer_bytes: int
    simulated: bool = True

    @property
    def total_s(self) -> float:
        """Seconds forward and backward."""
        return self.forward_s + self.backward_s


@dataclass(frozen=True)
class Candidate:
    """An exchange that might be chosen.

    Args:
        exchange: "ring", "gather", "ulysses", "hybrid" or "double ring".
        stages: in how many parts.
        prediction: None where it cannot be told, as it does not apply.
        refusal: why it cannot be chosen; None if it can.
    """

    exchange: str
    stages: int = 1
    prediction: Prediction | None = None
    refusal: str | None = None

    def __str__(self) -> str:
        return self.exchange if self.stages == 1 else f"{self.exchange} in {self.stages} stages"


# What counts as equally fast: of such candidates the first is chosen, and the plainest stand first.
TIE_TOLERANCE = 0.01
# With more messages than this, of all ranks of some candidate, nothing is simulated: about a second's work.
MOST_MESSAGES = 1 << 18
CANDIDATES = (
    Candidate("ring"),
    Candidate("gather"),
    Candidate("gather", 4),
    Candidate("ulysses"),
    Candidate("ulysses", 2),
    Candidate("double ring"),
    Candidate("hybrid"),
    Candidate("hybrid", 2),
)
EXCHANGES = tuple(dict.fromkeys(candidate.exchange for candidate in CANDIDATES))
STAGED = ("gather", *_SPREADING)


@dataclass(frozen=True)
class Choice:
    """What was chosen, and from what; `str` shows it as a table.

    Args:
        setting: what it was chosen for.
        model: by which the times are predicted.
        candidates: all that were looked at.
        chosen: the one among them; None if none can run.
    """

    setting: ExchangeProblem
    model: CostModel
    candidates: tuple[Candidate, ...]
    chosen: Candidate | None

    def __str__(self) -> str:
        names = ("exchange", "forward ms", "backward ms", "sent MiB", "messages", "imbalance", "buffers MiB")
        rows = [("", *names), *(self._row(candidate) for candidate in self.candidates if candidate.prediction)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [str(self.setting), str(self.model)]
        for mark, name, *numbers in rows:
            columns = [n.rjust(width) for n, width in zip(numbers, widths[2:], strict=True)]
            lines.append("  ".join([mark.ljust(widths[0]), name.ljust(widths[1]), *columns]).rstrip())
        refused = [f"{c.exchange}: cannot run; {c.refusal}" for c in self.candidates if c.refusal is not None]
        return "\n".join([*lines, *self._notes(), *dict.fromkeys(refused)])

    def _notes(self) -> list[str]:
        found = [candidate.prediction.simulated for candidate in self.candidates if candidate.prediction]
        if all(found):
            return []
        if any(found):
            return ["≥: not simulated, as it takes at least that, which is too long; the rest of its row is about so."]
        return [
            "≥: too many messages to simulate; chosen by what each takes at least; the rest of the rows is about so."
        ]

    def _row(self, candidate: Candidate) -> tuple[str, ...]:
        found = candidate.prediction
        assert found is not None
        least = "" if found.simulated else "≥ "
        return (
            "->" if candidate is self.chosen else "",
            str(candidate),
            f"{least}{found.forward_s * 1e3:,.3f}",
            f"{least}{found.backward_s * 1e3:,.3f}",
            f"{found.num_bytes / 2**20:,.2f}",
            str(found.num_messages),
            f"{found.imbalance:.1%}",
            f"{found.buffer_bytes / 2**20:,.2f}",
        )


def select_exchange(
    setting: ExchangeProblem, model: CostModel, exchange: str = "auto", stages: int | None = None
) -> Choice:
    """Returns the fastest exchange, and what was predicted of each.

    Args:
        setting: the call.
        model: links and compute.
        exchange: one of EXCHANGES, or "auto" for any.
        stages: how many, or None for any of those that are tried.
    """
    asked = [c for c in CANDIDATES if exchange in ("auto", c.exchange)]
    if stages is not None:
        asked = [Candidate(name, stages) for name in dict.fromkeys(c.exchange for c in asked)]
        asked = [c for c in asked if stages == 1 or c.exchange in STAGED]
    looked_at = _judged([_applicable(candidate, setting, stages is not None) for candidate in asked], setting, model)
    seconds = _seconds(looked_at)
    limit = min(seconds.values(), default=0.0) * (1.0 + TIE_TOLERANCE)
    chosen = next((c for c, total in seconds.items() if total <= limit), None)
    return Choice(setting, model, looked_at, chosen)


def _applicable(candidate: Candidate, setting: ExchangeProblem, stages_given: bool) -> Candidate:
    return replace(candidate, refusal=_refusal(candidate, setting, stages_given))


def _seconds(candidates: Iterable[Candidate]) -> dict[Candidate, float]:
    return {c: c.prediction.total_s for c in candidates if c.refusal is None and c.prediction is not None}


def _judged(candidates: list[Candidate], setting: ExchangeProblem, model: CostModel) -> tuple[Candidate, ...]:
    """The candidates with their predictions, simulated where that can matter."""
    bounds = {c: _bounds(c, setting, model) for c in candidates if c.refusal is None}
    most = max((sum(float(b.num_messages.sum()) for b in found) for found in bounds.values()), default=0.0)
    judged = {c: _limited(replace(c, prediction=_at_least(found)), model) for c, found in bounds.items()}
    if most <= MOST_MESSAGES:
        # By their bounds alone none is refused, and none chosen.
        judged = {c: replace(found, refusal=None) for c, found in judged.items()}
        best = float("inf")
        for c, least in sorted(_seconds(judged.values()).items(), key=lambda entry: entry[1]):
            plain = replace(c, prediction=None)
            if least > best * (1.0 + TIE_TOLERANCE):
                break
            judged[plain] = _limited(replace(plain, prediction=predict(plain, setting, model)), model)
            best = min([best, *_seconds([judged[plain]]).values()])
    return tuple(judged.get(candidate, candidate) for candidate in candidates)


def _limited(candidate: Candidate, model: CostModel) -> Candidate:
    """The candidate, refused if it takes more memory than there may be."""
    found = candidate.prediction
    if found is None or model.buffer_bytes is None or found.buffer_bytes <= model.buffer_bytes:
        return candidate
    needed, given = (f"{n / 2**20:,.2f} MiB" for n in (found.buffer_bytes, model.buffer_bytes))
    about = "" if found.simulated else "about "
    refusal = f"{_staged(candidate)} it needs {about}{needed} of buffers, and the model allows {given}"
    return replace(candidate, refusal=refusal)


def _staged(candidate: Candidate) -> str:
    return "in one go" if candidate.stages == 1 else f"in {candidate.stages} stages"


def _refusal(candidate: Candidate, setting: ExchangeProblem, stages_given: bool) -> str | None:
    on_mesh = len(setting.mesh) == 2
    if candidate.exchange in _ON_MESHES and not on_mesh:
        return "it needs a mesh of two axes, and there is one group"
    if candidate.exchange not in _ON_MESHES and on_mesh:
        return "it needs one group of all ranks, and there is a mesh of two axes"
    heads = -(-setting.sizes.heads // setting.mesh[-1])
    if candidate.exchange in _SPREADING and candidate.stages > heads and not stages_given:
        return f"{candidate.stages} stages are too many where a rank computes {heads} heads"
    return None


def predict(candidate: Candidate, setting: ExchangeProblem, model: CostModel) -> Prediction:
    """Returns what a candidate that applies would take."""
    exchange, phases = _phases(candidate, setting)
    tables = [_timetable(candidate, setting, exchange, phase) for phase in phases]
    seconds = [
        simulate(table, model, backward=phase.is_backward).total for table, phase in zip(tables, phases, strict=True)
    ]
    return Prediction(
        seconds[0],
        sum(seconds[1:]),
        int(np.sum([table.bytes_sent for table in tables], axis=0).max()),
        int(np.sum([table.messages_sent for table in tables], axis=0).max()),
        _imbalance(tables[0].flops),
        max(int(table.buffer_bytes.max()) for table in tables),
    )


def _bounds(candidate: Candidate, setting: ExchangeProblem, model: CostModel) -> list[LowerBound]:
    """What each direction takes at least."""
    exchange, phases = _phases(candidate, setting)
    scenes = [_scene(setting, phase) for phase in phases]
    if candidate.exchange not in _SPREADING:
        return [lower_bound(exchange, scene, model) for scene in scenes]
    assert isinstance(exchange, Ring)
    groups = setting.layout.world_size // setting.mesh[-1]
    return [ulysses_lower_bound(exchange, scene, model, groups, candidate.stages) for scene in scenes]


def _at_least(bounds: list[LowerBound]) -> Prediction:
    return Prediction(
        bounds[0].seconds,
        sum(bound.seconds for bound in bounds[1:]),
        round(float(np.sum([bound.num_bytes for bound in bounds], axis=0).max())),
        round(float(np.sum([bound.num_messages for bound in bounds], axis=0).max())),
        _imbalance(bounds[0].flops),
        round(max(bound.buffer_bytes for bound in bounds)),
        simulated=False,
    )


def _imbalance(flops: Floats) -> float:
    return float(flops.max() / flops.mean() - 1.0) if flops.any() else 0.0


def _scene(setting: ExchangeProblem, phase: Phase) -> Scene:
    return Scene(setting.masks, setting.layout, setting.kv_layout, setting.sizes, phase, setting.wanted)


def _phases(candidate: Candidate, setting: ExchangeProblem) -> tuple[Exchange, tuple[Phase, ...]]:
    """The exchange that runs, between groups if heads are spread, and its directions."""
    layout, kv_layout, exchange = setting.layout, setting.kv_layout, _exchange(candidate, setting)
    if not any(setting.wanted):
        return exchange, (Phase.FORWARD,)
    if candidate.exchange in _SPREADING:
        groups = setting.layout.world_size // setting.mesh[-1]
        layout, kv_layout = gathered_layout(layout, groups)[0], gathered_layout(kv_layout, groups)[0]
    backward = select_backward(exchange, setting.masks, layout, kv_layout, setting.sizes, setting.wanted)
    return exchange, (Phase.FORWARD, backward)


def _exchange(candidate: Candidate, setting: ExchangeProblem) -> Exchange:
    if candidate.exchange == "gather":
        return Gather(candidate.stages)
    return Ring(setting.mesh[0] if candidate.exchange == "double ring" else 1)


def _timetable(candidate: Candidate, setting: ExchangeProblem, exchange: Exchange, phase: Phase) -> Timetable:
    scene = _scene(setting, phase)
    if candidate.exchange not in _SPREADING:
        return timetable_for(exchange, scene)
    return spread_timetable_for(exchange, scene, setting.layout.world_size // setting.mesh[-1], candidate.stages)
