"""The exchange of a call: the one that it names, or the one with the least predicted time."""

from __future__ import annotations

from collections.abc import Mapping

from ringattn.attention.calibration import default_model
from ringattn.attention.execution_plan import ExecutionPlan
from ringattn.attention.validate import AUTO, AttentionCall, ValidatedCall, check_call, make_exchange, plan_call
from ringattn.comm.topology import RankMesh
from ringattn.cost.cost_model import CostModel
from ringattn.errors import ArgumentError, ArgumentTypeError, check_integer
from ringattn.plan.exchanges import EXCHANGES, Exchange
from ringattn.plan.select_exchange import Choice, ExchangeProblem, select_exchange


def prepare(call: AttentionCall, mesh: RankMesh) -> tuple[Mapping[str, str], ExecutionPlan]:
    """Checks a call, and returns what the ranks must have in common and how this rank runs it."""
    checked = check_call(call, mesh)
    if call.operation != AUTO or isinstance(call.exchange, Exchange):
        return checked.fingerprint, plan_call(call, mesh, checked, make_exchange(call))
    choice = _choose(call, mesh, checked)
    assert choice.chosen is not None
    chosen = {"model": repr(choice.model), "the chosen exchange": str(choice.chosen)}
    return {**checked.fingerprint, **chosen}, plan_call(call, mesh, checked, choice.chosen.value)


def _choose(call: AttentionCall, mesh: RankMesh, checked: ValidatedCall) -> Choice:
    problem = ExchangeProblem(
        checked.tensors.shape, checked.masks, checked.layout, checked.kv_layout, mesh.shape, checked.wanted
    )
    return choose_exchange(problem, call.q.device.type, call.exchange, call.stages, call.model)


def choose_exchange(
    problem: ExchangeProblem, device_type: str, exchange: object, stages: int | None, model: CostModel | None
) -> Choice:
    """Returns the choice for a problem.

    Args:
        problem: the call.
        device_type: of its tensors, for the constants that model=None means.
        exchange: a name, or "auto".
        stages: how many, or None for any of those that are tried.
        model: links and compute; None is constants.
    Raises:
        ArgumentError: when an argument is not allowed, or no exchange can run the call.
    """
    if not isinstance(exchange, str) or exchange not in ("auto", *EXCHANGES):
        allowed = ", ".join(map(repr, EXCHANGES))
        raise ArgumentError(f"exchange={exchange!r:.100}: must be 'auto', one of {allowed}, or a value such as Ring()")
    if stages is not None:
        check_integer("stages", stages, 1)
        if stages > 1 and exchange != "auto" and not EXCHANGES[exchange].stages:
            raise ArgumentError(f"stages={stages}: exchange={exchange!r} has no stages; pass None or 1")
    if model is not None and not isinstance(model, CostModel):
        raise ArgumentTypeError(f"model={model!r:.100}: must be a CostModel or None, not {type(model).__name__}")
    choice = select_exchange(problem, default_model(device_type) if model is None else model, exchange, stages)
    if choice.chosen is None:
        reasons = "; ".join(dict.fromkeys(f"{c.exchange}: {c.refusal}" for c in choice.candidates))
        raise ArgumentError(f"exchange={exchange!r}, stages={stages}: no exchange can run this call ({reasons})")
    return choice
