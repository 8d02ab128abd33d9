"""RingParallelism: a ParallelismConfig of accelerate with a context-parallel axis that ringattn uses."""

from __future__ import annotations

import dataclasses
from typing import Any

from accelerate import Accelerator, ParallelismConfig

from ringattn.errors import ArgumentError


class RingParallelism(ParallelismConfig):  # type: ignore[misc]
    """A ParallelismConfig whose mesh has the axis "cp", while accelerate's own context parallelism stays off.

    accelerate gives the same batches to the ranks along "cp" and averages gradients over all ranks, but does not change
    attention or batches: it drops no mask, refuses no sliding window, and needs neither FSDP2 nor a GPU. Use
    `Accelerator(parallelism_config=RingParallelism(cp_size=2))` with
    `patch(model, accelerator.torch_device_mesh["cp"])`. Nothing in accelerate is patched.

    `dp_shard_size` is the number of ranks with different batches, with or without FSDP. Without FSDP, parameters are
    not sharded.

    The arguments are the same as for ParallelismConfig.
    """

    @classmethod
    def of(cls, config: ParallelismConfig) -> RingParallelism:
        """Returns a RingParallelism with the sizes of another config."""
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.init})

    @property
    def cp_enabled(self) -> bool:
        """False: accelerate's own context parallelism stays off."""
        return False

    @property
    def non_dp_dim_names(self) -> list[str]:
        """The axes along which ranks get the same batches."""
        return [*super().non_dp_dim_names, *self._cp_axes]

    @property
    def dp_shard_cp_dim_names(self) -> list[str]:
        """The axes over which FSDP shards parameters."""
        return [*super().dp_shard_cp_dim_names, *self._cp_axes]

    @property
    def dp_cp_dim_names(self) -> list[str]:
        """The axes over which gradients are averaged."""
        return [*super().dp_cp_dim_names, *self._cp_axes]

    @property
    def _cp_axes(self) -> list[str]:
        return ["cp"] if self.cp_size > 1 else []

    def _validate_accelerator(self, accelerator: Accelerator) -> None:
        """Overrides a check of accelerate that requires FSDP2 for the "cp" axis and refuses DDP on CPUs."""
        if self.total_size != accelerator.num_processes:
            sizes = {name: size for name, size in self._sizes.items() if size > 1}
            raise ArgumentError(
                f"parallelism_config={sizes}: the product of its sizes is {self.total_size}, but there are "
                f"{accelerator.num_processes} processes; they must be equal"
            )
        plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
        if plugin is not None and not accelerator.is_fsdp2:
            raise ArgumentError("fsdp_version=1: must be 2 with cp_size > 1; set fsdp_version=2, or use no FSDP")
