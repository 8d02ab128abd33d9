"""All-to-all dispatch of tokens to the ranks of their experts, and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.comm.autograd_all_to_all import all_to_all_rows


@dataclass(frozen=True)
class TokenDispatcher:
    """The permutation and the split sizes that move T local tokens to their experts and back; k experts per token.

        tokens    repeat k times    sort by expert    all-to-all    sort by local expert    experts
        (T, D) -> (T * k, D) -----> (T * k, D) -----> (R, D) -----> (R, D) ----------------> ...

    R is the number of rows that this rank's experts receive, from all ranks.
    """

    send_order: Tensor  # (T * k,): the rows to send, sorted by expert
    top_k: int
    input_splits: list[int]  # rows to send to each rank
    output_splits: list[int]  # rows to receive from each rank
    expert_order: Tensor  # (R,): the received rows, sorted by local expert
    tokens_per_expert: list[int]  # received rows of each local expert
    ep_group: dist.ProcessGroup | None

    @staticmethod
    def from_expert_ids(expert_ids: Tensor, num_experts: int, ep_group: dist.ProcessGroup | None) -> TokenDispatcher:
        """Exchanges the numbers of tokens per expert, and returns the dispatcher of these tokens.

        Args:
            expert_ids: (T, k) int64, the experts of each local token.
            num_experts: number of experts on all ranks together.
            ep_group: the group over which experts are sharded, rank r holding the r-th chunk; None if all are local.
        Communication: an all-to-all of one number per expert. The host reads the numbers, which synchronises a GPU.
        """
        num_ranks = 1 if ep_group is None else ep_group.size()
        send_counts = torch.bincount(expert_ids.flatten(), minlength=num_experts)
        recv_counts = send_counts
        if ep_group is not None:
            recv_counts = torch.empty_like(send_counts)
            dist.all_to_all_single(recv_counts, send_counts, group=ep_group)
        sent, received = torch.stack([send_counts, recv_counts]).view(2, num_ranks, -1).tolist()
        output_splits = [sum(counts) for counts in received]
        local_ids = torch.arange(num_experts // num_ranks, device=recv_counts.device).repeat(num_ranks)
        received_ids = local_ids.repeat_interleave(recv_counts, output_size=sum(output_splits))
        return TokenDispatcher(
            send_order=expert_ids.flatten().argsort(stable=True),
            top_k=expert_ids.shape[1],
            input_splits=[sum(counts) for counts in sent],
            output_splits=output_splits,
            expert_order=received_ids.argsort(stable=True),
            tokens_per_expert=[sum(counts) for counts in zip(*received, strict=True)],
            ep_group=ep_group,
        )

    def dispatch(self, tokens: Tensor) -> Tensor:
        """Sends local tokens, (T, dim), to their experts; returns the rows of this rank's experts, sorted by expert.

        Communication: an all-to-all of T * k rows; the backward sends their gradients back.
        """
        # Repeat first, then permute: the backward is then a permutation and a sum in a fixed order (deterministic).
        rows = tokens[:, None].expand(-1, self.top_k, -1).flatten(0, 1)[self.send_order]
        return self._all_to_all(rows, self.input_splits, self.output_splits)[self.expert_order]

    def combine(self, rows: Tensor) -> Tensor:
        """Sends the experts' outputs, ordered as `dispatch` returned their inputs, back to the ranks of their tokens.

        Returns:
            (T, k, dim): the outputs for this rank's tokens, in the order of expert_ids.
        Communication: as `dispatch`.
        """
        received = self._all_to_all(rows[self.expert_order.argsort()], self.output_splits, self.input_splits)
        num_tokens = len(self.send_order) // self.top_k
        return received[self.send_order.argsort()].view(num_tokens, self.top_k, rows.shape[1])

    def _all_to_all(self, rows: Tensor, send_splits: list[int], recv_splits: list[int]) -> Tensor:
        return rows if self.ep_group is None else all_to_all_rows(rows, send_splits, recv_splits, self.ep_group)
