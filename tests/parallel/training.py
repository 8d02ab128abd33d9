"""A few steps of training, on a mesh of ranks and in one process that knows nothing of the package's attention.

Both start from the same weights and batches, in float64. What is compared: the losses, the norms of the gradients, and
the weights at the end.
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
from ringattn.parallel.context_parallel import local_batch, make_cp_attention
from ringattn.parallel.data_parallel import no_sync
from ringattn.parallel.decoder import Decoder, DecoderConfig
from ringattn.parallel.expert_parallel import make_moe
from ringattn.parallel.grad_norm import clip_gradients
from ringattn.parallel.mesh import build_mesh, context_mesh
from ringattn.parallel.parallelize_decoder import parallelize
from ringattn.parallel.vocab_parallel_loss import count_valid, cross_entropy, sum_over_token_ranks
from ringattn.types import Masks
from tests.harness.cases import LAYOUT_CASES
from tests.harness.oracle import plain_attention

CONFIG = DecoderConfig(vocab_size=36, num_layers=2, dim=32, num_heads=8, num_kv_heads=4, hidden=24)
LEARNING_RATE = 1e-2
MAX_NORM = 0.2  # below the norms that there are, so that clipping shows
SEQUENCES = 8
WINDOW = 5
ODD = 37  # where no axis needs equal rows
IGNORED = -100


@dataclass(frozen=True)
class Mix:
    """One way to spread training over ranks.

    `mask` is "causal", "window", or "packed": documents of other lengths in each sequence, and a window within them.
    """

    sizes: Mapping[str, int]
    mask: str = "causal"
    layout: str = "zigzag"
    length: int = 0  # tokens in a sequence; 0 is ODD, or what tp can split
    zero: int = 3
    micro_batches: int = 1
    hold: bool = False
    config: DecoderConfig = CONFIG

    def __post_init__(self) -> None:
        if not self.length:
            object.__setattr__(self, "length", 32 if self.sizes.get("tp", 1) > 1 else ODD)

    @property
    def ranks(self) -> int:
        """How many ranks it takes."""
        return prod(size for name, size in self.sizes.items() if name != "ep")

    def __str__(self) -> str:
        sizes = "-".join(f"{name}{size}" for name, size in self.sizes.items())
        more = [self.mask, self.layout if self.layout != "zigzag" else "", f"zero{self.zero}" if self.zero != 3 else ""]
        more += [f"micro{self.micro_batches}" if self.micro_batches > 1 else "", "held" if self.hold else ""]
        return "-".join(part for part in (sizes, *more) if part)


@dataclass(frozen=True)
class Trained:
    """What a run showed: of each step the loss and the gradients' norm; in the end the weights that a rank has."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


def ends_of(sequence: int, length: int) -> list[int]:
    """Where the documents of a packed sequence begin, and the end; lengths differ from sequence to sequence."""
    return [0, 1 + sequence, 9 + sequence, 10 + sequence, length]


def batches(mask: str, length: int, vocab_size: int, steps: int) -> list[dict[str, Any]]:
    """Whole batches, the same everywhere. Some sequences have few valid labels, or none."""
    generator = torch.Generator().manual_seed(3)
    found: list[dict[str, Any]] = []
    for _ in range(steps):
        tokens = torch.randint(vocab_size, (SEQUENCES, length), generator=generator)
        labels = tokens.clone()
        labels[1, : length // 2] = IGNORED
        labels[2] = IGNORED
        batch: dict[str, Any] = {"input_ids": tokens}
        if mask == "packed":
            ends = [ends_of(sequence, length) for sequence in range(SEQUENCES)]
            for sequence, starts in enumerate(ends):
                labels[sequence, starts[:-1]] = IGNORED  # a document's first token is predicted by none
            batch["position_ids"] = torch.stack([_within(starts) for starts in ends])
            batch["mask"] = [ringattn.documents(starts) & ringattn.sliding_window(WINDOW, right=0) for starts in ends]
        else:
            batch["mask"] = ringattn.causal() if mask == "causal" else ringattn.sliding_window(WINDOW, right=0)
        found.append({**batch, "labels": labels})
    return found


def make_model(config: DecoderConfig) -> Decoder:
    """The same weights everywhere."""
    torch.manual_seed(0)
    return Decoder(config, moe=None if config.moe is None else make_moe).double()


@cache
def train_alone(mask: str, length: int, config: DecoderConfig, steps: int) -> Trained:
    """Trains in this process, by the definition of attention, and plain torch."""
    model = make_model(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    return steps_alone(model, optimizer, mask, batches(mask, length, config.vocab_size, steps))


def steps_alone(
    model: Decoder, optimizer: torch.optim.Optimizer, mask: str, whole_batches: list[dict[str, Any]]
) -> Trained:
    """Some steps of that."""
    length = whole_batches[0]["input_ids"].shape[1]
    allowed = torch.stack([_allowed(mask, length, sequence) for sequence in range(SEQUENCES)])

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Masks) -> Tensor:
        return plain_attention(q, k, v, allowed)[0]

    losses, norms = [], []
    for batch in whole_batches:
        positions = batch.get("position_ids", torch.arange(length)[None])
        logits = model(batch["input_ids"], positions=positions, mask=None, attend=attend)
        labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
        losses.append(float(loss.detach()))
    return Trained(losses, norms, {name: p.detach() for name, p in model.named_parameters()})


def train_together(group: dist.ProcessGroup, mix: Mix, steps: int) -> Trained:
    """Trains on a mesh of all ranks."""
    mesh = mesh_of(tuple(mix.sizes.items()))
    model = parallelize(make_model(mix.config), mesh, zero=mix.zero)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    build = next(case.build for case in LAYOUT_CASES if case.name == mix.layout)
    layout = build(mix.length, context_mesh(mesh).size())
    attend = make_cp_attention(mesh, layout)
    losses, norms = [], []
    for batch in batches(mix.mask, mix.length, mix.config.vocab_size, steps):
        share = local_batch(batch, mesh, layout)
        num_valid = count_valid(share["shift_labels"], mesh)
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        micro_batches = cut_share(share, mix.micro_batches)
        for index, micro in enumerate(micro_batches):
            logits = model(micro["input_ids"], positions=micro["position_ids"], mask=micro["mask"], attend=attend)
            loss = cross_entropy(logits, micro["shift_labels"], num_valid, mesh)
            if mix.hold and index + 1 < len(micro_batches):
                with no_sync(model):
                    torch.autograd.backward(loss)
            else:
                torch.autograd.backward(loss)
            total += loss.detach()
        norms.append(float(clip_gradients(model.parameters(), mesh, MAX_NORM)))
        optimizer.step()
        losses.append(float(sum_over_token_ranks(total, mesh)))
    return Trained(losses, norms, {name: whole(p) for name, p in model.named_parameters()})


@lru_cache(maxsize=32)
def mesh_of(sizes: tuple[tuple[str, int], ...]) -> DeviceMesh:
    """Groups outlive a test; so each mesh is made once in each rank."""
    return build_mesh(**dict(sizes), device_type="cpu")


def cut_share(share: dict[str, Any], count: int) -> list[dict[str, Any]]:
    each = share["input_ids"].shape[0] // count
    rows = [slice(index * each, (index + 1) * each) for index in range(count)]

    def cut(value: Any, row: slice) -> Any:
        shared = isinstance(value, ringattn.Mask) or (isinstance(value, Tensor) and value.shape[0] == 1 < each * count)
        return value if shared else value[row]

    return [{name: cut(value, row) for name, value in share.items()} for row in rows]


def whole(parameter: Tensor) -> Tensor:
    found: Tensor = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return found.detach()


def _within(starts: list[int]) -> Tensor:
    """The position of each token in its document."""
    at = torch.arange(starts[-1])
    first = torch.tensor(starts)
    return at - first[torch.searchsorted(first, at, right=True) - 1]


def _allowed(mask: str, length: int, sequence: int) -> Tensor:
    at = torch.arange(length)
    back = at[:, None] - at[None]
    allowed = back >= 0
    if mask != "causal":
        allowed &= back <= WINDOW
    if mask == "packed":
        document = torch.searchsorted(torch.tensor(ends_of(sequence, length)), at, right=True)
        allowed &= document[:, None] == document[None]
    return allowed
