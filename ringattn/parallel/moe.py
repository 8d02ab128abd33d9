"""A dropless mixture-of-experts layer: router, experts, and load-balancing loss; on one process or sharded over ranks.

Each token goes to its top-k experts, wherever they are, and no token is dropped. A rank may hold any number of tokens,
and an expert may receive any number of them, including none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F

from ringattn.comm.grad_all_reduce import sum_gradients
from ringattn.errors import ArgumentError
from ringattn.parallel.decoder import DecoderConfig
from ringattn.parallel.token_dispatcher import TokenDispatcher

_GROUPED_MM_ALIGNMENT = 8  # torch's grouped matmul needs rows of a multiple of 16 bytes, in bf16


@dataclass(frozen=True)
class Routing:
    """The router's decision for T tokens."""

    expert_ids: Tensor  # (T, k) int64, best expert first
    weights: Tensor  # (T, k), each row sums to 1
    probabilities: Tensor  # (T, num_experts), each row sums to 1


class Router(nn.Module):
    """Scores tokens by a linear layer and a softmax, and selects the top-k experts of each.

    Source: Shazeer et al. 2017, arXiv:1701.06538; weights normalised as in Jiang et al. 2024, arXiv:2401.04088.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.scores = nn.Linear(dim, num_experts, bias=False)

    def forward(self, x: Tensor, grad_group: dist.ProcessGroup | None = None) -> Routing:
        """Routes tokens.

        Args:
            x: (T, dim).
            grad_group: ranks with the same router and different tokens, over which its gradient is all-reduced.
        Returns:
            The routing; weights and probabilities in fp32, or float64 for float64.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight = _local_weight(self.scores.weight, grad_group)
        probabilities = F.linear(x, weight).to(dtype).softmax(dim=-1)
        top, expert_ids = probabilities.topk(self.top_k, dim=-1)
        return Routing(expert_ids, top / top.sum(dim=-1, keepdim=True), probabilities)


class Experts(nn.Module):
    """SwiGLU feed-forward experts, their weights stacked along dim 0, which may be sharded over ranks."""

    def __init__(self, dim: int, hidden: int, num_experts: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.up = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.down = nn.Parameter(torch.empty(num_experts, hidden, dim))
        for weight in (self.gate, self.up, self.down):
            bound = weight.shape[1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)

    def forward(
        self, rows: Tensor, tokens_per_expert: Sequence[int], grad_group: dist.ProcessGroup | None = None
    ) -> Tensor:
        """Applies each local expert to its rows.

        Args:
            rows: (sum(tokens_per_expert), dim), sorted by local expert.
            tokens_per_expert: number of rows of each local expert; 0 is allowed, and gives a zero gradient.
            grad_group: ranks with the same experts and different rows, over which gradients are all-reduced.
        Returns:
            A tensor like rows.
        """
        gate, up, down = (_local_weight(weight, grad_group) for weight in (self.gate, self.up, self.down))
        gated = F.silu(segment_matmul(rows, gate, tokens_per_expert))
        return segment_matmul(gated * segment_matmul(rows, up, tokens_per_expert), down, tokens_per_expert)


class MixtureOfExperts(nn.Module):
    """A feed-forward layer in which each token uses top_k of num_experts experts.

    It runs on one process as it is. `apply_ep` shards the experts over the axis "ep".
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        num_experts: int,
        top_k: int,
        aux_loss_weight: float = 0.0,
        num_micro_batches: int = 1,
    ) -> None:
        """Creates the layer with all experts.

        Args:
            dim: width of a token.
            hidden: hidden width of an expert.
            num_experts: number of experts, on all ranks together.
            top_k: number of experts per token.
            aux_loss_weight: weight of the load-balancing loss of a step.
            num_micro_batches: number of forward calls per step. Each call balances its own tokens, and the
                load-balancing loss of the step is the mean over the calls.
        Raises:
            ArgumentError: when top_k is not in 1..num_experts, or num_micro_batches is less than 1.
        """
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ArgumentError(f"top_k={top_k}: must be in 1..{num_experts}, the number of experts")
        if num_micro_batches < 1:
            raise ArgumentError(f"num_micro_batches={num_micro_batches}: must be at least 1")
        self.num_experts, self.aux_loss_weight = num_experts, aux_loss_weight
        self.num_micro_batches = num_micro_batches
        self.router = Router(dim, num_experts, top_k)
        self.experts = Experts(dim, hidden, num_experts)
        self._ep_group: dist.ProcessGroup | None = None
        self._batch_groups: tuple[dist.ProcessGroup, ...] = ()
        self._grad_group: dist.ProcessGroup | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Returns the layer's output, like x; its backward also adds the gradient of the load-balancing loss.

        The load-balancing loss therefore needs no path to the end of the model, which may be on another pipeline stage.
        `forward_with_aux_loss` returns its value, and documents shapes and communication.
        """
        out, aux_loss = self.forward_with_aux_loss(x)
        if self.aux_loss_weight == 0:
            return out
        return add_aux_loss(out, self.aux_loss_weight / self.num_micro_batches * aux_loss)

    def forward_with_aux_loss(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the layer's output, and this rank's share of the load-balancing loss.

        Collective over all ranks that share the experts or the batch, including ranks without tokens.

        Args:
            x: (B, S, dim) or (T, dim), this rank's tokens; any number of them.
        Returns:
            The output, like x, and the share of the loss, a scalar in fp32 or float64; see `load_balancing_loss`.
        Communication: over "ep", an all-to-all of one number per expert, an all-to-all of k rows per token to the
            experts, and one of k rows back; the backward sends as many rows. Over the batch's ranks, an all-reduce of
            one number per expert.
        """
        tokens = x.flatten(0, -2)
        routing: Routing = self.router(tokens, self._grad_group)
        dispatcher = TokenDispatcher.from_expert_ids(routing.expert_ids, self.num_experts, self._ep_group)
        rows = dispatcher.dispatch(tokens)
        expert_out = dispatcher.combine(self.experts(rows, dispatcher.tokens_per_expert, self._grad_group))
        out = torch.einsum("tk,tkd->td", routing.weights.to(x.dtype), expert_out)
        return out.view_as(x), load_balancing_loss(routing, self._batch_groups)

    def shard_experts(
        self,
        ep_mesh: DeviceMesh | None,
        *,
        batch_groups: Sequence[dist.ProcessGroup] = (),
        grad_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Keeps only this rank's experts, in place. All ranks must hold the same weights before. Sends nothing.

        Args:
            ep_mesh: a one-dimensional mesh whose ranks hold different tokens; None keeps all experts on every rank.
            batch_groups: the ranks over which the tokens of a batch are sharded, one group per mesh axis, including
                the ranks of ep_mesh. The load is balanced over all of them.
            grad_group: ranks with the same weights and different tokens whose gradients nothing else sums.
        """
        self._batch_groups, self._grad_group = tuple(batch_groups), grad_group
        if ep_mesh is None:
            return
        self._ep_group = ep_mesh.get_group()
        for name, weight in list(self.experts.named_parameters()):
            local = weight.detach().chunk(ep_mesh.size())[ep_mesh.get_local_rank()].clone()
            sharded = DTensor.from_local(local, ep_mesh, [Shard(0)], run_check=False)
            setattr(self.experts, name, nn.Parameter(sharded, requires_grad=weight.requires_grad))


def make_moe(config: DecoderConfig, *, num_micro_batches: int = 1) -> MixtureOfExperts:
    """Returns the feed-forward module of a decoder's mixture-of-experts layer; pass it as `Decoder(moe_factory=)`.

    Args:
        config: the decoder's, with config.moe.
        num_micro_batches: number of micro-batches per step; use `functools.partial` to set it.
    Raises:
        ArgumentError: when config.moe is None.
    """
    spec = config.moe
    if spec is None:
        raise ArgumentError("config.moe=None: a decoder without experts has no mixture-of-experts layers")
    return MixtureOfExperts(
        config.dim,
        spec.hidden,
        num_experts=spec.num_experts,
        top_k=spec.top_k,
        aux_loss_weight=spec.aux_loss_weight,
        num_micro_batches=num_micro_batches,
    )


def load_balancing_loss(routing: Routing, batch_groups: Sequence[dist.ProcessGroup] = ()) -> Tensor:
    """Returns this rank's share of the load-balancing loss, a scalar; the sum of all ranks' shares is the loss.

    The loss of a batch is num_experts * sum over experts of f * p, where f is the fraction of the batch's (token,
    expert) choices that an expert received, and p its mean probability. It is 1 for a uniform load. f has no gradient,
    so each rank's share has the complete gradient for its own tokens, and gradients are summed over ranks as for any
    other loss.

    Args:
        routing: of this rank's tokens.
        batch_groups: the ranks over which the tokens of the batch are sharded, one group per mesh axis; () if none.
    Communication: over each group, an all-reduce of num_experts + 1 numbers.
    Source: Fedus et al. 2021, arXiv:2101.03961, eq. 4, counted over k choices per token.
    """
    num_tokens, num_experts = routing.probabilities.shape
    choices = torch.bincount(routing.expert_ids.flatten(), minlength=num_experts)
    counts = torch.cat([choices, choices.new_tensor([num_tokens])])
    for group in batch_groups:
        dist.all_reduce(counts, group=group)
    choices_per_expert, total_tokens = counts[:-1].to(routing.probabilities.dtype), counts[-1].clamp(min=1)
    fractions = choices_per_expert / (total_tokens * routing.expert_ids.shape[1])
    return num_experts * (fractions * routing.probabilities.sum(dim=0) / total_tokens).sum()


def add_aux_loss(x: Tensor, loss: Tensor) -> Tensor:
    """Returns x unchanged; the backward through it also computes the gradient of `loss`, with weight 1.

    Args:
        x: any tensor on the path to the main loss.
        loss: a scalar. Scaling of the main loss does not scale it.
    """
    out: Tensor = _AddAuxLoss.apply(x, loss)  # type: ignore[no-untyped-call]
    return out


class _AddAuxLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.grad_loss = loss.new_ones(())
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], ctx.grad_loss


def segment_matmul(rows: Tensor, matrices: Tensor, num_rows: Sequence[int]) -> Tensor:
    """Multiplies each segment of rows by its own matrix.

    Args:
        rows: (sum(num_rows), n).
        matrices: (len(num_rows), n, m), one per segment.
        num_rows: the lengths of the segments; 0 is allowed.
    Returns:
        (sum(num_rows), m): by one grouped kernel for bf16 on CUDA, otherwise by one matmul per segment.
    """
    aligned = all(n % _GROUPED_MM_ALIGNMENT == 0 for n in matrices.shape[1:])
    if rows.is_cuda and rows.dtype == torch.bfloat16 and aligned:
        return grouped_matmul(rows, matrices, num_rows)
    segments = zip(torch.split(rows, list(num_rows)), matrices.unbind(), strict=True)
    return torch.cat([segment @ matrix for segment, matrix in segments])


def grouped_matmul(rows: Tensor, matrices: Tensor, num_rows: Sequence[int]) -> Tensor:
    """Computes the same as `segment_matmul` by torch's grouped kernel; for fp32 or bf16."""
    counts = torch.tensor(num_rows, device=rows.device)
    if 0 in num_rows:
        # The kernel leaves the gradient of a matrix without rows undefined; the where makes it zero.
        matrices = torch.where((counts > 0)[:, None, None], matrices, 0.0)
    return F.grouped_mm(rows, matrices, offs=counts.cumsum(0, dtype=torch.int32))


def _local_weight(weight: Tensor, grad_group: dist.ProcessGroup | None) -> Tensor:
    """Returns the local shard of a weight; its gradient is all-reduced over `grad_group`."""
    local = weight.to_local() if isinstance(weight, DTensor) else weight
    return local if grad_group is None else sum_gradients(local, grad_group)
