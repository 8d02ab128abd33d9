"""Compares a patched model over ranks with the same model in one process."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

import ringattn.hf as rhf
from tests.harness.compare import assert_close
from tests.hf.architectures import architecture
from tests.hf.exact import exact_in

VOCABULARY = 37
SIZES = (2, 13)


@dataclass(frozen=True)
class BatchSpec:
    """The shape, padding and documents of a batch."""

    name: str
    sizes: tuple[int, int] = SIZES
    padding: tuple[tuple[int, int], ...] = ()  # how many at the left and at the right, of each row
    documents: tuple[int, ...] = ()  # their lengths
    documents_as: str = "position_ids"  # or "cu_seq_lens"
    unlabelled: int = 0  # so many positions at the start have no label

    def __str__(self) -> str:
        return self.name

    def batch(self) -> dict[str, Tensor]:
        """Returns the whole batch, the same on every rank."""
        generator = torch.Generator().manual_seed(3)
        ids = torch.randint(3, VOCABULARY, self.sizes, generator=generator)
        labels = ids.clone()
        labels[:, : self.unlabelled] = -100
        batch = {"input_ids": ids, "labels": labels}
        if self.padding:
            batch["attention_mask"] = torch.ones_like(ids)
            for row, (left, right) in enumerate(self.padding):
                for name, filler in (("input_ids", 0), ("labels", -100), ("attention_mask", 0)):
                    batch[name][row, :left] = filler
                    batch[name][row, self.sizes[1] - right :] = filler
                if left:
                    # It would be predicted from padding, whose rows some attention functions give a mean, others 0.
                    batch["labels"][row, left] = -100
        if self.documents:
            positions = torch.cat([torch.arange(length) for length in self.documents])
            batch["position_ids"] = positions.expand(self.sizes[0], -1).clone()
        return batch


PLAIN = BatchSpec("plain")
UNEVEN_LABELS = BatchSpec("uneven_labels", unlabelled=9)
LEFT = BatchSpec("padding_left", padding=((0, 0), (4, 0)))
RIGHT = BatchSpec("padding_right", padding=((0, 5), (0, 0)))
PACKED = BatchSpec("packed", documents=(5, 1, 7))
CU_SEQ_LENS = BatchSpec("cu_seq_lens", sizes=(1, 13), documents=(5, 1, 7), documents_as="cu_seq_lens")
SHORT = BatchSpec("short", sizes=(2, 2))

BATCH_SPECS = (PLAIN, UNEVEN_LABELS, LEFT, RIGHT, PACKED, CU_SEQ_LENS, SHORT)


def handle_batch(spec: BatchSpec, batch: dict[str, Tensor]) -> dict[str, Any]:
    """Returns the batch with the arguments that describe its documents, as a handle takes it."""
    if spec.documents_as == "position_ids":
        return dict(batch)
    ends = torch.tensor([sum(spec.documents[:i]) for i in range(len(spec.documents) + 1)], dtype=torch.int32)
    return batch | {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 7, "max_length_k": 7}


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """Takes the gradients out of a model."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def one_process(
    model: PreTrainedModel, batch: dict[str, Tensor], documents: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits, loss and gradients of the whole batch; or of these documents, each by itself."""
    logits, loss = forward(model, batch, documents)
    torch.autograd.backward(loss)
    return logits.detach(), loss.detach(), gradients(model)


def forward(model: PreTrainedModel, batch: dict[str, Tensor], documents: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """The same without the gradients."""
    with exact_in(model.dtype):
        if documents:
            ids, positions = (torch.split(batch[name], list(documents), 1) for name in ("input_ids", "position_ids"))
            parts = [model(input_ids=i, position_ids=p).logits for i, p in zip(ids, positions, strict=True)]
            logits = torch.cat(parts, 1)
            return logits, model.loss_function(logits, batch["labels"], model.config.vocab_size)
        out = model(**batch, use_cache=False)  # with a cache, transformers does not see that a batch is packed
        return out.logits, out.loss


@cache
def reference(name: str, spec: BatchSpec) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Returns the results of one process, cached for all layouts, exchanges and numbers of ranks."""
    return one_process(architecture(name).build(), spec.batch(), unpacked_documents(name, spec))


def unpacked_documents(name: str, spec: BatchSpec) -> tuple[int, ...]:
    """Returns the documents that one process must run one by one."""
    return () if architecture(name).supports_packing else spec.documents


def sharded(
    model: PreTrainedModel, handle: rhf.Handle, batch: dict[str, Any], group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The same of a patched model: logits gathered, loss and gradients summed over the ranks."""
    local_batch = handle.shard(batch)
    with exact_in(model.dtype):
        out = model(**local_batch)
        loss = handle.loss(out.logits, local_batch) if out.loss is None else out.loss
    loss.backward()
    summed = {}
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(grad, group=group)
        summed[name] = grad.clone()
    model.zero_grad(set_to_none=True)
    return handle.unshard(out.logits.detach(), local_batch), handle.reduce(loss), summed


def check_equal(group: dist.ProcessGroup, name: str, layout: str, exchange: str, spec: BatchSpec) -> None:
    """Checks that the patched model gives the logits, loss and gradients of one process; and again when unpatched.

    Gathered results are compared on rank 0.
    """
    model, batch = architecture(name).build(), spec.batch()
    with rhf.patch(model, group, layout=layout, exchange=exchange) as handle:
        ours = sharded(model, handle, handle_batch(spec, batch), group)
    if group.rank():
        return
    logits, loss, grads = reference(name, spec)
    valid = batch["attention_mask"].bool() if spec.padding else torch.ones(spec.sizes, dtype=torch.bool)
    assert_close(ours[0][valid], logits[valid], atol=1e-10, name="logits")
    assert_close(ours[1], loss, atol=1e-10, name="loss")
    for parameter, grad in ours[2].items():
        expected = grads.get(parameter, torch.zeros_like(grad))
        assert_close(grad, expected, atol=1e-10, name=f"gradient of {parameter}")
    assert torch.equal(forward(model, batch, unpacked_documents(name, spec))[0], logits)
