"""Which exchange a call gets that leaves it open: predicted once per signature, and agreed on."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import Any

from ringattn.attention.calibration import default_model
from ringattn.attention.validate import AttentionCall, check_call, check_stages, shape_of
from ringattn.comm.agreement import agree
from ringattn.comm.topology import RankMesh
from ringattn.cost.cost_model import CostModel
from ringattn.cost.select_exchange import EXCHANGES, STAGED, Candidate, Choice, ExchangeProblem, select_exchange
from ringattn.errors import ArgumentError, ArgumentTypeError

_OPERATIONS = {name: f"{name}_attention" for name in EXCHANGES} | {"double ring": "ring_attention"}


def with_exchange(
    request: AttentionCall, team: RankMesh, ask: Callable[[RankMesh, Hashable, Any], Candidate] = agree
) -> AttentionCall:
    """Returns the request with the exchange that is chosen for it; as it is, if it names one.

    Args:
        request: the call.
        team: its ranks.
        ask: `agree`, or `recalled` where nothing may be sent.
    """
    if request.asked is None:
        return request
    chosen = ask(team, request.signature(), lambda: _select(request, team))
    return replace(request, operation=_OPERATIONS[chosen.exchange], stages=chosen.stages, asked=None)


def _select(request: AttentionCall, team: RankMesh) -> tuple[Mapping[str, str], Candidate]:
    """Returns what the ranks must agree on, and the exchange."""
    found, asked = check_call(request, team), request.asked
    assert asked is not None
    sizes = shape_of(request.q, request.k, request.v)
    setting = ExchangeProblem(sizes, found.masks, found.layout, found.kv_layout, team.shape, found.wanted)
    choice = choose_exchange(setting, request.q.device.type, asked.exchange, request.stages, asked.model)
    assert choice.chosen is not None
    told = {"exchange": repr(asked.exchange), "model": repr(choice.model), "the chosen exchange": str(choice.chosen)}
    return {**found.told, **told}, choice.chosen


def choose_exchange(
    setting: ExchangeProblem, device_type: str, exchange: object, stages: int | None, model: CostModel | None
) -> Choice:
    """Returns what is chosen, and from what.

    Raises:
        ArgumentError: when an argument is none that there may be, or no exchange can do it.
    """
    if not isinstance(exchange, str) or exchange not in ("auto", *EXCHANGES):
        raise ArgumentError(f"exchange={exchange!r:.100}: must be 'auto' or one of {', '.join(map(repr, EXCHANGES))}")
    if stages is not None:
        check_stages(stages)
        if stages > 1 and exchange not in ("auto", *STAGED):
            raise ArgumentError(f"stages={stages}: exchange={exchange!r} has no stages; pass None or 1")
    if model is not None and not isinstance(model, CostModel):
        raise ArgumentTypeError(f"model={model!r:.100}: must be a CostModel or None, not {type(model).__name__}")
    choice = select_exchange(setting, default_model(device_type) if model is None else model, exchange, stages)
    if choice.chosen is None:
        told = "; ".join(dict.fromkeys(f"{c.exchange}: {c.refusal}" for c in choice.candidates))
        raise ArgumentError(f"exchange={exchange!r}, stages={stages}: no exchange can do it ({told})")
    return choice
