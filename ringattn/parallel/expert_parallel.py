"""Expert parallelism: a mixture-of-experts layer whose experts are spread over the ranks of an axis.

Each token goes to its k best experts, wherever they are, and comes back; none is dropped. A rank may have any number of
tokens, and an expert may get any number of them, none included.
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

from ringattn.comm.autograd_all_to_all import all_to_all_rows
from ringattn.comm.grad_all_reduce import sum_gradients
from ringattn.errors import ArgumentError
from ringattn.parallel.decoder import DecoderConfig
from ringattn.parallel.mesh import axis_mesh, axis_size, expert_mesh, loss_mesh

_GROUPED_ALIGNMENT = 8  # torch's grouped kernel wants rows of 16 bytes, in bf16


@dataclass(frozen=True)
class Routing:
    """Where each of T tokens goes."""

    experts: Tensor  # (T, k) int64, the best first
    weights: Tensor  # (T, k), each row sums to 1
    probabilities: Tensor  # (T, num_experts), each row sums to 1


class Router(nn.Module):
    """Scores tokens by a linear map and a softmax, and takes the k best experts of each.

    Source: Shazeer et al. 2017, arXiv:1701.06538; weights normalised as in Jiang et al. 2024, arXiv:2401.04088.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.scores = nn.Linear(dim, num_experts, bias=False)

    def forward(self, x: Tensor, sharers: dist.ProcessGroup | None = None) -> Routing:
        """Returns where the tokens of x, (T, dim), go; weights are fp32, or float64 for float64.

        Ranks of `sharers` have the same router, and other tokens: its gradient is summed over them.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        probabilities = F.linear(x, _shared(self.scores.weight, sharers)).to(wide).softmax(dim=-1)
        best, experts = probabilities.topk(self.top_k, dim=-1)
        return Routing(experts, best / best.sum(dim=-1, keepdim=True), probabilities)


class Experts(nn.Module):
    """SwiGLU feed-forward layers side by side, their weights in stacks of which a rank may hold some."""

    def __init__(self, dim: int, hidden: int, num_experts: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.up = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.down = nn.Parameter(torch.empty(num_experts, hidden, dim))
        for stack in (self.gate, self.up, self.down):
            bound = stack.shape[1] ** -0.5
            nn.init.uniform_(stack, -bound, bound)

    def forward(self, rows: Tensor, num_rows: Sequence[int], sharers: dist.ProcessGroup | None = None) -> Tensor:
        """Returns what each expert makes of its rows.

        Args:
            rows: (sum(num_rows), dim): the rows of this rank's first expert, then those of the next.
            num_rows: how many rows each of this rank's experts has; 0 is allowed, and gives a gradient of zero.
            sharers: ranks that have the same experts, and other rows: gradients are summed over them.
        """
        gate, up, down = (_shared(stack, sharers) for stack in (self.gate, self.up, self.down))
        mixed = F.silu(segment_matmul(rows, gate, num_rows)) * segment_matmul(rows, up, num_rows)
        return segment_matmul(mixed, down, num_rows)


class MixtureOfExperts(nn.Module):
    """A feed-forward layer of which each token uses k experts out of many.

    It works on one process as it is. `apply_ep` gives each rank of an axis its share of the experts.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        num_experts: int,
        top_k: int,
        balance_weight: float = 0.0,
        num_micro_batches: int = 1,
    ) -> None:
        """Makes the layer with all its experts.

        Args:
            dim: width of a token.
            hidden: width within an expert.
            num_experts: how many experts there are, on all ranks together.
            top_k: to how many of them each token goes.
            balance_weight: what the load-balancing loss of a step is multiplied by, before its gradient joins in.
            num_micro_batches: how many calls a step has, each of which balances the load of its own tokens: the loss of
                a step is the mean of theirs.
        Raises:
            ArgumentError: when there are not so many experts, or no micro-batches.
        """
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ArgumentError(f"top_k={top_k}: must be in 1..{num_experts}, the number of experts")
        if num_micro_batches < 1:
            raise ArgumentError(f"num_micro_batches={num_micro_batches}: must be at least 1")
        self.num_experts, self.balance_weight = num_experts, balance_weight
        self.num_micro_batches = num_micro_batches
        self.router = Router(dim, num_experts, top_k)
        self.experts = Experts(dim, hidden, num_experts)
        self._axis: dist.ProcessGroup | None = None
        self._batch: tuple[dist.ProcessGroup, ...] = ()
        self._sharers: dist.ProcessGroup | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Returns the layer's output, like x; its backward adds the gradient of the load-balancing loss.

        So that loss needs no way of its own to the end of the model, be it in another stage of a pipeline. Its value is
        to be had from `mixed`, which also tells shapes and communication.
        """
        out, balance = self.mixed(x)
        if self.balance_weight == 0:
            return out
        return attach_loss(out, self.balance_weight / self.num_micro_batches * balance)

    def mixed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the layer's output, and this rank's share of the load-balancing loss.

        All ranks that share experts, or a batch, call it together, those without tokens too.

        Args:
            x: (B, S, dim) or (T, dim), the tokens of this rank; any number of them.
        Returns:
            The output, like x; and a scalar, fp32 or float64: see `balance_share`.
        Communication: along the experts' axis, an all-to-all of a number for each expert, of each token's row to k
            experts, and of k rows back; the backward sends as many rows. Over the batch, one number for each expert.
        """
        tokens = x.flatten(0, -2)
        routing: Routing = self.router(tokens, self._sharers)
        dispatch = TokenDispatch.of(routing.experts, self.num_experts, self._axis)
        rows = dispatch.there(tokens)
        back = dispatch.back(self.experts(rows, dispatch.num_rows, self._sharers))
        mixed = torch.einsum("tk,tkd->td", routing.weights.to(x.dtype), back)
        return mixed.view_as(x), balance_share(routing, self._batch)

    def spread(
        self,
        axis: DeviceMesh | None,
        *,
        batch: Sequence[dist.ProcessGroup] = (),
        sharers: dist.ProcessGroup | None = None,
    ) -> None:
        """Keeps this rank's experts only, in place. All ranks have the same weights before; none is sent.

        Args:
            axis: a mesh of one dim, whose ranks have other tokens each; None leaves all experts on every rank.
            batch: the ranks over which the tokens of a batch are spread, a group for each axis of a mesh, those of the
                experts' axis among them. Load is balanced over all of them.
            sharers: ranks that have the same experts and other tokens, and whose gradients nobody else sums.
        """
        self._batch, self._sharers = tuple(batch), sharers
        if axis is None:
            return
        self._axis = axis.get_group()
        for name, stack in list(self.experts.named_parameters()):
            share = stack.detach().chunk(axis.size())[axis.get_local_rank()].clone()
            spread = DTensor.from_local(share, axis, [Shard(0)], run_check=False)
            setattr(self.experts, name, nn.Parameter(spread, requires_grad=stack.requires_grad))


@dataclass(frozen=True)
class TokenDispatch:
    """The way of each token's k rows to the experts, and back."""

    order: Tensor  # (T * k,): the rows that leave, by expert
    top_k: int
    leaving: list[int]  # how many rows go to each rank
    coming: list[int]
    by_expert: Tensor  # the rows that came, by expert
    num_rows: list[int]  # of each expert of this rank
    axis: dist.ProcessGroup | None

    @staticmethod
    def of(experts: Tensor, num_experts: int, axis: dist.ProcessGroup | None) -> TokenDispatch:
        """Finds it.

        Args:
            experts: (T, k), where each token goes.
            num_experts: on all ranks together.
            axis: the group over which they are spread, in order of rank; None where they are all here.
        Communication: an all-to-all of one number for each expert. The numbers are read by the host.
        """
        ranks = 1 if axis is None else axis.size()
        counts = torch.bincount(experts.flatten(), minlength=num_experts)
        came = counts
        if axis is not None:
            came = torch.empty_like(counts)
            dist.all_to_all_single(came, counts, group=axis)
        table = torch.stack([counts, came]).view(2, ranks, -1).tolist()
        coming = [sum(numbers) for numbers in table[1]]
        local = torch.arange(num_experts // ranks, device=came.device).repeat(ranks)
        owners = local.repeat_interleave(came, output_size=sum(coming))
        return TokenDispatch(
            order=experts.flatten().argsort(stable=True),
            top_k=experts.shape[1],
            leaving=[sum(numbers) for numbers in table[0]],
            coming=coming,
            by_expert=owners.argsort(stable=True),
            num_rows=[sum(numbers) for numbers in zip(*table[1], strict=True)],
            axis=axis,
        )

    def there(self, tokens: Tensor) -> Tensor:
        """Returns the rows for this rank's experts, by expert; tokens are (T, dim), this rank's own."""
        # Repeated first and permuted then: the backward is a permutation and a sum, and not a sum in any order.
        rows = tokens[:, None].expand(-1, self.top_k, -1).flatten(0, 1)[self.order]
        return self._traded(rows, self.leaving, self.coming)[self.by_expert]

    def back(self, rows: Tensor) -> Tensor:
        """Returns what the experts made of this rank's tokens, (T, k, dim), in the order of the tokens."""
        came = self._traded(rows[self.by_expert.argsort()], self.coming, self.leaving)
        return came[self.order.argsort()].view(len(self.order) // self.top_k, self.top_k, rows.shape[1])

    def _traded(self, rows: Tensor, leaving: list[int], coming: list[int]) -> Tensor:
        return rows if self.axis is None else all_to_all_rows(rows, leaving, coming, self.axis)


def balance_share(routing: Routing, batch: Sequence[dist.ProcessGroup] = ()) -> Tensor:
    """Returns this rank's share of the load-balancing loss, a scalar; the shares of all ranks sum up to the loss.

    The loss of a batch is E * sum over experts of f * p: f is the fraction of the batch's choices that an expert
    got, and p its mean probability. It is 1 when all experts are used alike. f has no gradient, so that each rank's
    share has the whole gradient of its own tokens, and gradients are summed over ranks as those of any other loss.

    Args:
        routing: of this rank's tokens.
        batch: the ranks over which the tokens of the batch are spread, a group for each axis; () when all are here.
    Communication: over each group, an all-reduce of one number for each expert and one more.
    Source: Fedus et al. 2021, arXiv:2101.03961, eq. 4, counted over k choices.
    """
    num_tokens, num_experts = routing.probabilities.shape
    chosen = torch.bincount(routing.experts.flatten(), minlength=num_experts)
    counts = torch.cat([chosen, chosen.new_tensor([num_tokens])])
    for group in batch:
        dist.all_reduce(counts, group=group)
    used, total = counts[:-1].to(routing.probabilities.dtype), counts[-1].clamp(min=1)
    fractions = used / (total * routing.experts.shape[1])
    return num_experts * (fractions * routing.probabilities.sum(dim=0) / total).sum()


def attach_loss(x: Tensor, loss: Tensor) -> Tensor:
    """Returns x; whoever goes backward through it adds the gradient of a loss to that of its own.

    Args:
        x: anything that takes part in the main loss.
        loss: a scalar. It is not scaled by what the main loss is scaled by.
    """
    attached: Tensor = _AttachLoss.apply(x, loss)  # type: ignore[no-untyped-call]
    return attached


def make_moe(config: DecoderConfig, *, num_micro_batches: int = 1) -> MixtureOfExperts:
    """Returns what stands in the feed-forward slot of a decoder's mixture-of-experts layers.

    Args:
        config: of the decoder; config.moe is given.
        num_micro_batches: in a step: each adds so small a part of its load-balancing loss.
    """
    spec = config.moe
    if spec is None:
        raise ArgumentError("config.moe=None: a decoder without experts has no layer for them")
    return MixtureOfExperts(
        config.dim,
        spec.hidden,
        num_experts=spec.num_experts,
        top_k=spec.top_k,
        balance_weight=spec.aux_loss_weight,
        num_micro_batches=num_micro_batches,
    )


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.loss = loss.new_ones(())
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], ctx.loss


def segment_matmul(rows: Tensor, stack: Tensor, num_rows: Sequence[int]) -> Tensor:
    """Returns each segment of rows times its own matrix.

    Args:
        rows: (sum(num_rows), n).
        stack: (len(num_rows), n, m), a matrix for each segment.
        num_rows: the lengths of the segments; 0 is allowed.
    Returns:
        (sum(num_rows), m), by one grouped kernel for bf16 on CUDA, and by one matmul for each segment otherwise.
    """
    if rows.is_cuda and rows.dtype == torch.bfloat16 and all(n % _GROUPED_ALIGNMENT == 0 for n in stack.shape[1:]):
        return grouped_matmul(rows, stack, num_rows)
    parts = zip(torch.split(rows, list(num_rows)), stack.unbind(), strict=True)
    return torch.cat([part @ matrix for part, matrix in parts])


def grouped_matmul(rows: Tensor, stack: Tensor, num_rows: Sequence[int]) -> Tensor:
    """Returns the same as `segment_matmul`, by torch's grouped kernel; fp32 or bf16."""
    counts = torch.tensor(num_rows, device=rows.device)
    if 0 in num_rows:
        # The kernel promises nothing of the gradient of a matrix without rows; this makes it zero.
        stack = torch.where((counts > 0)[:, None, None], stack, 0.0)
    return F.grouped_mm(rows, stack, offs=counts.cumsum(0, dtype=torch.int32))


def check_experts(config: DecoderConfig, mesh: DeviceMesh) -> None:
    """Checks that the experts of a decoder can be spread over the axis "ep".

    Raises:
        ArgumentError: when there are none, or "ep" does not divide their number.
    """
    size = axis_size(mesh, "ep")
    if size > 1 and config.moe is None:
        raise ArgumentError(f"ep={size}: the model has no experts to spread; leave ep out")
    if config.moe is not None and config.moe.num_experts % size:
        raise ArgumentError(f"ep={size}: must divide num_experts={config.moe.num_experts}")


def apply_ep(model: nn.Module, mesh: DeviceMesh) -> None:
    """Gives each rank along "ep" its share of the experts, in every mixture-of-experts layer of a model, in place.

    Afterwards a layer's stacks are DTensors over the axis, so that checkpoints know what they are part of. The gradient
    of an expert counts the tokens of the whole axis: it needs a sum only over ranks that have the same expert, which
    is "efsdp" and dp_replicate. Along "tp", where each rank has other rows of a sequence, they are summed at once.

    Args:
        model: whatever has `MixtureOfExperts` in it, with the same weights on every rank.
        mesh: from `build_mesh`; see `check_experts`.
    """
    tokens, rows = loss_mesh(mesh), axis_mesh(mesh, "tp")
    sharers = None if rows is None else rows.get_group()
    batch = [part.get_group() for part in (tokens, rows) if part is not None]
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            module.spread(expert_mesh(mesh), batch=batch, sharers=sharers)


def _shared(weight: Tensor, sharers: dist.ProcessGroup | None) -> Tensor:
    """The part of a weight that is here, its gradient summed over those that share it."""
    here = weight.to_local() if isinstance(weight, DTensor) else weight
    return here if sharers is None else sum_gradients(here, sharers)
