"""Paged decoding: attention of a few rows of each sequence to keys scattered over pages, split over the whole GPU.

The concatenated page tables of all sequences are cut into chunks of equal length, whatever the lengths of the
sequences. A program computes one chunk for one kv head and all rows that share the head: every new token times every
query head of the group. So each key is read once. A chunk may span several sequences; each gets a part of its own.
Chunk c's part of sequence b has number c + b. The numbers are distinct, since from one part to the next either the
chunk or the sequence advances. A second kernel merges the parts of each row into the state in this order: the same
inputs give the same bits.

Programs read lengths from `starts`, and the grid follows from shapes alone. So a captured CUDA graph may be replayed
after the tables change in place; entries from starts[B] on are ignored.

Source: flash-decoding, Dao et al. 2023; equal cuts of all work, as stream-K, Osama et al. 2023, arXiv:2301.03598.
"""

import triton
import triton.language as tl

from ringattn.kernels.paged.paged_contract import VisibleKeys
from ringattn.kernels.triton.args import HeadSlots, OnlineSoftmax, ScoreArgs, SlotRun
from ringattn.kernels.triton.forward_kernel import LN2, MIN_SCORE
from ringattn.kernels.triton.tile_io import LOG2E, apply_softcap, row_offsets, width_of

# Sequences per step of the search for an entry's sequence.
SEARCH = tl.constexpr(128)
MAX_ENTRIES = tl.constexpr(2147483647)


@triton.jit
def chunk_length(starts, sizes):
    """The entries of a chunk; the last chunks may have fewer."""
    num_entries = tl.load(starts + sizes.sequences) - tl.load(starts)
    return tl.maximum((num_entries + sizes.chunks - 1) // sizes.chunks, 1)


@triton.jit
def sequence_of(starts, sizes, entry):
    """The sequence of an entry: the number of sequences that end at or before it."""
    ended = 0
    for at in range(0, sizes.sequences, SEARCH):
        number = at + tl.arange(0, SEARCH)
        stops = tl.load(starts + 1 + number, mask=number < sizes.sequences, other=MAX_ENTRIES)
        ended += tl.sum((stops <= entry).to(tl.int32), 0)
    return ended


@triton.jit
def load_slots(head, page, slot, slot_mask, DIM: tl.constexpr):
    """Keys or values of one head in these slots of these pages; 0, without a read, outside `slot_mask`."""
    dims = tl.arange(0, width_of(DIM))[None, :]
    mask = slot_mask[:, None] if width_of(DIM) == DIM else slot_mask[:, None] & (dims < DIM)
    place = page * head.page + slot * head.slot
    return tl.load(head.pointer + place[:, None] + dims, mask=mask, other=0.0)


@triton.jit
def slot_is_visible(visible, position):
    """Whether positions are visible to each row, (rows, positions)."""
    return (position[None, :] >= visible.first[:, None]) & (position[None, :] < visible.stop[:, None])


@triton.jit
def attend_slots(
    q, keys, values, run, at, row_visible, token_visible, softmax, scores,
    DIM: tl.constexpr, V_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, over slots [at, at + BLOCK_N) of a run."""
    number = at + tl.arange(0, BLOCK_N)
    inside = number < run.count
    position = tl.load(run.slots + number, mask=inside, other=-1)
    # Slots that are visible to no row may hold anything: they are not read.
    slot_mask = tl.max(slot_is_visible(token_visible, position).to(tl.int32), 0) > 0
    page = tl.load(run.pages + number // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
    slot = (number % PAGE_SIZE).to(tl.int64)
    k = load_slots(keys, page, slot, slot_mask, DIM)
    x = apply_softcap(tl.dot(q, tl.trans(k), input_precision="ieee"), scores, q.dtype == tl.float32)
    x = tl.where(slot_is_visible(row_visible, position), x, float("-inf"))
    m_i = tl.maximum(softmax.m_i, tl.max(x, 1) * scores.factor)
    p = tl.exp2(x * scores.factor - m_i[:, None])
    alpha = tl.exp2(softmax.m_i - m_i)
    l_i = softmax.l_i * alpha + tl.sum(p, 1)
    v = load_slots(values, page, slot, slot_mask, V_DIM)
    acc = tl.dot(p.to(v.dtype), v, softmax.acc * alpha[:, None], input_precision="ieee")
    return OnlineSoftmax(acc, l_i, m_i)


@triton.jit
def paged_kernel(
    q, k, v, tables, visible, parts, sizes, scores,
    DIM: tl.constexpr, V_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per chunk, kv head, and block of rows; programs that read the same keys run side by side.

    The lse of a part is to base 2.
    """
    row_blocks = tl.cdiv(sizes.rows, BLOCK_M)
    row_block = tl.program_id(0) % row_blocks
    kv_head = (tl.program_id(0) // row_blocks % sizes.kv_heads).to(tl.int64)
    chunk = tl.program_id(0) // (row_blocks * sizes.kv_heads)

    starts = tables.starts
    length = chunk_length(starts, sizes)
    chunk_first = tl.load(starts) + chunk * length
    chunk_stop = tl.minimum(chunk_first + length, tl.load(starts + sizes.sequences))
    keys = HeadSlots(k.pointer + kv_head * k.head, k.page, k.slot)
    values = HeadSlots(v.pointer + kv_head * v.head, v.page, v.slot)
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < sizes.rows
    token, head = rows // sizes.group, kv_head * sizes.group + rows % sizes.group
    tokens = tl.arange(0, triton.next_power_of_2(TOKENS))
    dims, v_dims = tl.arange(0, width_of(DIM)), tl.arange(0, width_of(V_DIM))
    scores = ScoreArgs(scores.inner, scores.factor * LOG2E, scores.scale)
    # A chunk past the end has no sequence: `end` is then at most `begin`.
    begin = sequence_of(starts, sizes, chunk_first)
    end = sequence_of(starts, sizes, chunk_stop - 1) + 1
    for sequence in range(begin, end):
        b = tl.cast(sequence, tl.int64)
        first, stop = visible.first + b * TOKENS, visible.stop + b * TOKENS
        row_visible = VisibleKeys(
            tl.load(first + token, mask=row_mask, other=0), tl.load(stop + token, mask=row_mask, other=0)
        )
        token_visible = VisibleKeys(
            tl.load(first + tokens, mask=tokens < TOKENS, other=0),
            tl.load(stop + tokens, mask=tokens < TOKENS, other=0),
        )
        q_rows = q.pointer + b * q.batch + token * q.row + head * q.head
        q_block = tl.load(q_rows[:, None] + dims[None, :], mask=row_mask[:, None] & (dims < DIM)[None, :], other=0.0)

        entry = tl.maximum(chunk_first, tl.load(starts + sequence)).to(tl.int64)
        count = (tl.minimum(chunk_stop, tl.load(starts + sequence + 1)) - entry).to(tl.int32) * PAGE_SIZE
        run = SlotRun(tables.pages + entry, tables.slots + entry * PAGE_SIZE, count)
        acc = tl.zeros([BLOCK_M, width_of(V_DIM)], tl.float32)
        softmax = OnlineSoftmax(acc, tl.zeros([BLOCK_M], tl.float32), tl.full([BLOCK_M], MIN_SCORE, tl.float32))
        for at in range(0, count, BLOCK_N):
            softmax = attend_slots(
                q_block, keys, values, run, at, row_visible, token_visible, softmax, scores,
                DIM, V_DIM, PAGE_SIZE, BLOCK_N,
            )  # fmt: skip
        part = ((chunk + b) * sizes.kv_heads + kv_head) * sizes.rows + rows
        tl.store(parts.lse + part, softmax.m_i + tl.log2(softmax.l_i), mask=row_mask)
        mean = softmax.acc / tl.where(softmax.l_i == 0.0, 1.0, softmax.l_i)[:, None]
        inside = row_mask[:, None] & (v_dims < V_DIM)[None, :]
        tl.store(parts.out + part[:, None] * V_DIM + v_dims[None, :], mean, mask=inside)


@triton.jit
def combine_kernel(parts, starts, out, lse, sizes, V_DIM: tl.constexpr, PARTS: tl.constexpr):
    """One program per row of the state: merges the parts of the row in the order of chunks."""
    program = tl.program_id(0).to(tl.int64)
    row, kv_head = program % sizes.rows, program // sizes.rows % sizes.kv_heads
    b = program // sizes.rows // sizes.kv_heads
    token, head = row // sizes.group, kv_head * sizes.group + row % sizes.group
    dims = tl.arange(0, width_of(V_DIM))
    inside = dims < V_DIM
    out_pointers = out.pointer + row_offsets(out, b, token, head) + dims
    lse_pointers = lse.pointer + row_offsets(lse, b, token, head)

    length = chunk_length(starts, sizes)
    origin = tl.load(starts)
    first, stop = tl.load(starts + b) - origin, tl.load(starts + b + 1) - origin
    begin = first // length
    count = tl.where(first < stop, (stop - 1) // length - begin + 1, 0)
    old_lse = tl.load(lse_pointers)
    old_m, old_l = tl.maximum(old_lse * LOG2E, MIN_SCORE), tl.where(old_lse == float("-inf"), 0.0, 1.0)
    acc, l_i, m_i = tl.load(out_pointers, mask=inside, other=0.0), old_l, old_m
    for at in range(0, count, PARTS):
        number = at + tl.arange(0, PARTS)
        part = ((begin + b + number) * sizes.kv_heads + kv_head) * sizes.rows + row
        part_lse = tl.load(parts.lse + part, mask=number < count, other=float("-inf"))
        new_m = tl.maximum(m_i, tl.max(part_lse, 0))
        weight, alpha = tl.exp2(part_lse - new_m), tl.exp2(m_i - new_m)
        mask = (number < count)[:, None] & inside[None, :]
        rows = tl.load(parts.out + part[:, None] * V_DIM + dims[None, :], mask=mask, other=0.0)
        acc = acc * alpha + tl.sum(rows * weight[:, None], 0)
        l_i, m_i = l_i * alpha + tl.sum(weight, 0), new_m
    # A row without keys keeps its lse, which would be rounded; its out does not change.
    changed = (l_i != old_l) | (m_i != old_m)
    l_i = tl.where(l_i == 0.0, 1.0, l_i)
    tl.store(lse_pointers, (m_i + tl.log2(l_i)) * LN2, mask=changed)
    tl.store(out_pointers, acc / l_i, mask=inside)
