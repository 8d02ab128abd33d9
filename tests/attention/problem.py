"""One attention problem, solved by every rank of a group and by the oracle."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

import ringattn
from tests.harness import oracle
from tests.harness.cases import LayoutCase, MaskCase, Tensors, tensors
from tests.harness.poison import poisoned_empty


@dataclass(frozen=True)
class Problem:
    """Everything that defines a problem; tensors follow from it, the same on every rank."""

    mask: MaskCase | tuple[MaskCase, ...]
    layout: LayoutCase
    q_len: int
    k_len: int | None = None
    kv_layout: LayoutCase | None = None
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    dim: int = 4
    v_dim: int = 4
    dtype: torch.dtype = torch.float64
    scale: float | None = None
    softcap: float | None = None
    sink: bool = False
    backend: str | None = None
    poison: bool = False

    @property
    def keys(self) -> int:
        return self.q_len if self.k_len is None else self.k_len

    def tensors(self) -> Tensors:
        """The whole tensors."""
        return tensors(
            7, self.batch, self.q_len, self.keys, self.heads, self.kv_heads, self.dim, self.v_dim, self.dtype
        )

    def sink_logits(self) -> Tensor | None:
        if not self.sink:
            return None
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        return torch.linspace(-1.0, 2.0, self.heads, dtype=dtype)

    def allowed(self) -> Tensor:
        """(B, Sq, Sk) bool, from the masks' definitions."""
        cases = self.mask if isinstance(self.mask, tuple) else (self.mask,) * self.batch
        return torch.stack([torch.from_numpy(case.allowed(self.q_len, self.keys)) for case in cases])

    def layouts(self, world_size: int) -> tuple[ringattn.Layout, ringattn.Layout]:
        """Of the queries, and of the keys/values."""
        layout = self.layout.build(self.q_len, world_size)
        if self.k_len is None and self.kv_layout is None:
            return layout, layout
        return layout, (self.kv_layout or self.layout).build(self.keys, world_size)

    def built_mask(self) -> ringattn.Mask | list[ringattn.Mask]:
        longest = max(self.q_len, self.keys)
        if isinstance(self.mask, tuple):
            return [case.build(longest) for case in self.mask]
        return self.mask.build(longest)

    def expected(self) -> oracle.Gradients:
        """The oracle's answer, whole, in float64."""
        t = self.tensors()
        q, k, v, dout, dlse = (x.double() for x in t)
        sink = self.sink_logits()
        return oracle.dense_gradients(
            q, k, v, self.allowed(), dout, dlse, scale=self.scale, softcap=self.softcap,
            sink=None if sink is None else sink.double(),
        )  # fmt: skip


def solve(group: dist.ProcessGroup, problem: Problem) -> dict[str, Tensor]:
    """Runs on one rank: the local out, lse and gradients; kv gradients under the keys' layout."""
    if problem.poison:
        with poisoned_empty():
            return _solve(group, problem)
    return _solve(group, problem)


def _solve(group: dist.ProcessGroup, problem: Problem) -> dict[str, Tensor]:
    layout, kv_layout = problem.layouts(group.size())
    t = problem.tensors()
    q, dout = (ringattn.shard(x, layout, group) for x in (t.q, t.dout))
    k, v = (ringattn.shard(x, kv_layout, group) for x in (t.k, t.v))
    dlse = ringattn.shard(t.dlse, layout, group, dim=2)
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    sink = problem.sink_logits()
    leaves = [q, k, v] if sink is None else [q, k, v, sink.requires_grad_()]
    out, lse = ringattn.ring_attention_with_lse(
        q,
        k,
        v,
        group,
        mask=problem.built_mask(),
        layout=layout,
        kv_layout=kv_layout,
        scale=problem.scale,
        softcap=problem.softcap,
        sink=sink,
        backend=problem.backend,
    )
    grads = torch.autograd.grad([out, lse], leaves, [dout, dlse])
    result = {"out": out.detach(), "lse": lse.detach()}
    result.update(zip(("dq", "dk", "dv", "dsink"), grads, strict=False))
    return result


def whole(problem: Problem, results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Puts the ranks' results together in global order; the sink's gradient is the sum of the ranks' shares."""
    layout, kv_layout = problem.layouts(len(results))
    found = {}
    for name in results[0]:
        if name == "dsink":
            found[name] = torch.stack([r[name] for r in results]).sum(0)
            continue
        dim = 2 if name == "lse" else 1
        held = kv_layout if name in ("dk", "dv") else layout
        order = torch.cat([torch.from_numpy(held.positions(rank)) for rank in range(len(results))])
        parts = torch.cat([r[name] for r in results], dim)
        found[name] = parts.index_select(dim, torch.argsort(order))
    return found
