"""Paged decoding: attention of a few rows of each sequence to keys scattered over pages, split over the whole GPU.

The entries of all sequences' page tables, one after the other, are cut into chunks of equal length, whatever the
lengths of the sequences. A program takes one chunk for one kv head, and all rows that share this head: every new
token's, and every query head's of the group. So each key is read once. A chunk may hold the end of one sequence and
the beginning of others; what it finds of each is a part of its own. Chunk c's part of sequence b has number c + b:
from one part to the next the chunk or the sequence goes up, so no number comes twice. A second kernel merges the parts
of each row, in order, into the state: the same inputs give the same bits.

Lengths are read from `starts` by the programs. The grid follows from shapes alone, so a captured CUDA graph goes on
being right while its tables change; entries from starts[B] on are not looked at.

Source: flash-decoding, Dao et al. 2023; equal cuts of all work, as stream-K, Osama et al. 2023, arXiv:2301.03598.
"""

import triton
import triton.language as tl

from ringattn.kernels.paged.paged_contract import VisibleKeys
from ringattn.kernels.triton.args import HeadSlots, OnlineSoftmax, ScoreArgs, SlotRun
from ringattn.kernels.triton.forward_kernel import LEAST, LN2
from ringattn.kernels.triton.tile_io import LOG2E, capped, offsets, width_of

# Sequences that are looked at together when a program finds its first one.
SEARCH = tl.constexpr(128)
MOST_ENTRIES = tl.constexpr(2147483647)


@triton.jit
def chunk_length(starts, counts):
    """How many entries a chunk has; the last ones may have fewer."""
    num_entries = tl.load(starts + counts.sequences) - tl.load(starts)
    return tl.maximum((num_entries + counts.chunks - 1) // counts.chunks, 1)


@triton.jit
def sequence_of(starts, counts, entry):
    """Which sequence an entry belongs to: as many end at it or before."""
    found = 0
    for at in range(0, counts.sequences, SEARCH):
        number = at + tl.arange(0, SEARCH)
        stops = tl.load(starts + 1 + number, mask=number < counts.sequences, other=MOST_ENTRIES)
        found += tl.sum((stops <= entry).to(tl.int32), 0)
    return found


@triton.jit
def load_slots(head, page, slot, some, DIM: tl.constexpr):
    """Keys or values of one head in these slots of these pages; 0 where not `some`, which is not read."""
    dims = tl.arange(0, width_of(DIM))[None, :]
    mask = some[:, None] if width_of(DIM) == DIM else some[:, None] & (dims < DIM)
    place = page * head.page + slot * head.slot
    return tl.load(head.pointer + place[:, None] + dims, mask=mask, other=0.0)


@triton.jit
def sees(sight, position):
    """Which positions each row sees, (rows, positions)."""
    return (position[None, :] >= sight.first[:, None]) & (position[None, :] < sight.stop[:, None])


@triton.jit
def attend_slots(
    q, keys, values, run, at, by_row, by_token, softmax, scores,
    DIM: tl.constexpr, V_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, over slots [at, at + BLOCK_N) of a run."""
    number = at + tl.arange(0, BLOCK_N)
    inside = number < run.count
    position = tl.load(run.slots + number, mask=inside, other=-1)
    # What no row sees may hold anything: it is not read.
    some = tl.max(sees(by_token, position).to(tl.int32), 0) > 0
    page = tl.load(run.pages + number // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
    slot = (number % PAGE_SIZE).to(tl.int64)
    k = load_slots(keys, page, slot, some, DIM)
    x = capped(tl.dot(q, tl.trans(k), input_precision="ieee"), scores, q.dtype == tl.float32)
    x = tl.where(sees(by_row, position), x, float("-inf"))
    most = tl.maximum(softmax.most, tl.max(x, 1) * scores.factor)
    p = tl.exp2(x * scores.factor - most[:, None])
    decay = tl.exp2(softmax.most - most)
    total = softmax.total * decay + tl.sum(p, 1)
    v = load_slots(values, page, slot, some, V_DIM)
    acc = tl.dot(p.to(v.dtype), v, softmax.acc * decay[:, None], input_precision="ieee")
    return OnlineSoftmax(acc, total, most)


@triton.jit
def paged_kernel(
    q, k, v, tables, sight, parts, counts, scores,
    DIM: tl.constexpr, V_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program for each chunk, kv head, and block of rows: programs that read the same keys run side by side.

    A part's lse is to base 2.
    """
    row_blocks = tl.cdiv(counts.rows, BLOCK_M)
    row_block = tl.program_id(0) % row_blocks
    kv_head = (tl.program_id(0) // row_blocks % counts.kv_heads).to(tl.int64)
    chunk = tl.program_id(0) // (row_blocks * counts.kv_heads)

    starts = tables.starts
    length = chunk_length(starts, counts)
    chunk_first = tl.load(starts) + chunk * length
    chunk_stop = tl.minimum(chunk_first + length, tl.load(starts + counts.sequences))
    keys = HeadSlots(k.pointer + kv_head * k.head, k.page, k.slot)
    values = HeadSlots(v.pointer + kv_head * v.head, v.page, v.slot)
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    here = rows < counts.rows
    token, head = rows // counts.group, kv_head * counts.group + rows % counts.group
    tokens = tl.arange(0, triton.next_power_of_2(TOKENS))
    dims, v_dims = tl.arange(0, width_of(DIM)), tl.arange(0, width_of(V_DIM))
    scores = ScoreArgs(scores.inner, scores.factor * LOG2E, scores.scale)
    # A chunk past the end has no sequence: its last one is before its first.
    begin = sequence_of(starts, counts, chunk_first)
    end = sequence_of(starts, counts, chunk_stop - 1) + 1
    for sequence in range(begin, end):
        b = tl.cast(sequence, tl.int64)
        first, stop = sight.first + b * TOKENS, sight.stop + b * TOKENS
        by_row = VisibleKeys(tl.load(first + token, mask=here, other=0), tl.load(stop + token, mask=here, other=0))
        by_token = VisibleKeys(
            tl.load(first + tokens, mask=tokens < TOKENS, other=0),
            tl.load(stop + tokens, mask=tokens < TOKENS, other=0),
        )
        q_rows = q.pointer + b * q.batch + token * q.row + head * q.head
        q_block = tl.load(q_rows[:, None] + dims[None, :], mask=here[:, None] & (dims < DIM)[None, :], other=0.0)

        entry = tl.maximum(chunk_first, tl.load(starts + sequence)).to(tl.int64)
        count = (tl.minimum(chunk_stop, tl.load(starts + sequence + 1)) - entry).to(tl.int32) * PAGE_SIZE
        run = SlotRun(tables.pages + entry, tables.slots + entry * PAGE_SIZE, count)
        acc = tl.zeros([BLOCK_M, width_of(V_DIM)], tl.float32)
        softmax = OnlineSoftmax(acc, tl.zeros([BLOCK_M], tl.float32), tl.full([BLOCK_M], LEAST, tl.float32))
        for at in range(0, count, BLOCK_N):
            softmax = attend_slots(
                q_block, keys, values, run, at, by_row, by_token, softmax, scores, DIM, V_DIM, PAGE_SIZE, BLOCK_N
            )  # fmt: skip
        part = ((chunk + b) * counts.kv_heads + kv_head) * counts.rows + rows
        tl.store(parts.lse + part, softmax.most + tl.log2(softmax.total), mask=here)
        mean = softmax.acc / tl.where(softmax.total == 0.0, 1.0, softmax.total)[:, None]
        inside = here[:, None] & (v_dims < V_DIM)[None, :]
        tl.store(parts.out + part[:, None] * V_DIM + v_dims[None, :], mean, mask=inside)


@triton.jit
def combine_kernel(parts, starts, out, lse, counts, V_DIM: tl.constexpr, PARTS: tl.constexpr):
    """A program for each row of the state: merges the row's parts into it, in the order of chunks."""
    program = tl.program_id(0).to(tl.int64)
    row, kv_head = program % counts.rows, program // counts.rows % counts.kv_heads
    b = program // counts.rows // counts.kv_heads
    token, head = row // counts.group, kv_head * counts.group + row % counts.group
    dims = tl.arange(0, width_of(V_DIM))
    inside = dims < V_DIM
    out_here = out.pointer + offsets(out, b, token, head) + dims
    lse_here = lse.pointer + offsets(lse, b, token, head)

    length = chunk_length(starts, counts)
    origin = tl.load(starts)
    first, stop = tl.load(starts + b) - origin, tl.load(starts + b + 1) - origin
    begin = first // length
    count = tl.where(first < stop, (stop - 1) // length - begin + 1, 0)
    old_lse = tl.load(lse_here)
    old_most, old_total = tl.maximum(old_lse * LOG2E, LEAST), tl.where(old_lse == float("-inf"), 0.0, 1.0)
    acc, total, most = tl.load(out_here, mask=inside, other=0.0), old_total, old_most
    for at in range(0, count, PARTS):
        number = at + tl.arange(0, PARTS)
        part = ((begin + b + number) * counts.kv_heads + kv_head) * counts.rows + row
        found = tl.load(parts.lse + part, mask=number < count, other=float("-inf"))
        new_most = tl.maximum(most, tl.max(found, 0))
        weight, decay = tl.exp2(found - new_most), tl.exp2(most - new_most)
        mask = (number < count)[:, None] & inside[None, :]
        rows = tl.load(parts.out + part[:, None] * V_DIM + dims[None, :], mask=mask, other=0.0)
        acc = acc * decay + tl.sum(rows * weight[:, None], 0)
        total, most = total * decay + tl.sum(weight, 0), new_most
    # A row that found nothing stays as it is: its lse would be rounded, its out is what it was.
    changed = (total != old_total) | (most != old_most)
    total = tl.where(total == 0.0, 1.0, total)
    tl.store(lse_here, (most + tl.log2(total)) * LN2, mask=changed)
    tl.store(out_here, acc / total, mask=inside)
