"""Checkpoints: saved under one mix of axes, resumed under any other.

What is saved knows nothing of ranks. Weights and optimizer state go by the names that parameters have in the whole
model, whichever stage they are in; what lies in parts on several ranks, over any axis, is a DTensor, which
torch.distributed.checkpoint saves as parts of one tensor and reads in other parts.

    folder/step-00000040          a checkpoint, whole
    folder/step-00000060.partial  what a run had written when it was killed: not looked at, and removed by the next save

A checkpoint gets its name when all of it is on disk. So whenever a run is killed, the last whole one is there to go on
from.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from ringattn.comm.agreement import agree
from ringattn.comm.topology import RankMesh, rank_mesh
from ringattn.errors import ArgumentError, CheckpointError

Found = TypeVar("Found")

_NAME = re.compile(r"step-(\d+)")
_PARTIAL = ".partial"


@dataclass(frozen=True)
class Progress:
    """How far a training has come: the same on all ranks.

    Args:
        step: how many steps the optimizer has made.
        samples: how many samples of the data have been used, by all ranks together: where to go on reading.
    """

    step: int
    samples: int


def save_checkpoint(
    folder: str | os.PathLike[str],
    stages: Sequence[nn.Module],
    optimizer: Optimizer,
    progress: Progress,
    *,
    keep: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Saves a checkpoint, and returns where it is once it is whole.

    All ranks call it together, between two steps. Each also saves the state of its random numbers.

    Args:
        folder: that all ranks see; made if it is not there.
        stages: this rank's part of the model: one module, or several stages of a pipeline.
        optimizer: of all their parameters.
        progress: how far the training has come.
        keep: how many checkpoints stay, this one among them; older ones are removed once it is whole. None keeps all.
        group: the ranks that train together; None is all.
    Raises:
        ArgumentError: when keep is less than 1, or the optimizer has parameters that no stage has.
        DisagreementError: when ranks have come differently far.
        CheckpointError: when this step has been saved already. What the file system raises, on all ranks alike.
    Communication: what torch.distributed.checkpoint needs to share out the work; tensors go to files only.
    """
    team, target = rank_mesh(group), Path(folder) / f"step-{progress.step:08d}"
    partial = target.with_name(target.name + _PARTIAL)
    state = agree(team, None, lambda: _to_save(stages, optimizer, progress, keep))
    _on_first(team, lambda: _make_room(target))
    state["progress"] = torch.tensor([progress.step, progress.samples, team.size])
    state |= {f"random.{team.rank}.{device}": numbers for device, numbers in _random_states().items()}
    save(state, storage_writer=FileSystemWriter(partial), process_group=group)
    _on_first(team, lambda: _publish(partial, target, keep))
    return target


def load_checkpoint(
    folder: str | os.PathLike[str],
    stages: Sequence[nn.Module],
    optimizer: Optimizer,
    *,
    group: dist.ProcessGroup | None = None,
) -> Progress | None:
    """Fills model and optimizer from the last whole checkpoint, in place, and returns how far it had come.

    All ranks call it together, after the model was made parallel and the optimizer made of it. The mix of axes may be
    another than when it was saved. Random numbers go on as they were if there are as many ranks; otherwise they are
    left alone.

    Args:
        folder: as for `save_checkpoint`.
        stages: this rank's part of the model.
        optimizer: of all their parameters; what state it has is replaced.
        group: as for `save_checkpoint`.
    Returns:
        None, with nothing changed, when there is no checkpoint.
    Raises:
        CheckpointError: when it is one of another model or optimizer, before anything is changed, on all ranks alike.
    Communication: each rank reads from files what it keeps.
    """
    team = rank_mesh(group)
    source = agree(team, None, lambda: _same("the last checkpoint", latest(folder)))
    if source is None:
        return None
    reader = FileSystemReader(source)
    state, slots, metadata = agree(team, None, lambda: ({}, _to_fill(reader, stages, optimizer)))
    _check_all_asked_for(state, metadata, source, group)
    progress = torch.zeros(3, dtype=torch.int64)
    random = {
        key: torch.zeros(kept.size, dtype=torch.uint8)
        for key, kept in metadata.state_dict_metadata.items()
        if key.startswith(f"random.{team.rank}.") and isinstance(kept, TensorStorageMetadata)
    }
    everything = {**state, "progress": progress, **random}
    load(everything, storage_reader=reader, process_group=group)
    for name, parameter, here in _named_groups(stages, optimizer):
        optimizer.state[parameter] = slots[name]
        here.update(everything[f"options.{name}"])
    step, samples, num_ranks = progress.tolist()
    if num_ranks == team.size:
        _set_random_states({key.rpartition(".")[2]: numbers for key, numbers in random.items()})
    return Progress(step, samples)


def latest(folder: str | os.PathLike[str]) -> Path | None:
    """Returns the whole checkpoint of the most steps; None where there is none."""
    return max(_whole(folder), key=_step_of, default=None)


def _whole(folder: str | os.PathLike[str]) -> list[Path]:
    return [path for path in Path(folder).glob("step-*") if _NAME.fullmatch(path.name)]


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


# ---- files; the first rank handles them, and all of them hear what it meets


def _on_first(team: RankMesh, act: Callable[[], object]) -> None:
    """Has the first rank do something, and the others wait for it; what it raises, all raise."""

    def prepare() -> tuple[Mapping[str, str], None]:
        if team.rank == 0:
            act()
        return {}, None

    agree(team, None, prepare)


def _make_room(target: Path) -> None:
    if target.exists():
        raise CheckpointError(f"{target} is there already: load it, or save to another folder")
    for left in target.parent.glob(f"step-*{_PARTIAL}"):
        shutil.rmtree(left)


def _publish(partial: Path, target: Path, keep: int | None) -> None:
    partial.rename(target)
    parent = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(parent)  # the files are on disk already; now their folder's name is
    finally:
        os.close(parent)
    if keep is not None:
        for old in sorted(_whole(target.parent), key=_step_of)[:-keep]:
            # Renamed first: a folder half removed must not look whole.
            shutil.rmtree(old.rename(old.with_name(old.name + _PARTIAL)))


def _same(name: str, value: Found) -> tuple[Mapping[str, str], Found]:
    return {name: str(value)}, value


# ---- what is saved, by name


def _state_of(stages: Sequence[nn.Module], optimizer: Optimizer) -> dict[str, Any]:
    """Returns the tensors of model and optimizer, and the optimizer's options for each parameter."""
    state: dict[str, Any] = {}
    for stage in stages:
        state |= {f"model.{name}": tensor for name, tensor in stage.state_dict().items()}
    for name, parameter, options in _named_groups(stages, optimizer):
        state |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state.get(parameter, {}).items()}
        state[f"options.{name}"] = _without_parameters(options)
    return state


def _to_save(
    stages: Sequence[nn.Module], optimizer: Optimizer, progress: Progress, keep: int | None
) -> tuple[Mapping[str, str], dict[str, Any]]:
    """Checks what is asked for; returns what all ranks must have in common, and this rank's part of the state."""
    if keep is not None and keep < 1:
        raise ArgumentError(f"keep={keep}: must be at least 1, or None, which keeps all")
    return {"progress": str(progress)}, _state_of(stages, optimizer)


def _without_parameters(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != "params"}


def _named_groups(
    stages: Sequence[nn.Module], optimizer: Optimizer
) -> Iterator[tuple[str, nn.Parameter, dict[str, Any]]]:
    names = {parameter: name for stage in stages for name, parameter in stage.named_parameters()}
    for options in optimizer.param_groups:
        for parameter in options["params"]:
            if parameter not in names:
                raise ArgumentError(
                    f"optimizer: has a parameter of shape {tuple(parameter.shape)} that is in none of the stages; make "
                    "it after the model was made parallel"
                )
            yield names[parameter], parameter, options


def _to_fill(
    reader: FileSystemReader, stages: Sequence[nn.Module], optimizer: Optimizer
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]], Metadata]:
    """Returns what is to be filled, by name; of that, each parameter's optimizer state; and what the checkpoint has."""
    metadata = reader.read_metadata()
    kept = metadata.state_dict_metadata
    state = {key: value for key, value in _state_of(stages, optimizer).items() if key.startswith("model.")}
    for key, value in state.items():
        there = kept.get(key)
        size = there.size if isinstance(there, TensorStorageMetadata) else None
        if size != value.shape:
            told = "does not have it" if size is None else f"has {tuple(size)}"
            raise CheckpointError(f"{key.removeprefix('model.')} is {tuple(value.shape)}, but the checkpoint {told}")
    keys: dict[str, list[str]] = {}
    for key in kept:
        keys.setdefault(key.rpartition(".")[0], []).append(key)
    slots: dict[str, dict[str, Tensor]] = {}
    for name, parameter, options in _named_groups(stages, optimizer):
        asked = _without_parameters(options)
        saved = {key.rpartition(".")[2] for key in keys.get(f"options.{name}", [])}
        if differing := ", ".join(sorted(saved ^ asked.keys())):
            other = f"another optimizer than {type(optimizer).__name__}; only one has {differing}"
            raise CheckpointError(f"when the checkpoint was saved, {name} was trained by {other if saved else 'none'}")
        fresh = slots[name] = {}
        for key in keys.get(f"optimizer.{name}", []):
            fresh[key.rpartition(".")[2]] = state[key] = _like(parameter, kept[key], options)
        state[f"options.{name}"] = asked
    return state, slots, metadata


def _like(parameter: nn.Parameter, kept: object, options: Mapping[str, Any]) -> Tensor:
    """A place for a tensor of an optimizer's: in parts as the parameter is if it is as large, else whole."""
    if not isinstance(kept, TensorStorageMetadata):
        raise CheckpointError(f"the checkpoint has an optimizer state that is no tensor: {kept!r:.100}")
    dtype = kept.properties.dtype
    if kept.size == parameter.shape:
        return torch.zeros_like(parameter.detach(), dtype=dtype)
    counts_there = options.get("fused") or options.get("capturable")
    return torch.zeros(kept.size, dtype=dtype, device=parameter.device if counts_there else "cpu")


def _check_all_asked_for(
    state: Mapping[str, Any], metadata: Metadata, source: Path, group: dist.ProcessGroup | None
) -> None:
    """Raises where the checkpoint has weights that no rank has a place for."""
    asked: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(asked, sorted(state), group=group)
    missing = {key for key in metadata.state_dict_metadata if key.startswith("model.")}
    missing -= {key for keys in asked for key in keys}
    if missing:
        names = ", ".join(sorted(key.removeprefix("model.") for key in missing)[:5])
        raise CheckpointError(f"{source} has {len(missing)} weights that the model has not: {names}")


# ---- random numbers


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _set_random_states(states: Mapping[str, Tensor]) -> None:
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
