"""Device functions of the forward and backward kernels: work items, loads and stores of rows, masks, softcapping.

The *own* side is the one whose block a program owns, the *other* side the one that it loops over. Row numbers have 32
bits; factors of a stride are widened to 64 bits first.
"""

import triton
import triton.language as tl

from ringattn.kernels.triton.args import HeadRows, RowRange
from ringattn.kernels.triton.configs import padded_dim

# The width in which a head dim is computed.
width_of = triton.constexpr_function(padded_dim)

LOG2E = tl.constexpr(1.4426950408889634)
ITEM_COLUMNS = tl.constexpr(5)
RUN_COLUMNS = tl.constexpr(6)


@triton.jit
def locate_item(work):
    """A pointer to this program's item, and its head.

    Sections of heads follow one another; within a section, items follow the order of the list, heads innermost.
    """
    number = tl.program_id(0)
    num_items = tl.num_programs(0) // work.num_heads
    head = number // (num_items * work.section) * work.section
    width = tl.minimum(work.section, work.num_heads - head)
    number -= num_items * head
    return work.items + (number // width) * ITEM_COLUMNS, head + number % width


@triton.jit
def load_item(work):
    """(batch row, head, first own row, first full run, first edge run, end of the runs) of this program."""
    item, head = locate_item(work)
    batch = tl.load(item).to(tl.int64)
    return batch, head.to(tl.int64), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3), tl.load(item + 4)


@triton.jit
def reload_first_row(work):
    """The first own row of this program, read from memory again."""
    item, _ = locate_item(work)
    return tl.load(item + 1, volatile=True)


@triton.jit
def load_run(work, number):
    """The first row of a run of the other side, and the row behind its last."""
    run = work.runs + number * RUN_COLUMNS
    return tl.load(run), tl.load(run + 1)


@triton.jit
def visible_in_run(work, number, own):
    """The rows of an edge run that are visible to each own row."""
    run = work.runs + number * RUN_COLUMNS
    start, stop = tl.load(run), tl.load(run + 1)
    lo, hi = tl.load(run + 2), tl.load(run + 3)
    inside = (own >= tl.load(run + 4)) & (own < tl.load(run + 5))
    return RowRange(tl.maximum(own + lo, start), tl.where(inside, tl.minimum(own + hi, stop - 1), -1))


@triton.jit
def select_head(x, batch, head):
    """The rows of one head."""
    return HeadRows(x.pointer + batch * x.batch + head * x.head, x.row)


@triton.jit
def row_offsets(x, batch, row, head):
    """The offsets of rows from a tensor's address."""
    return batch * x.batch + row * x.row + head * x.head


@triton.jit
def row_pointers(rows, first, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers to rows [first, first + SIZE), (SIZE, WIDTH). Terms without `first` form a sum of their own."""
    within = tl.arange(0, SIZE).to(tl.int64)[:, None] * rows.stride + tl.arange(0, WIDTH)[None, :]
    return rows.pointer + tl.cast(first, tl.int64) * rows.stride + within


@triton.jit
def entry_pointers(rows, first, SIZE: tl.constexpr):
    """Pointers to the entries of rows [first, first + SIZE), one number per row."""
    return rows.pointer + tl.cast(first, tl.int64) * rows.stride + tl.arange(0, SIZE).to(tl.int64) * rows.stride


@triton.jit
def load_rows(rows, first, stop, SIZE: tl.constexpr, DIM: tl.constexpr, CUT: tl.constexpr):
    """Rows [first, first + SIZE), (SIZE, width); 0 from column DIM on and, if CUT, from row `stop` on."""
    WIDTH: tl.constexpr = width_of(DIM)
    pointers = row_pointers(rows, first, SIZE, WIDTH)
    row_mask = (first + tl.arange(0, SIZE) < stop)[:, None]
    dims = (tl.arange(0, WIDTH) < DIM)[None, :]
    if DIM == WIDTH:
        if CUT:
            block = tl.load(pointers, mask=row_mask, other=0.0)
        else:
            block = tl.load(pointers)
    else:
        if CUT:
            block = tl.load(pointers, mask=row_mask & dims, other=0.0)
        else:
            block = tl.load(pointers, mask=dims, other=0.0)
    return block


@triton.jit
def load_step(source, first, stop, SIZE: tl.constexpr, DIM: tl.constexpr, CUT: tl.constexpr):
    """Rows [first, first + SIZE) of a source, as `load_rows`.

    Whole steps are loaded through the descriptor if there is one: the hardware computes the addresses. At an edge,
    rows from `stop` on must not be read, so pointers and a mask are used.
    """
    if source.descriptor is not None and not CUT:
        place = [tl.cast(source.batch, tl.int32), first, tl.cast(source.head, tl.int32), 0]
        block = source.descriptor.load(place).reshape([SIZE, width_of(DIM)])
    else:
        block = load_rows(source.rows, first, stop, SIZE, DIM, CUT)
    return block


@triton.jit
def store_rows(rows, first, stop, block, SIZE: tl.constexpr, DIM: tl.constexpr):
    """Writes rows [first, stop) to memory."""
    WIDTH: tl.constexpr = width_of(DIM)
    mask = (first + tl.arange(0, SIZE) < stop)[:, None] & (tl.arange(0, WIDTH) < DIM)[None, :]
    tl.store(row_pointers(rows, first, SIZE, WIDTH), block, mask=mask)


@triton.jit
def add_rows(rows, first, stop, block, SIZE: tl.constexpr, DIM: tl.constexpr):
    """Adds to rows [first, stop) in memory."""
    WIDTH: tl.constexpr = width_of(DIM)
    pointers = row_pointers(rows, first, SIZE, WIDTH)
    mask = (first + tl.arange(0, SIZE) < stop)[:, None] & (tl.arange(0, WIDTH) < DIM)[None, :]
    tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + block, mask=mask)


@triton.jit
def is_visible(at, visible):
    """Whether rows `at` of the other side, (1, other), are visible to each own row: (own, other)."""
    return (at >= visible.first[:, None]) & (at <= visible.last[:, None])


@triton.jit
def apply_softcap(x, scores, EXACT: tl.constexpr):
    """Scores without their factor, of products q·k; EXACT as in `tanh`."""
    if scores.inner is not None:
        x = tanh(x * scores.inner, EXACT)
    return x


@triton.jit
def tanh(x, EXACT: tl.constexpr):
    """Hyperbolic tangent. Unless EXACT, the absolute error is an ulp of 1, also where the value is small."""
    e = tl.exp2(-2.8853900817779268 * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    y = tl.where(x < 0, -y, y)
    if EXACT:
        # The series up to x ** 9: below 1/4 the remainder is less than an ulp.
        s = x * x
        series = x + x * s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835))))
        y = tl.where(tl.abs(x) < 0.25, series, y)
    return y


@triton.jit
def probabilities(x, lse, scores, EXACT: tl.constexpr):
    """exp(x * factor - lse). EXACT subtracts before it rounds, for one more product per score."""
    if EXACT:
        p = tl.exp2((x * scores.factor - lse) * LOG2E)
    else:
        p = tl.exp2(x * (scores.factor * LOG2E) - lse * LOG2E)
    return p
