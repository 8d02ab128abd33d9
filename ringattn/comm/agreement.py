"""Checks that all ranks make the same call, before any of them sends a tensor.

A rank that raised alone would leave the others waiting, and ranks with different arguments would exchange garbage. So
the first call of every signature compares the ranks: each rank contributes its arguments, or the error that they
raised, and either all ranks go on or all raise the same error. Later calls of the signature cost a dictionary look-up.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch.distributed as dist

from ringattn import errors
from ringattn.comm.topology import RankMesh
from ringattn.errors import DisagreementError, RingAttnError

Result = TypeVar("Result")
Prepare = Callable[[], tuple[Mapping[str, str], Result]]

# Results by signature, for each mesh, stored under the mesh's first group. All ranks make the same calls, so all ranks
# drop the same entries.
_AGREEMENTS: WeakKeyDictionary[dist.ProcessGroup, OrderedDict[Hashable, Any]] = WeakKeyDictionary()
_MAX_AGREEMENTS = 256
_NOT_STORED = object()


class _Report(NamedTuple):
    """What one rank sends to all others: its fingerprint of the call, or (type name, message) of the error it hit."""

    fingerprint: dict[str, str]
    error: tuple[str, str] | None


def agree(mesh: RankMesh, signature: Hashable, prepare: Prepare[Result]) -> Result:
    """Returns the result of `prepare`, after checking that it succeeded with the same fingerprint on every rank.

    Args:
        mesh: the ranks that make the call; all of them call this together if the signature is new.
        signature: identifies the call on this rank; None compares the ranks every time and stores nothing.
        prepare: checks the arguments and returns (fingerprint, result). The fingerprint maps names to texts, and must
            be the same on all ranks; the result may differ from rank to rank.
    Raises:
        RingAttnError: on every rank, if `prepare` raised on any; the error of the first such rank.
        DisagreementError: on every rank, if the fingerprints differ.
    Communication: one all-gather of a few hundred bytes along each axis on the first call of a signature; none
        afterwards, and none in a mesh of one rank.
    """
    results, signature = _stored_results(mesh, signature)
    if signature is not None:
        stored = results.get(signature, _NOT_STORED)
        if stored is not _NOT_STORED:
            results.move_to_end(signature)
            return stored  # type: ignore[no-any-return]
    result = prepare()[1] if mesh.size == 1 else _compare(mesh, prepare)
    if signature is not None:
        results[signature] = result
        if len(results) > _MAX_AGREEMENTS:
            results.popitem(last=False)
    return result


def recall(mesh: RankMesh, signature: Hashable, prepare: Prepare[Result]) -> Result:
    """Returns the result that `agree` stored, or computes it again on this rank alone.

    It stores nothing and compares nothing, so ranks may call it a different number of times.

    Communication: none.
    """
    results, signature = _stored_results(mesh, signature)
    if signature is not None and signature in results:
        stored: Result = results[signature]
        return stored
    return prepare()[1]


def _stored_results(mesh: RankMesh, signature: Hashable) -> tuple[OrderedDict[Hashable, Any], Hashable]:
    """Returns the stored results under the mesh's first group, and the key of a signature among them."""
    first, *others = (axis.group for axis in mesh.axes)
    results = _AGREEMENTS.get(first)
    if results is None:
        results = _AGREEMENTS[first] = OrderedDict()
    return results, None if signature is None else (*others, signature)


def _compare(mesh: RankMesh, prepare: Prepare[Result]) -> Result:
    """Runs `prepare` and compares its fingerprint, or its error, with all ranks of the mesh."""
    fingerprint: Mapping[str, str] = {}
    error: Exception | None = None
    try:
        fingerprint, result = prepare()
    except Exception as caught:  # any error must reach the other ranks, or they would wait for this one
        error = caught
    reports = _all_gather(mesh, _Report(dict(fingerprint), None if error is None else _describe(error)))
    failures = [(rank, *report.error) for rank, report in enumerate(reports) if report.error is not None]
    if failures:
        rank, type_name, message = failures[0]
        on_all = len(failures) == len(reports) and len({failure[1:] for failure in failures}) == 1
        where = "" if on_all else f"on rank {rank} of {len(reports)}: "
        raise _error_class(type_name)(where + message) from error
    for name in dict.fromkeys(name for report in reports for name in report.fingerprint):
        values = [report.fingerprint.get(name) for report in reports]
        if len(set(values)) > 1:
            by_rank = "; ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
            raise DisagreementError(f"the ranks of the group disagree on {name} ({by_rank})")
    return result


def _all_gather(mesh: RankMesh, report: _Report) -> list[_Report]:
    """Returns the reports of all ranks of a mesh, in order of rank."""
    numbered = [(mesh.rank, report)]
    for axis in reversed(mesh.axes):
        gathered: list[Any] = [None] * len(axis.ranks)
        dist.all_gather_object(gathered, numbered, group=axis.group)
        numbered = [entry for entries in gathered for entry in entries]
    return [each for _, each in sorted(numbered, key=lambda entry: entry[0])]


def _describe(error: Exception) -> tuple[str, str]:
    """Returns (type name, message), from which every rank can raise the error.

    An error of another library becomes a RingAttnError whose message begins with its type.
    """
    type_name = type(error).__name__
    if isinstance(error, RingAttnError):
        return type_name, str(error)
    return RingAttnError.__name__, f"{type_name}: {error}"


def _error_class(name: str) -> type[RingAttnError]:
    found = getattr(errors, name, None)
    return found if isinstance(found, type) and issubclass(found, RingAttnError) else RingAttnError
