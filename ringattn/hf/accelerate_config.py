"""accelerate's parallelism with an axis for the context, whose attention is not accelerate's."""

from __future__ import annotations

import dataclasses
from typing import Any

from accelerate import Accelerator, ParallelismConfig

from ringattn.errors import ArgumentError


class RingParallelism(ParallelismConfig):  # type: ignore[misc]
    """A ParallelismConfig whose mesh has the axis "cp", while accelerate's own context parallelism stays off.

    accelerate then gives the ranks along that axis the same batches, and averages gradients over all ranks, but leaves
    attention and batches alone: no mask is dropped, no window refused, and neither FSDP2 nor a GPU is asked for.
    `Accelerator(parallelism_config=RingParallelism(cp_size=2))` and `patch(model, accelerator.torch_device_mesh["cp"])`
    go together. Nothing of accelerate is changed.

    Without FSDP parameters are not sharded, whatever `dp_shard_size` says: it then counts the ranks that get batches of
    their own.

    Args are those of ParallelismConfig.
    """

    @classmethod
    def of(cls, config: ParallelismConfig) -> RingParallelism:
        """Returns the same sizes with the context parallelism of this package."""
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.init})

    @property
    def cp_enabled(self) -> bool:
        """False: whether accelerate should see to the context."""
        return False

    @property
    def non_dp_dim_names(self) -> list[str]:
        """The axes along which batches are the same."""
        return [*super().non_dp_dim_names, *self._context]

    @property
    def dp_shard_cp_dim_names(self) -> list[str]:
        """The axes over which FSDP shards."""
        return [*super().dp_shard_cp_dim_names, *self._context]

    @property
    def dp_cp_dim_names(self) -> list[str]:
        """The axes over which gradients are averaged."""
        return [*super().dp_cp_dim_names, *self._context]

    @property
    def _context(self) -> list[str]:
        return ["cp"] if self.cp_size > 1 else []

    def _validate_accelerator(self, accelerator: Accelerator) -> None:
        """In accelerate's place, which wants FSDP2 for this axis and has no DDP on CPUs."""
        if self.total_size != accelerator.num_processes:
            sizes = {name: size for name, size in self._sizes.items() if size > 1}
            raise ArgumentError(
                f"parallelism_config={sizes}: its sizes make {self.total_size} processes, and there are "
                f"{accelerator.num_processes}"
            )
        plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
        if plugin is not None and not accelerator.is_fsdp2:
            raise ArgumentError("fsdp_version=1: must be 2, or no FSDP at all, for ranks that share a sequence")
