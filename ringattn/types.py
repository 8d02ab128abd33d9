"""Type aliases that several rooms share. Torch is imported by type checkers only, so that geometry stays without it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from ringattn.geometry.masks import Mask

Ints: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]
Bools: TypeAlias = npt.NDArray[np.bool_]

# Sets of local rows: ascending ranges of step 1 that do not touch.
Rows: TypeAlias = tuple[range, ...]
# The ranks of a call: a group, a mesh of one or two dims, or the default group.
Group: TypeAlias = "ProcessGroup | DeviceMesh | None"
# Which query may attend to which key: one mask, one for each batch row, or None for full attention.
Masks: TypeAlias = "Mask | Sequence[Mask] | None"
