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

from ringattn.kernels.triton.blocks import LOG2E, tanh
from ringattn.kernels.triton.forward import LEAST, LN2

# Sequences that are looked at together when a program finds its first one.
SEARCH = tl.constexpr(128)
MOST_ENTRIES = tl.constexpr(2147483647)


@triton.jit
def chunk_length(starts, num_sequences, num_chunks):
    """How many entries a chunk has; the last ones may have fewer."""
    num_entries = tl.load(starts + num_sequences) - tl.load(starts)
    return tl.maximum((num_entries + num_chunks - 1) // num_chunks, 1)


@triton.jit
def sequence_of(starts, num_sequences, entry):
    """Which sequence an entry belongs to: as many end at it or before."""
    found = 0
    for at in range(0, num_sequences, SEARCH):
        number = at + tl.arange(0, SEARCH)
        stops = tl.load(starts + 1 + number, mask=number < num_sequences, other=MOST_ENTRIES)
        found += tl.sum((stops <= entry).to(tl.int32), 0)
    return found


@triton.jit
def load_paged(base, rows, some, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Keys or values of these rows, (BLOCK_N, WIDTH): `rows` are offsets; 0 where not `some`, which is not read."""
    dims = tl.arange(0, WIDTH)[None, :]
    mask = some[:, None] if DIM == WIDTH else some[:, None] & (dims < DIM)
    return tl.load(base + rows[:, None] + dims, mask=mask, other=0.0)


@triton.jit
def attend_slots(
    q, k, v, pages, slots, at, count, row_first, row_stop, token_first, token_stop, acc, total, most, inner, factor,
    k_page, k_slot, v_page, v_slot,
    DIM: tl.constexpr, V_DIM: tl.constexpr, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, over slots [at, at + BLOCK_N) of a run of `count`."""
    number = at + tl.arange(0, BLOCK_N)
    inside = number < count
    position = tl.load(slots + number, mask=inside, other=-1)
    # What no row sees may hold anything: it is not read.
    sees = (position[None, :] >= token_first[:, None]) & (position[None, :] < token_stop[:, None])
    some = tl.max(sees.to(tl.int32), 0) > 0
    page = tl.load(pages + number // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
    slot = (number % PAGE_SIZE).to(tl.int64)
    keys = load_paged(k, page * k_page + slot * k_slot, some, DIM, WIDTH)
    x = tl.dot(q, tl.trans(keys), input_precision="ieee")
    if CAPPED:
        x = tanh(x * inner, q.dtype == tl.float32)
    seen = (position[None, :] >= row_first[:, None]) & (position[None, :] < row_stop[:, None])
    x = tl.where(seen, x, float("-inf"))
    new_most = tl.maximum(most, tl.max(x, 1) * factor)
    p = tl.exp2(x * factor - new_most[:, None])
    decay = tl.exp2(most - new_most)
    total = total * decay + tl.sum(p, 1)
    values = load_paged(v, page * v_page + slot * v_slot, some, V_DIM, V_WIDTH)
    acc = tl.dot(p.to(values.dtype), values, acc * decay[:, None], input_precision="ieee")
    return acc, total, new_most


@triton.jit
def paged_kernel(
    q, k, v, pages, slots, starts, first, stop, part_out, part_lse,
    q_batch, q_token, q_head, k_page, k_slot, k_head, v_page, v_slot, v_head,
    num_sequences, num_chunks, kv_heads, group, num_rows, inner, factor,
    DIM: tl.constexpr, V_DIM: tl.constexpr, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    PAGE_SIZE: tl.constexpr, TOKENS: tl.constexpr, TOKENS_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """A program for each chunk, kv head, and block of rows: programs that read the same keys run side by side.

    `inner` and `factor`: see launch.Scores. A part's lse is to base 2.
    """
    row_blocks = tl.cdiv(num_rows, BLOCK_M)
    row_block = tl.program_id(0) % row_blocks
    kv_head = (tl.program_id(0) // row_blocks % kv_heads).to(tl.int64)
    chunk = tl.program_id(0) // (row_blocks * kv_heads)

    length = chunk_length(starts, num_sequences, num_chunks)
    chunk_first = tl.load(starts) + chunk * length
    chunk_stop = tl.minimum(chunk_first + length, tl.load(starts + num_sequences))
    k += kv_head * k_head
    v += kv_head * v_head
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    here = rows < num_rows
    token, head = rows // group, kv_head * group + rows % group
    tokens = tl.arange(0, TOKENS_WIDTH)
    dims, v_dims = tl.arange(0, WIDTH), tl.arange(0, V_WIDTH)
    # A chunk past the end has no sequence: its last one is before its first.
    begin = sequence_of(starts, num_sequences, chunk_first)
    end = sequence_of(starts, num_sequences, chunk_stop - 1) + 1
    for sequence in range(begin, end):
        b = tl.cast(sequence, tl.int64)
        sight = b * TOKENS
        row_first = tl.load(first + sight + token, mask=here, other=0)
        row_stop = tl.load(stop + sight + token, mask=here, other=0)
        token_first = tl.load(first + sight + tokens, mask=tokens < TOKENS, other=0)
        token_stop = tl.load(stop + sight + tokens, mask=tokens < TOKENS, other=0)
        q_rows = q + b * q_batch + token * q_token + head * q_head
        q_block = tl.load(q_rows[:, None] + dims[None, :], mask=here[:, None] & (dims < DIM)[None, :], other=0.0)

        entry = tl.maximum(chunk_first, tl.load(starts + sequence)).to(tl.int64)
        count = (tl.minimum(chunk_stop, tl.load(starts + sequence + 1)) - entry).to(tl.int32) * PAGE_SIZE
        acc = tl.zeros([BLOCK_M, V_WIDTH], tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        most = tl.full([BLOCK_M], LEAST, tl.float32)
        for at in range(0, count, BLOCK_N):
            acc, total, most = attend_slots(
                q_block, k, v, pages + entry, slots + entry * PAGE_SIZE, at, count,
                row_first, row_stop, token_first, token_stop, acc, total, most, inner, factor * LOG2E,
                k_page, k_slot, v_page, v_slot,
                DIM, V_DIM, WIDTH, V_WIDTH, PAGE_SIZE, BLOCK_N, CAPPED,
            )  # fmt: skip
        part = ((chunk + b) * kv_heads + kv_head) * num_rows + rows
        tl.store(part_lse + part, most + tl.log2(total), mask=here)
        mean = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        inside = here[:, None] & (v_dims < V_DIM)[None, :]
        tl.store(part_out + part[:, None] * V_DIM + v_dims[None, :], mean, mask=inside)


@triton.jit
def combine_kernel(
    part_out, part_lse, starts, out, lse,
    out_batch, out_token, out_head, lse_batch, lse_head, lse_token,
    num_sequences, num_chunks, kv_heads, group, num_rows,
    V_DIM: tl.constexpr, V_WIDTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A program for each row of the state: merges the row's parts into it, in the order of chunks."""
    program = tl.program_id(0).to(tl.int64)
    row, kv_head, b = program % num_rows, program // num_rows % kv_heads, program // num_rows // kv_heads
    token, head = row // group, kv_head * group + row % group
    dims = tl.arange(0, V_WIDTH)
    inside = dims < V_DIM
    out += b * out_batch + token * out_token + head * out_head
    lse += b * lse_batch + head * lse_head + token * lse_token

    length = chunk_length(starts, num_sequences, num_chunks)
    origin = tl.load(starts)
    first, stop = tl.load(starts + b) - origin, tl.load(starts + b + 1) - origin
    begin = first // length
    count = tl.where(first < stop, (stop - 1) // length - begin + 1, 0)
    old_lse = tl.load(lse)
    old_most, old_total = tl.maximum(old_lse * LOG2E, LEAST), tl.where(old_lse == float("-inf"), 0.0, 1.0)
    acc, total, most = tl.load(out + dims, mask=inside, other=0.0), old_total, old_most
    for at in range(0, count, PARTS):
        number = at + tl.arange(0, PARTS)
        part = ((begin + b + number) * kv_heads + kv_head) * num_rows + row
        found = tl.load(part_lse + part, mask=number < count, other=float("-inf"))
        new_most = tl.maximum(most, tl.max(found, 0))
        weight, decay = tl.exp2(found - new_most), tl.exp2(most - new_most)
        mask = (number < count)[:, None] & inside[None, :]
        rows = tl.load(part_out + part[:, None] * V_DIM + dims[None, :], mask=mask, other=0.0)
        acc = acc * decay + tl.sum(rows * weight[:, None], 0)
        total, most = total * decay + tl.sum(weight, 0), new_most
    # A row that found nothing stays as it is: its lse would be rounded, its out is what it was.
    changed = (total != old_total) | (most != old_most)
    total = tl.where(total == 0.0, 1.0, total)
    tl.store(lse, (most + tl.log2(total)) * LN2, mask=changed)
    tl.store(out + dims, acc / total, mask=inside)
