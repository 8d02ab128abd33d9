"""Training checkpoints that can be saved on one mesh and loaded on any other.

A checkpoint does not depend on ranks. Weights and optimizer state are stored under the parameters' names in the whole
model, whichever pipeline stage they are in. Tensors that are sharded, over any axis, are DTensors, which
torch.distributed.checkpoint saves as shards of one tensor and reads back with another sharding.

    folder/step-00000040          a complete checkpoint
    folder/step-00000060.partial  left by a run that was killed while saving: never loaded, removed by the next save

A checkpoint is renamed to its final name when all of it is on disk. So whenever a run is killed, the last complete
checkpoint is intact.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from ringattn.comm.agreement import agree
from ringattn.comm.topology import RankMesh, check_initialized, rank_mesh
from ringattn.errors import ArgumentError, CheckpointError

_COMPLETE = re.compile(r"step-(\d+)")
_PARTIAL = ".partial"


@dataclass(frozen=True)
class TrainingProgress:
    """How far a training run is; the same on all ranks.

    Args:
        step: number of optimizer steps done.
        samples: number of data samples used, by all ranks together: where the data loader resumes.
    """

    step: int
    samples: int


def save_checkpoint(
    folder: str | os.PathLike[str],
    model_parts: Sequence[nn.Module],
    optimizer: Optimizer,
    progress: TrainingProgress,
    *,
    keep: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Saves model, optimizer, progress and each rank's random number states, and returns the path of the checkpoint.

    Collective over the group, between two steps.

    Args:
        folder: on a file system shared by all ranks; created if it does not exist.
        model_parts: this rank's part of the model: one module, or several pipeline stages.
        optimizer: of all their parameters.
        progress: how far the training is.
        keep: number of checkpoints to keep, including this one; older ones are removed. None keeps all.
        group: the ranks that train together; None for all.
    Raises:
        ArgumentError: when keep is less than 1, or the optimizer has parameters that are in none of the model parts.
        DisagreementError: when progress differs between ranks.
        CheckpointError: when this step is already saved. Errors of the file system are raised on all ranks.
    Communication: metadata of torch.distributed.checkpoint; tensors go to files only.
    """
    check_initialized("save_checkpoint")
    ranks, target = rank_mesh(group), Path(folder) / f"step-{progress.step:08d}"
    partial = target.with_name(target.name + _PARTIAL)
    state = agree(ranks, None, lambda: _state_to_save(model_parts, optimizer, progress, keep))
    _on_rank_0(ranks, lambda: _prepare_folder(target))
    state["progress"] = torch.tensor([progress.step, progress.samples, ranks.size])
    state |= {f"random.{ranks.rank}.{device}": rng_state for device, rng_state in _rng_states().items()}
    save(state, storage_writer=FileSystemWriter(partial), process_group=group)
    _on_rank_0(ranks, lambda: _commit(partial, target, keep))
    return target


def load_checkpoint(
    folder: str | os.PathLike[str],
    model_parts: Sequence[nn.Module],
    optimizer: Optimizer,
    *,
    group: dist.ProcessGroup | None = None,
) -> TrainingProgress | None:
    """Loads the latest complete checkpoint into model and optimizer, in place, and returns its progress.

    Collective over the group, after the model was parallelized and the optimizer created. The mesh may differ from the
    one at saving. Random number states are restored if the number of ranks is the same, and left alone otherwise.

    Args:
        folder: as for `save_checkpoint`.
        model_parts: this rank's part of the model.
        optimizer: of all their parameters; its state is replaced.
        group: as for `save_checkpoint`.
    Returns:
        The progress, or None, with nothing changed, when there is no checkpoint.
    Raises:
        CheckpointError: when the checkpoint is of another model or optimizer; on all ranks, before anything is changed.
    Communication: metadata of torch.distributed.checkpoint; each rank reads its own shards from files.
    """
    check_initialized("load_checkpoint")
    ranks = rank_mesh(group)
    source = agree(ranks, None, lambda: _latest_to_agree(folder))
    if source is None:
        return None
    reader = FileSystemReader(source)
    state, optimizer_state, metadata = agree(ranks, None, lambda: ({}, _state_to_load(reader, model_parts, optimizer)))
    _check_all_weights_loaded(state, metadata, source, group)
    progress = torch.zeros(3, dtype=torch.int64)
    rng_states = {
        key: torch.zeros(saved.size, dtype=torch.uint8)
        for key, saved in metadata.state_dict_metadata.items()
        if key.startswith(f"random.{ranks.rank}.") and isinstance(saved, TensorStorageMetadata)
    }
    state = {**state, "progress": progress, **rng_states}
    load(state, storage_reader=reader, process_group=group)
    for name, parameter, options in _named_parameters(model_parts, optimizer):
        optimizer.state[parameter] = optimizer_state[name]
        options.update(state[f"options.{name}"])
    step, samples, num_ranks = progress.tolist()
    if num_ranks == ranks.size:
        _set_rng_states({key.rpartition(".")[2]: rng_state for key, rng_state in rng_states.items()})
    return TrainingProgress(step, samples)


def latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """Returns the path of the complete checkpoint with the most steps; None if there is none.

    Args:
        folder: as for `save_checkpoint`.
    """
    return max(_complete_checkpoints(folder), key=_step_of, default=None)


def _latest_to_agree(folder: str | os.PathLike[str]) -> tuple[Mapping[str, str], Path | None]:
    path = latest_checkpoint(folder)
    return {"the last checkpoint": str(path)}, path


def _complete_checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    return [path for path in Path(folder).glob("step-*") if _COMPLETE.fullmatch(path.name)]


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


# ---- files: rank 0 handles them, and its errors are raised on all ranks


def _on_rank_0(ranks: RankMesh, act: Callable[[], object]) -> None:
    """Runs a function on rank 0, while the other ranks wait; all ranks raise its error."""

    def prepare() -> tuple[Mapping[str, str], None]:
        if ranks.rank == 0:
            act()
        return {}, None

    agree(ranks, None, prepare)


def _prepare_folder(target: Path) -> None:
    if target.exists():
        raise CheckpointError(f"{target} already exists: load it, or save to another folder")
    for partial in target.parent.glob(f"step-*{_PARTIAL}"):
        shutil.rmtree(partial)


def _commit(partial: Path, target: Path, keep: int | None) -> None:
    """Renames a complete checkpoint to its final name, and removes old ones."""
    partial.rename(target)
    parent = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(parent)  # the files are on disk already; this writes the new name
    finally:
        os.close(parent)
    if keep is not None:
        for old in sorted(_complete_checkpoints(target.parent), key=_step_of)[:-keep]:
            # Rename first: a folder that is half removed must not look complete.
            shutil.rmtree(old.rename(old.with_name(old.name + _PARTIAL)))


# ---- the state, by name


def _named_state(model_parts: Sequence[nn.Module], optimizer: Optimizer) -> dict[str, Any]:
    """Returns the tensors of model and optimizer, and the optimizer's options for each parameter, by name."""
    state: dict[str, Any] = {}
    for part in model_parts:
        state |= {f"model.{name}": tensor for name, tensor in part.state_dict().items()}
    for name, parameter, options in _named_parameters(model_parts, optimizer):
        state |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state.get(parameter, {}).items()}
        state[f"options.{name}"] = _without_parameters(options)
    return state


def _state_to_save(
    model_parts: Sequence[nn.Module], optimizer: Optimizer, progress: TrainingProgress, keep: int | None
) -> tuple[Mapping[str, str], dict[str, Any]]:
    """Checks the arguments; returns the values that must agree between ranks, and this rank's state."""
    if keep is not None and keep < 1:
        raise ArgumentError(f"keep={keep}: must be at least 1, or None to keep all")
    return {"progress": str(progress)}, _named_state(model_parts, optimizer)


def _without_parameters(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != "params"}


def _named_parameters(
    model_parts: Sequence[nn.Module], optimizer: Optimizer
) -> Iterator[tuple[str, nn.Parameter, dict[str, Any]]]:
    """Yields each parameter of the optimizer with its name in the whole model and its parameter group."""
    names = {parameter: name for part in model_parts for name, parameter in part.named_parameters()}
    for options in optimizer.param_groups:
        for parameter in options["params"]:
            if parameter not in names:
                raise ArgumentError(
                    f"optimizer: has a parameter of shape {tuple(parameter.shape)} that is in none of the model parts; "
                    "create it after the model was parallelized"
                )
            yield names[parameter], parameter, options


def _state_to_load(
    reader: FileSystemReader, model_parts: Sequence[nn.Module], optimizer: Optimizer
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]], Metadata]:
    """Returns the state to load into, by name; each parameter's optimizer state in it; and the saved metadata."""
    metadata = reader.read_metadata()
    saved = metadata.state_dict_metadata
    state = {key: value for key, value in _named_state(model_parts, optimizer).items() if key.startswith("model.")}
    for key, value in state.items():
        entry = saved.get(key)
        size = entry.size if isinstance(entry, TensorStorageMetadata) else None
        if size != value.shape:
            found = "does not have it" if size is None else f"has {tuple(size)}"
            raise CheckpointError(f"{key.removeprefix('model.')} is {tuple(value.shape)}, but the checkpoint {found}")
    keys_by_prefix: dict[str, list[str]] = {}
    for key in saved:
        keys_by_prefix.setdefault(key.rpartition(".")[0], []).append(key)
    optimizer_state: dict[str, dict[str, Tensor]] = {}
    for name, parameter, group_options in _named_parameters(model_parts, optimizer):
        options = _without_parameters(group_options)
        saved_options = {key.rpartition(".")[2] for key in keys_by_prefix.get(f"options.{name}", [])}
        if differing := ", ".join(sorted(saved_options ^ options.keys())):
            other = f"another optimizer than {type(optimizer).__name__}; only one has {differing}"
            other = other if saved_options else "none"
            raise CheckpointError(f"when the checkpoint was saved, {name} was trained by {other}")
        optimizer_state[name] = {}
        for key in keys_by_prefix.get(f"optimizer.{name}", []):
            tensor = _empty_optimizer_tensor(parameter, saved[key], group_options)
            optimizer_state[name][key.rpartition(".")[2]] = state[key] = tensor
        state[f"options.{name}"] = options
    return state, optimizer_state, metadata


def _empty_optimizer_tensor(parameter: nn.Parameter, saved: object, options: Mapping[str, Any]) -> Tensor:
    """Returns a tensor to load optimizer state into: sharded like the parameter if it has its shape, else whole."""
    if not isinstance(saved, TensorStorageMetadata):
        raise CheckpointError(f"the checkpoint has an optimizer state that is not a tensor: {saved!r:.100}")
    dtype = saved.properties.dtype
    if saved.size == parameter.shape:
        return torch.zeros_like(parameter.detach(), dtype=dtype)
    step_on_device = options.get("fused") or options.get("capturable")
    return torch.zeros(saved.size, dtype=dtype, device=parameter.device if step_on_device else "cpu")


def _check_all_weights_loaded(
    state: Mapping[str, Any], metadata: Metadata, source: Path, group: dist.ProcessGroup | None
) -> None:
    """Raises when the checkpoint has weights that no rank's model has."""
    keys_of_ranks: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(keys_of_ranks, sorted(state), group=group)
    unused = {key for key in metadata.state_dict_metadata if key.startswith("model.")}
    unused -= {key for keys in keys_of_ranks for key in keys}
    if unused:
        names = ", ".join(sorted(key.removeprefix("model.") for key in unused)[:5])
        raise CheckpointError(f"{source} has {len(unused)} weights that the model does not have: {names}")


# ---- random numbers


def _rng_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _set_rng_states(states: Mapping[str, Tensor]) -> None:
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
