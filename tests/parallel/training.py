"""A few steps of training, on a mesh of ranks and in one process that does not use the package's attention.

Both start from the same weights and batches, in float64. Tests compare losses, gradient norms and final weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import ringattn
from ringattn.parallel import (
    Decoder,
    DecoderConfig,
    all_reduce_loss,
    build_mesh,
    clip_gradients,
    context_mesh,
    count_valid,
    cross_entropy,
    local_batch,
    make_cp_attention,
    make_moe,
    no_sync,
    parallelize,
)
from ringattn.types import Masks
from tests.harness.cases import LAYOUT_CASES
from tests.harness.oracle import plain_attention

CONFIG = DecoderConfig(vocab_size=36, num_layers=2, dim=32, num_heads=8, num_kv_heads=4, hidden=24)
LEARNING_RATE = 1e-2
MAX_NORM = 0.2  # below the norms that occur, so that clipping has an effect
SEQUENCES = 8
WINDOW = 5
ODD = 37  # the sequence length where no axis needs an even split
IGNORED = -100


@dataclass(frozen=True)
class TrainingSetup:
    """A training configuration: mesh sizes, data, and ZeRO stage.

    `mask` is "causal", "window", or "packed": documents with different lengths in each sequence, and a window.
    """

    sizes: Mapping[str, int]
    mask: str = "causal"
    layout: str = "zigzag"
    length: int = 0  # tokens in a sequence; 0 takes ODD, or 32 with tp
    zero: int = 3
    micro_batches: int = 1
    no_sync: bool = False
    config: DecoderConfig = CONFIG

    def __post_init__(self) -> None:
        if not self.length:
            object.__setattr__(self, "length", 32 if self.sizes.get("tp", 1) > 1 else ODD)

    @property
    def ranks(self) -> int:
        """The number of ranks."""
        return prod(size for name, size in self.sizes.items() if name != "ep")

    def __str__(self) -> str:
        sizes = "-".join(f"{name}{size}" for name, size in self.sizes.items())
        more = [self.mask, self.layout if self.layout != "zigzag" else "", f"zero{self.zero}" if self.zero != 3 else ""]
        more += [f"micro{self.micro_batches}" if self.micro_batches > 1 else "", "no_sync" if self.no_sync else ""]
        return "-".join(part for part in (sizes, *more) if part)


@dataclass(frozen=True)
class TrainingRun:
    """Loss and gradient norm of each step, and the final weights of a rank's model parts."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


def document_bounds(sequence: int, length: int) -> list[int]:
    """Returns the document bounds of a packed sequence; lengths differ from sequence to sequence."""
    return [0, 1 + sequence, 9 + sequence, 10 + sequence, length]


def batches(mask: str, length: int, vocab_size: int, steps: int) -> list[dict[str, Any]]:
    """Returns whole batches, the same on every rank. Some sequences have few valid labels, or none."""
    generator = torch.Generator().manual_seed(3)
    found: list[dict[str, Any]] = []
    for _ in range(steps):
        tokens = torch.randint(vocab_size, (SEQUENCES, length), generator=generator)
        labels = tokens.clone()
        labels[1, : length // 2] = IGNORED
        labels[2] = IGNORED
        batch: dict[str, Any] = {"input_ids": tokens}
        if mask == "packed":
            ends = [document_bounds(sequence, length) for sequence in range(SEQUENCES)]
            for sequence, starts in enumerate(ends):
                labels[sequence, starts[:-1]] = IGNORED  # no token predicts a document's first token
            batch["position_ids"] = torch.stack([_document_positions(starts) for starts in ends])
            batch["mask"] = [ringattn.documents(starts) & ringattn.sliding_window(WINDOW, right=0) for starts in ends]
        else:
            batch["mask"] = ringattn.causal() if mask == "causal" else ringattn.sliding_window(WINDOW, right=0)
        found.append({**batch, "labels": labels})
    return found


def make_model(config: DecoderConfig) -> Decoder:
    """Returns a decoder with the same weights on every rank."""
    torch.manual_seed(0)
    return Decoder(config, moe_factory=None if config.moe is None else make_moe).double()


@cache
def train_single_process(mask: str, length: int, config: DecoderConfig, steps: int) -> TrainingRun:
    """Trains in this process, with plain torch and dense attention."""
    model = make_model(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    return run_steps_single_process(model, optimizer, mask, batches(mask, length, config.vocab_size, steps))


def run_steps_single_process(
    model: Decoder, optimizer: torch.optim.Optimizer, mask: str, whole_batches: list[dict[str, Any]]
) -> TrainingRun:
    """Trains a given model over given batches, as `train_single_process`."""
    length = whole_batches[0]["input_ids"].shape[1]
    allowed = torch.stack([_dense_mask(mask, length, sequence) for sequence in range(SEQUENCES)])

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Masks) -> Tensor:
        return plain_attention(q, k, v, allowed)[0]

    losses, norms = [], []
    for batch in whole_batches:
        positions = batch.get("position_ids", torch.arange(length)[None])
        logits = model(batch["input_ids"], positions=positions, mask=None, attention_fn=attend)
        labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
        losses.append(float(loss.detach()))
    return TrainingRun(losses, norms, {name: p.detach() for name, p in model.named_parameters()})


def train_on_mesh(group: dist.ProcessGroup, setup: TrainingSetup, steps: int) -> TrainingRun:
    """Trains on a mesh of all ranks."""
    mesh = mesh_of(tuple(setup.sizes.items()))
    model = parallelize(make_model(setup.config), mesh, zero=setup.zero)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    build = next(case.build for case in LAYOUT_CASES if case.name == setup.layout)
    layout = build(setup.length, context_mesh(mesh).size())
    attend = make_cp_attention(mesh, layout)
    losses, norms = [], []
    for batch in batches(setup.mask, setup.length, setup.config.vocab_size, steps):
        part = local_batch(batch, mesh, layout)
        num_valid = count_valid(part["shift_labels"], mesh)
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        micro_batches = split_batch(part, setup.micro_batches)
        for index, micro in enumerate(micro_batches):
            logits = model(micro["input_ids"], positions=micro["position_ids"], mask=micro["mask"], attention_fn=attend)
            loss = cross_entropy(logits, micro["shift_labels"], num_valid, mesh)
            if setup.no_sync and index + 1 < len(micro_batches):
                with no_sync(model):
                    torch.autograd.backward(loss)
            else:
                torch.autograd.backward(loss)
            total += loss.detach()
        norms.append(float(clip_gradients(model.parameters(), mesh, MAX_NORM)))
        optimizer.step()
        losses.append(float(all_reduce_loss(total, mesh)))
    return TrainingRun(losses, norms, {name: full_tensor(p) for name, p in model.named_parameters()})


@lru_cache(maxsize=32)
def mesh_of(sizes: tuple[tuple[str, int], ...]) -> DeviceMesh:
    """Returns a cached mesh: groups outlive a test, so each rank creates each mesh once."""
    return build_mesh(**dict(sizes), device_type="cpu")


def split_batch(part: dict[str, Any], count: int) -> list[dict[str, Any]]:
    each = part["input_ids"].shape[0] // count
    rows = [slice(index * each, (index + 1) * each) for index in range(count)]

    def cut(value: Any, row: slice) -> Any:
        shared = isinstance(value, ringattn.Mask) or (isinstance(value, Tensor) and value.shape[0] == 1 < each * count)
        return value if shared else value[row]

    return [{name: cut(value, row) for name, value in part.items()} for row in rows]


def full_tensor(parameter: Tensor) -> Tensor:
    found: Tensor = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return found.detach()


def _document_positions(starts: list[int]) -> Tensor:
    """Returns the position of each token in its document."""
    at = torch.arange(starts[-1])
    first = torch.tensor(starts)
    return at - first[torch.searchsorted(first, at, right=True) - 1]


def _dense_mask(mask: str, length: int, sequence: int) -> Tensor:
    at = torch.arange(length)
    back = at[:, None] - at[None]
    allowed = back >= 0
    if mask != "causal":
        allowed &= back <= WINDOW
    if mask == "packed":
        document = torch.searchsorted(torch.tensor(document_bounds(sequence, length)), at, right=True)
        allowed &= document[:, None] == document[None]
    return allowed
