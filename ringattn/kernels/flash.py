"""FlashAttention 2, 3 and 4 behind the contract: tiles go in as few varlen and window calls, in place.

varlen.py packs the tiles, flash_ops.py speaks to the generations, merge.py takes up what they return. What is left to
do here is to bring tensors into their form:

- rows: a call takes views of the tensors. Only batch rows that are packed together, and do not lie together, are
  copied.
- head dims are padded with zeros where a generation has no kernel for them, which changes nothing.
- delta: generation 4 takes a gradient of lse, and subtracts it from the rowsum(dout * out) that it computes: with an
  out of zeros, -delta is all that it needs. The others get an out made for delta: see delta.py.
- gradients come in the dtype of the inputs, and are added up in fp32. Buffers start as zeros where a call leaves rows
  out.
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
from ringattn.kernels.flash_import import installed, missing_parts
from ringattn.kernels.flash_ops import FlashOp, FlashOperands, FlashResults, VarlenArgs
from ringattn.kernels.merge import merge_part_
from ringattn.kernels.out_from_delta import out_for_delta
from ringattn.kernels.reference import ReferenceKernel
from ringattn.kernels.varlen import Launch, launches_of
from ringattn.score import Score

DTYPES = (torch.bfloat16, torch.float16)

# Computes gradients of lse where there is no head dim left to carry them.
_WIDE = ReferenceKernel()


@dataclass(frozen=True)
class FlashKernel:
    """A `BlockKernel` over one generation of FlashAttention."""

    name: str
    about: str
    op: FlashOp
    score_terms: frozenset[str] = frozenset({"softcap"})

    def available(self) -> list[str]:
        """Needs the package, in a version with the functions called here, and a GPU that it is made for."""
        package = self.op.module.partition(".")[0]
        reasons = [] if installed(package) else [f"{package} is not installed"]
        if not torch.cuda.is_available():
            return [*reasons, "torch sees no CUDA device"]
        if torch.version.hip is not None:
            return [*reasons, "runs on NVIDIA GPUs, not on AMD's"]
        capability = torch.cuda.get_device_capability()
        if (wanted := self.op.devices(capability)) is not None:
            reasons.append(f"is made for {wanted}, not {capability[0]}.{capability[1]}")
        # Importing it takes seconds, which only those pay who can use it.
        if not reasons and (why := missing_parts(self.op.module, self.op.functions)) is not None:
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
            # They find the largest score before they scale it.
            reasons.append(f"takes a positive scale, not {problem.score.factor}")
        if self.op.widths(problem.head_dim, problem.v_head_dim) is None:
            reasons.append(f"takes head dims up to 256, not {max(problem.head_dim, problem.v_head_dim)}")
        capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
        if (lacking := self.op.lacks(problem, capability)) is not None:
            reasons.append(f"has {lacking} on compute capability {capability[0]}.{capability[1]}")
        return reasons

    def forward(self, queries: Queries, keys: Keys, tiles: Tiles, score: Score, state: State) -> None:
        (q, _), (k, v, _), (out, lse) = queries, keys, state
        dim, v_dim = self._widths(q.shape[3], v.shape[3])
        for launch in launches_of(tiles, q.shape[0], q.shape[1], k.shape[1]):
            segments, rows = _on_device(launch, q.device)
            here, here_lse = out[launch.batch, launch.q], lse[launch.batch, :, launch.q]
            part, part_lse = self.op.forward(
                FlashOperands(
                    _packed(_padded(q[launch.batch, launch.q], dim), segments),
                    _packed(_padded(k[launch.batch, launch.k], dim), segments),
                    _packed(_padded(v[launch.batch, launch.k], v_dim), segments),
                    launch.window,
                    segments,
                    score,
                )
            )
            batch, length, heads, _ = here.shape
            part = part.reshape(batch, length, heads, v_dim)[..., : v.shape[3]]
            if segments is not None:
                part_lse = part_lse.reshape(heads, batch, length).transpose(0, 1)
            merge_part_(here, here_lse, part, part_lse, rows)
            # Or the next launch's results would come to lie beside these.
            del part, part_lse

    def backward(self, queries: BackwardQueries, keys: Keys, tiles: Tiles, score: Score, gradients: Gradients) -> None:
        q, dout, lse, delta, lse_grad, _ = queries
        (k, v, _), (dq, dk, dv) = keys, gradients
        column = v.shape[3] if lse_grad and not self.op.takes_dlse else None
        v_width = v.shape[3] + (column is not None)
        if self.op.widths(q.shape[3], v_width) is None:
            _WIDE.backward(queries, keys, tiles, score, gradients)
            return
        dim, v_dim = self._widths(q.shape[3], v_width)
        for launch in launches_of(tiles, q.shape[0], q.shape[1], k.shape[1]):
            segments, _ = _on_device(launch, q.device)
            i, j = (launch.batch, launch.q), (launch.batch, launch.k)
            heads_first = launch.batch, slice(None), launch.q
            # What is padded is a copy, and where there is a column it is padded.
            dout_i, delta_i = _padded(dout[i], v_dim), delta[heads_first]
            if self.op.takes_dlse:
                out_i, dlse = torch.zeros_like(dout_i), _packed_lse(-delta_i, segments)
            else:
                out_i, dlse = out_for_delta(dout_i, delta_i.transpose(1, 2), column), None
            dout_i, out_i = _packed(dout_i, segments), _packed(out_i, segments)
            q_i = _packed(_padded(q[i], dim), segments)
            k_j, v_j = _packed(_padded(k[j], dim), segments), _packed(_padded(v[j], v_dim), segments)
            parts = Gradients(*(_buffer(x, segments) for x in (q_i, k_j, v_j)))
            self.op.backward(
                FlashOperands(q_i, k_j, v_j, launch.window, segments, score),
                FlashResults(dout_i, out_i, _packed_lse(lse[heads_first], segments), dlse),
                parts,
            )
            for total, part in ((dq[i], parts.dq), (dk[j], parts.dk), (dv[j], parts.dv)):
                total.add_(part.view(*total.shape[:3], -1)[..., : total.shape[3]])
            # Or the next launch's results would come to lie beside these.
            del parts, out_i, dlse

    def _widths(self, dim: int, v_dim: int) -> tuple[int, int]:
        found = self.op.widths(dim, v_dim)
        assert found is not None, "such a call is refused"
        return found


# Holds tensors, though small ones: no more than the launches of a few plans.
@lru_cache(maxsize=256)
def _on_device(launch: Launch, device: torch.device) -> tuple[VarlenArgs | None, Tensor | None]:
    """Returns the packing of a launch, and the query rows to merge, on a device."""
    packing = launch.packing
    if packing is None:
        return None, None
    q_ends, k_ends = (torch.from_numpy(ends).to(device) for ends in (packing.q_ends, packing.k_ends))
    rows = None if packing.q_rows is None else torch.from_numpy(packing.q_rows).to(device)
    return VarlenArgs(q_ends, k_ends, packing.max_q, packing.max_k), rows


def _padded(x: Tensor, width: int) -> Tensor:
    """Rows (B, S, H, D) of this width, each aligned to 16 bytes as the kernels read them: a view where it can be."""
    aligned = x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:3])
    if x.shape[3] == width and aligned:
        return x
    padded = x.new_zeros(*x.shape[:3], width)
    padded[..., : x.shape[3]] = x
    return padded


def _packed(x: Tensor, segments: VarlenArgs | None) -> Tensor:
    """(B, S, H, D) -> (B * S, H, D) where there are segments."""
    return x if segments is None else x.flatten(0, 1)


def _packed_lse(x: Tensor, segments: VarlenArgs | None) -> Tensor:
    """(B, H, S) -> (H, B * S) where there are segments; contiguous, as the kernels believe without a look."""
    return x.contiguous() if segments is None else x.transpose(0, 1).flatten(1).contiguous()


def _buffer(x: Tensor, segments: VarlenArgs | None) -> Tensor:
    """A buffer of gradients. Packed rows of no segment's tile need not be written."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device) if segments is None else x.new_zeros(x.shape)
