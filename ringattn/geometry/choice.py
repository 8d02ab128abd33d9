"""Choosing an exchange: what each would take is predicted, and the fastest that can run is chosen.

A prediction follows from a call's sizes, its mask and layouts, the shape of its mesh and a cost model, and from nothing
else: so every rank comes to the same choice by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ringattn.geometry.cost import CostModel
from ringattn.geometry.exchanges import Exchange, Gather, Ring, cheaper_backward
from ringattn.geometry.layout import Layout
from ringattn.geometry.masks import Mask
from ringattn.geometry.plan import Phase
from ringattn.geometry.simulation import simulate
from ringattn.geometry.sizes import Sizes
from ringattn.geometry.spread import united
from ringattn.geometry.spread_timetable import spread_timetable_for
from ringattn.geometry.timetable import Timetable
from ringattn.geometry.timetables import Scene, timetable_for

_SPREADING = ("ulysses", "hybrid")
_ON_MESHES = ("double ring", "hybrid")


@dataclass(frozen=True)
class Setting:
    """What a choice depends on, apart from the cost model.

    Args:
        sizes: of the tensors.
        masks: one for all batch rows, or one for each.
        layout: who holds which queries.
        kv_layout: who holds which keys and values.
        mesh: how many ranks along each axis, the slow one first; or of the one group.
        wanted: whether gradients of (q, k or v) will be; none at all means that there is no backward.
    """

    sizes: Sizes
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
EQUAL = 0.01
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

    setting: Setting
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
        return "\n".join([*lines, *dict.fromkeys(refused)])

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


def choose(setting: Setting, model: CostModel, exchange: str = "auto", stages: int | None = None) -> Choice:
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
    looked_at = tuple(_look_at(candidate, setting, model, stages is not None) for candidate in asked)
    seconds = {c: c.prediction.total_s for c in looked_at if c.refusal is None and c.prediction is not None}
    limit = min(seconds.values(), default=0.0) * (1.0 + EQUAL)
    chosen = next((c for c, total in seconds.items() if total <= limit), None)
    return Choice(setting, model, looked_at, chosen)


def _look_at(candidate: Candidate, setting: Setting, model: CostModel, stages_given: bool) -> Candidate:
    refusal = _refusal(candidate, setting, stages_given)
    if refusal is not None:
        return replace(candidate, refusal=refusal)
    found = predict(candidate, setting, model)
    if model.buffer_bytes is not None and found.buffer_bytes > model.buffer_bytes:
        needed, given = (f"{n / 2**20:,.2f} MiB" for n in (found.buffer_bytes, model.buffer_bytes))
        refusal = f"{_staged(candidate)} it needs {needed} of buffers, and the model allows {given}"
    return replace(candidate, prediction=found, refusal=refusal)


def _staged(candidate: Candidate) -> str:
    return "in one go" if candidate.stages == 1 else f"in {candidate.stages} stages"


def _refusal(candidate: Candidate, setting: Setting, stages_given: bool) -> str | None:
    on_mesh = len(setting.mesh) == 2
    if candidate.exchange in _ON_MESHES and not on_mesh:
        return "it needs a mesh of two axes, and there is one group"
    if candidate.exchange not in _ON_MESHES and on_mesh:
        return "it needs one group of all ranks, and there is a mesh of two axes"
    heads = -(-setting.sizes.heads // setting.mesh[-1])
    if candidate.exchange in _SPREADING and candidate.stages > heads and not stages_given:
        return f"{candidate.stages} stages are too many where a rank computes {heads} heads"
    return None


def predict(candidate: Candidate, setting: Setting, model: CostModel) -> Prediction:
    """Returns what a candidate that applies would take."""
    exchange, phases = _phases(candidate, setting)
    tables = [_timetable(candidate, setting, exchange, phase) for phase in phases]
    seconds = [
        simulate(table, model, backward=phase.is_backward).total for table, phase in zip(tables, phases, strict=True)
    ]
    flops = tables[0].flops
    return Prediction(
        seconds[0],
        sum(seconds[1:]),
        int(np.sum([table.bytes_sent for table in tables], axis=0).max()),
        int(np.sum([table.messages_sent for table in tables], axis=0).max()),
        float(flops.max() / flops.mean() - 1.0) if flops.any() else 0.0,
        max(int(table.buffer_bytes.max()) for table in tables),
    )


def _phases(candidate: Candidate, setting: Setting) -> tuple[Exchange, tuple[Phase, ...]]:
    """The exchange that runs, between groups if heads are spread, and its directions."""
    layout, kv_layout, exchange = setting.layout, setting.kv_layout, _exchange(candidate, setting)
    if not any(setting.wanted):
        return exchange, (Phase.FORWARD,)
    if candidate.exchange in _SPREADING:
        groups = setting.layout.world_size // setting.mesh[-1]
        layout, kv_layout = united(layout, groups)[0], united(kv_layout, groups)[0]
    backward = cheaper_backward(exchange, setting.masks, layout, kv_layout, setting.sizes, setting.wanted)
    return exchange, (Phase.FORWARD, backward)


def _exchange(candidate: Candidate, setting: Setting) -> Exchange:
    if candidate.exchange == "gather":
        return Gather(candidate.stages)
    return Ring(setting.mesh[0] if candidate.exchange == "double ring" else 1)


def _timetable(candidate: Candidate, setting: Setting, exchange: Exchange, phase: Phase) -> Timetable:
    scene = Scene(setting.masks, setting.layout, setting.kv_layout, setting.sizes, phase, setting.wanted)
    if candidate.exchange not in _SPREADING:
        return timetable_for(exchange, scene)
    return spread_timetable_for(exchange, scene, setting.layout.world_size // setting.mesh[-1], candidate.stages)
