"""FlashAttention 2, 3 and 4 behind the contract: tiles become few varlen and window calls, on views.

varlen.py packs tiles into calls, flash_ops.py calls the installed generation, merge.py merges the results. This module
adapts the tensors:

- Rows: a call takes views. Only batch rows that are packed together but not contiguous are copied.
- Head dims: padded with zeros where a generation has no kernel for them, which changes nothing.
- delta: generation 4 takes dlse, a gradient of lse, and subtracts it from the rowsum(dout * out) that it computes. With
  an out of zeros and dlse = -delta it uses delta. The others get an out made from delta; see out_from_delta.py.
- Gradients: returned in the dtype of the inputs, accumulated in fp32. Buffers start as zeros if a call omits rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ringattn.geometry.tiles import Tiles
from ringattn.kernels.contract import (
    BackwardQueries,
    Gradients,
    Keys,
    ProblemSpec,
    Queries,
    State,
    unsupported_terms,
)
from ringattn.kernels.flash_import import interface_mismatch, is_installed
from ringattn.kernels.flash_ops import FlashOp, FlashOperands, FlashResults, VarlenArgs
from ringattn.kernels.merge import merge_part_
from ringattn.kernels.out_from_delta import out_for_delta
from ringattn.kernels.reference import ReferenceKernel
from ringattn.kernels.varlen import Launch, varlen_launches
from ringattn.score import Score

DTYPES = (torch.bfloat16, torch.float16)

# Computes gradients of lse where no column of the head dim is free.
_REFERENCE = ReferenceKernel()


@dataclass(frozen=True)
class FlashKernel:
    """A `BlockKernel` over one generation of FlashAttention."""

    name: str
    about: str
    op: FlashOp
    score_terms: frozenset[str] = frozenset({"softcap"})

    def available(self) -> list[str]:
        """Needs the package, in a version with the expected functions, and a GPU that it supports."""
        package = self.op.module.partition(".")[0]
        reasons = [] if is_installed(package) else [f"{package} is not installed"]
        if not torch.cuda.is_available():
            return [*reasons, "torch sees no CUDA device"]
        if torch.version.hip is not None:
            return [*reasons, "runs on NVIDIA GPUs, not on AMD's"]
        capability = torch.cuda.get_device_capability()
        if (required := self.op.required_device(capability)) is not None:
            reasons.append(f"is made for {required}, not {capability[0]}.{capability[1]}")
        # The import takes seconds, so it is done only where the package can be used.
        if not reasons and (why := interface_mismatch(self.op.module, self.op.functions)) is not None:
            reasons.append(why)
        return reasons

    def unsupported(self, problem: ProblemSpec) -> list[str]:
        if problem.device_type != "cuda":
            return [f"runs on cuda, not on {problem.device_type}"]
        reasons = []
        if problem.dtype not in DTYPES:
            reasons.append(f"takes {', '.join(map(str, DTYPES))}, not {problem.dtype}")
        reasons += unsupported_terms(problem, self.score_terms)
        if problem.score.factor <= 0:
            # The kernels take the maximum before they scale.
            reasons.append(f"takes a positive scale, not {problem.score.factor}")
        if self.op.padded_dims(problem.head_dim, problem.v_head_dim) is None:
            reasons.append(f"takes head dims up to 256, not {max(problem.head_dim, problem.v_head_dim)}")
        capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
        if (missing := self.op.missing_feature(problem, capability)) is not None:
            reasons.append(f"has {missing} on compute capability {capability[0]}.{capability[1]}")
        return reasons

    def forward(self, queries: Queries, keys: Keys, tiles: Tiles, score: Score, state: State) -> None:
        q, k, v, (out, lse) = queries.q, keys.k, keys.v, state
        dim, v_dim = self._padded_dims(q.shape[3], v.shape[3])
        for launch in varlen_launches(tiles, q.shape[0], q.shape[1], k.shape[1]):
            segments, rows = _on_device(launch, q.device)
            out_i, lse_i = out[launch.batch, launch.q], lse[launch.batch, :, launch.q]
            part, part_lse = self.op.forward(
                FlashOperands(
                    _pack_rows(_pad_dim(q[launch.batch, launch.q], dim), segments),
                    _pack_rows(_pad_dim(k[launch.batch, launch.k], dim), segments),
                    _pack_rows(_pad_dim(v[launch.batch, launch.k], v_dim), segments),
                    launch.window,
                    segments,
                    score,
                )
            )
            batch, length, heads, _ = out_i.shape
            part = part.reshape(batch, length, heads, v_dim)[..., : v.shape[3]]
            if segments is not None:
                part_lse = part_lse.reshape(heads, batch, length).transpose(0, 1)
            merge_part_(out_i, lse_i, part, part_lse, rows)
            # Freed before the next launch allocates its results.
            del part, part_lse

    def backward(self, queries: BackwardQueries, keys: Keys, tiles: Tiles, score: Score, gradients: Gradients) -> None:
        q, dout, lse, delta, lse_grad, _ = queries
        k, v, (dq, dk, dv) = keys.k, keys.v, gradients
        column = v.shape[3] if lse_grad and not self.op.takes_dlse else None
        v_width = v.shape[3] + (column is not None)
        if self.op.padded_dims(q.shape[3], v_width) is None:
            _REFERENCE.backward(queries, keys, tiles, score, gradients)
            return
        dim, v_dim = self._padded_dims(q.shape[3], v_width)
        for launch in varlen_launches(tiles, q.shape[0], q.shape[1], k.shape[1]):
            segments, _ = _on_device(launch, q.device)
            i, j = (launch.batch, launch.q), (launch.batch, launch.k)
            heads_first = launch.batch, slice(None), launch.q
            # With a column, dout_i is a padded copy, which out_for_delta may write to.
            dout_i, delta_i = _pad_dim(dout[i], v_dim), delta[heads_first]
            if self.op.takes_dlse:
                out_i, dlse = torch.zeros_like(dout_i), _pack_lse(-delta_i, segments)
            else:
                out_i, dlse = out_for_delta(dout_i, delta_i.transpose(1, 2), column), None
            dout_i, out_i = _pack_rows(dout_i, segments), _pack_rows(out_i, segments)
            q_i = _pack_rows(_pad_dim(q[i], dim), segments)
            k_j, v_j = _pack_rows(_pad_dim(k[j], dim), segments), _pack_rows(_pad_dim(v[j], v_dim), segments)
            parts = Gradients(*(_grad_buffer(x, segments) for x in (q_i, k_j, v_j)))
            self.op.backward(
                FlashOperands(q_i, k_j, v_j, launch.window, segments, score),
                FlashResults(dout_i, out_i, _pack_lse(lse[heads_first], segments), dlse),
                parts,
            )
            for held, part in ((dq[i], parts.dq), (dk[j], parts.dk), (dv[j], parts.dv)):
                held.add_(part.view(*held.shape[:3], -1)[..., : held.shape[3]])
            # Freed before the next launch allocates its results.
            del parts, out_i, dlse

    def _padded_dims(self, dim: int, v_dim: int) -> tuple[int, int]:
        padded = self.op.padded_dims(dim, v_dim)
        assert padded is not None, "unsupported() refuses this problem"
        return padded


# Caches small tensors: the launches of a few plans.
@lru_cache(maxsize=256)
def _on_device(launch: Launch, device: torch.device) -> tuple[VarlenArgs | None, Tensor | None]:
    """Returns the packing of a launch, and the query rows to merge, on a device."""
    packing = launch.packing
    if packing is None:
        return None, None
    q_ends, k_ends = (torch.from_numpy(ends).to(device) for ends in (packing.q_ends, packing.k_ends))
    rows = None if packing.q_rows is None else torch.from_numpy(packing.q_rows).to(device)
    return VarlenArgs(q_ends, k_ends, packing.max_q, packing.max_k), rows


def _pad_dim(x: Tensor, width: int) -> Tensor:
    """Returns rows (B, S, H, width), padded with zeros and aligned to 16 bytes; x itself if it is so already."""
    aligned = x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:3])
    if x.shape[3] == width and aligned:
        return x
    padded = x.new_zeros(*x.shape[:3], width)
    padded[..., : x.shape[3]] = x
    return padded


def _pack_rows(x: Tensor, segments: VarlenArgs | None) -> Tensor:
    """(B, S, H, D) -> (B * S, H, D) for a varlen call."""
    return x if segments is None else x.flatten(0, 1)


def _pack_lse(x: Tensor, segments: VarlenArgs | None) -> Tensor:
    """(B, H, S) -> (H, B * S) for a varlen call; contiguous, which the kernels assume without a check."""
    return x.contiguous() if segments is None else x.transpose(0, 1).flatten(1).contiguous()


def _grad_buffer(x: Tensor, segments: VarlenArgs | None) -> Tensor:
    """Returns a buffer for gradients: zeros for a varlen call, which omits the rows of no segment."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device) if segments is None else x.new_zeros(x.shape)
