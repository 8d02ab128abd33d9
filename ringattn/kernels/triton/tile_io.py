"""What the forward and the backward kernels share: finding their work, loading rows, masks and softcapping.

Kernels say *own* for the side whose block a program owns, and *other* for the side that it runs over. Row numbers
are 32 bits wide; everything that is multiplied by a stride is 64 bits wide before.
"""

import triton
import triton.language as tl

from ringattn.kernels.triton.args import HeadRows, RowRange
from ringattn.kernels.triton.configs import padded

# The width in which a head dim is computed.
width_of = triton.constexpr_function(padded)

LOG2E = tl.constexpr(1.4426950408889634)
ITEM_COLUMNS = tl.constexpr(5)
RUN_COLUMNS = tl.constexpr(6)


@triton.jit
def place_of_item(work):
    """Where this program's item stands, and its head.

    Sections of heads come one after the other; within one, items in the order of their list, heads innermost.
    """
    number = tl.program_id(0)
    num_items = tl.num_programs(0) // work.num_heads
    head = number // (num_items * work.section) * work.section
    width = tl.minimum(work.section, work.num_heads - head)
    number -= num_items * head
    return work.items + (number // width) * ITEM_COLUMNS, head + number % width


@triton.jit
def find_item(work):
    """(batch row, head, first own row, first full run, first edge run, end of the runs) of this program."""
    item, head = place_of_item(work)
    batch = tl.load(item).to(tl.int64)
    return batch, head.to(tl.int64), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3), tl.load(item + 4)


@triton.jit
def first_row(work):
    """The first own row of this program, from memory once more."""
    item, _ = place_of_item(work)
    return tl.load(item + 1, volatile=True)


@triton.jit
def find_run(work, number):
    """Where a run of the other side starts and stops."""
    run = work.runs + number * RUN_COLUMNS
    return tl.load(run), tl.load(run + 1)


@triton.jit
def range_in_run(work, number, own):
    """What each own row sees of an edge run."""
    run = work.runs + number * RUN_COLUMNS
    start, stop = tl.load(run), tl.load(run + 1)
    lo, hi = tl.load(run + 2), tl.load(run + 3)
    inside = (own >= tl.load(run + 4)) & (own < tl.load(run + 5))
    return RowRange(tl.maximum(own + lo, start), tl.where(inside, tl.minimum(own + hi, stop - 1), -1))


@triton.jit
def of_head(x, batch, head):
    """The rows of one head."""
    return HeadRows(x.pointer + batch * x.batch + head * x.head, x.row)


@triton.jit
def offsets(x, batch, row, head):
    """How far single rows are from a tensor's address."""
    return batch * x.batch + row * x.row + head * x.head


@triton.jit
def row_pointers(rows, first, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers to rows [first, first + SIZE), (SIZE, WIDTH). What does not depend on `first` stands apart."""
    within = tl.arange(0, SIZE).to(tl.int64)[:, None] * rows.stride + tl.arange(0, WIDTH)[None, :]
    return rows.pointer + tl.cast(first, tl.int64) * rows.stride + within


@triton.jit
def entry_pointers(rows, first, SIZE: tl.constexpr):
    """Pointers to entries [first, first + SIZE), as above."""
    return rows.pointer + tl.cast(first, tl.int64) * rows.stride + tl.arange(0, SIZE).to(tl.int64) * rows.stride


@triton.jit
def load_rows(rows, first, stop, SIZE: tl.constexpr, DIM: tl.constexpr, CUT: tl.constexpr):
    """Rows [first, first + SIZE) in their width; 0 from column DIM on and, if CUT, from row `stop` on."""
    WIDTH: tl.constexpr = width_of(DIM)
    pointers = row_pointers(rows, first, SIZE, WIDTH)
    here = (first + tl.arange(0, SIZE) < stop)[:, None]
    dims = (tl.arange(0, WIDTH) < DIM)[None, :]
    if DIM == WIDTH:
        if CUT:
            block = tl.load(pointers, mask=here, other=0.0)
        else:
            block = tl.load(pointers)
    else:
        if CUT:
            block = tl.load(pointers, mask=here & dims, other=0.0)
        else:
            block = tl.load(pointers, mask=dims, other=0.0)
    return block


@triton.jit
def load_step(source, first, stop, SIZE: tl.constexpr, DIM: tl.constexpr, CUT: tl.constexpr):
    """Rows [first, first + SIZE) of a source, as above.

    Whole steps come by the descriptor where there is one: the hardware then finds their addresses. At an edge rows
    from `stop` on must not be read, which only pointers can tell.
    """
    if source.described is not None and not CUT:
        place = [tl.cast(source.batch, tl.int32), first, tl.cast(source.head, tl.int32), 0]
        block = source.described.load(place).reshape([SIZE, width_of(DIM)])
    else:
        block = load_rows(source.rows, first, stop, SIZE, DIM, CUT)
    return block


@triton.jit
def store_rows(rows, first, stop, block, SIZE: tl.constexpr, DIM: tl.constexpr):
    """Writes rows [first, stop) to memory."""
    WIDTH: tl.constexpr = width_of(DIM)
    here = (first + tl.arange(0, SIZE) < stop)[:, None] & (tl.arange(0, WIDTH) < DIM)[None, :]
    tl.store(row_pointers(rows, first, SIZE, WIDTH), block, mask=here)


@triton.jit
def add_rows(rows, first, stop, block, SIZE: tl.constexpr, DIM: tl.constexpr):
    """Adds to rows [first, stop) in memory."""
    WIDTH: tl.constexpr = width_of(DIM)
    pointers = row_pointers(rows, first, SIZE, WIDTH)
    here = (first + tl.arange(0, SIZE) < stop)[:, None] & (tl.arange(0, WIDTH) < DIM)[None, :]
    tl.store(pointers, tl.load(pointers, mask=here, other=0.0) + block, mask=here)


@triton.jit
def seen(at, sight):
    """Which rows `at` of the other side, (1, other), each own row sees, (own, other)."""
    return (at >= sight.first[:, None]) & (at <= sight.last[:, None])


@triton.jit
def capped(x, scores, EXACT: tl.constexpr):
    """Scores before their factor, of products q·k; EXACT: see tanh."""
    if scores.inner is not None:
        x = tanh(x * scores.inner, EXACT)
    return x


@triton.jit
def tanh(x, EXACT: tl.constexpr):
    """Hyperbolic tangent; unless EXACT, its error is an ulp of 1 also where its value is small."""
    e = tl.exp2(-2.8853900817779268 * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    y = tl.where(x < 0, -y, y)
    if EXACT:
        # The series up to x ** 9: below 1/4 what is left out is less than an ulp.
        s = x * x
        series = x + x * s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835))))
        y = tl.where(tl.abs(x) < 0.25, series, y)
    return y


@triton.jit
def probabilities(x, lse, scores, EXACT: tl.constexpr):
    """exp(x * factor - lse). EXACT subtracts before it rounds, at the price of one more product per score."""
    if EXACT:
        p = tl.exp2((x * scores.factor - lse) * LOG2E)
    else:
        p = tl.exp2(x * (scores.factor * LOG2E) - lse * LOG2E)
    return p
