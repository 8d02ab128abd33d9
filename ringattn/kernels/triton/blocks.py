"""What the forward and the backward kernels share: finding their work, loading rows, masks and softcapping.

Kernels say *own* for the side whose block a program owns, and *other* for the side that it runs over. Row numbers
are 32 bits wide; everything that is multiplied by a stride is 64 bits wide before.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
ITEM_COLUMNS = tl.constexpr(5)
RUN_COLUMNS = tl.constexpr(6)


@triton.jit
def place_of_item(items, num_heads, section):
    """Where this program's item stands, and its head.

    Sections of heads come one after the other; within one, items in the order of their list, heads innermost.
    """
    number = tl.program_id(0)
    num_items = tl.num_programs(0) // num_heads
    head = number // (num_items * section) * section
    width = tl.minimum(section, num_heads - head)
    number -= num_items * head
    return items + (number // width) * ITEM_COLUMNS, head + number % width


@triton.jit
def find_item(items, num_heads, section):
    """(batch row, head, first own row, first full run, first edge run, end of the runs) of this program."""
    item, head = place_of_item(items, num_heads, section)
    batch = tl.load(item).to(tl.int64)
    return batch, head.to(tl.int64), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3), tl.load(item + 4)


@triton.jit
def first_row(items, num_heads, section):
    """The first own row of this program, from memory once more."""
    item, _ = place_of_item(items, num_heads, section)
    return tl.load(item + 1, volatile=True)


@triton.jit
def find_run(runs, number):
    """Where a run of the other side starts and stops."""
    run = runs + number * RUN_COLUMNS
    return tl.load(run), tl.load(run + 1)


@triton.jit
def view_of_run(runs, number, own):
    """The first and the last row of the other side that each own row sees in an edge run; none if last < first."""
    run = runs + number * RUN_COLUMNS
    start, stop = tl.load(run), tl.load(run + 1)
    lo, hi = tl.load(run + 2), tl.load(run + 3)
    inside = (own >= tl.load(run + 4)) & (own < tl.load(run + 5))
    return tl.maximum(own + lo, start), tl.where(inside, tl.minimum(own + hi, stop - 1), -1)


@triton.jit
def row_pointers(base, first, stride, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers to rows [first, first + SIZE), (SIZE, WIDTH). What does not depend on `first` stands apart."""
    within = tl.arange(0, SIZE).to(tl.int64)[:, None] * stride + tl.arange(0, WIDTH)[None, :]
    return base + tl.cast(first, tl.int64) * stride + within


@triton.jit
def entry_pointers(base, first, stride, SIZE: tl.constexpr):
    """Pointers to entries [first, first + SIZE), as above."""
    return base + tl.cast(first, tl.int64) * stride + tl.arange(0, SIZE).to(tl.int64) * stride


@triton.jit
def load_rows(base, first, stop, stride, SIZE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, CUT: tl.constexpr):
    """Rows [first, first + SIZE), (SIZE, WIDTH); 0 from column DIM on and, if CUT, from row `stop` on."""
    pointers = row_pointers(base, first, stride, SIZE, WIDTH)
    here = (first + tl.arange(0, SIZE) < stop)[:, None]
    dims = (tl.arange(0, WIDTH) < DIM)[None, :]
    if DIM == WIDTH:
        if CUT:
            rows = tl.load(pointers, mask=here, other=0.0)
        else:
            rows = tl.load(pointers)
    else:
        if CUT:
            rows = tl.load(pointers, mask=here & dims, other=0.0)
        else:
            rows = tl.load(pointers, mask=dims, other=0.0)
    return rows


@triton.jit
def load_step(
    source, first, stop, SIZE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    EDGE: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Rows [first, first + SIZE) of a source: (descriptor, pointer, stride of rows, batch row, head).

    Whole steps come by the descriptor where there is one: the hardware then finds their addresses. At an edge rows
    from `stop` on must not be read, which only pointers can tell.
    """
    described, base, stride, batch, head = source
    if DESCRIBED and not EDGE:
        place = [tl.cast(batch, tl.int32), first, tl.cast(head, tl.int32), 0]
        rows = described.load(place).reshape([SIZE, WIDTH])
    else:
        rows = load_rows(base, first, stop, stride, SIZE, DIM, WIDTH, EDGE)
    return rows


@triton.jit
def store_rows(base, first, stop, stride, rows, SIZE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Writes rows [first, stop) to memory."""
    here = (first + tl.arange(0, SIZE) < stop)[:, None] & (tl.arange(0, WIDTH) < DIM)[None, :]
    tl.store(row_pointers(base, first, stride, SIZE, WIDTH), rows, mask=here)


@triton.jit
def add_rows(base, first, stop, stride, add, SIZE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Adds to rows [first, stop) in memory."""
    pointers = row_pointers(base, first, stride, SIZE, WIDTH)
    here = (first + tl.arange(0, SIZE) < stop)[:, None] & (tl.arange(0, WIDTH) < DIM)[None, :]
    tl.store(pointers, tl.load(pointers, mask=here, other=0.0) + add, mask=here)


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
def probabilities(x, lse, factor, EXACT: tl.constexpr):
    """exp(x * factor - lse). EXACT subtracts before it rounds, at the price of one more product per score."""
    if EXACT:
        p = tl.exp2((x * factor - lse) * LOG2E)
    else:
        p = tl.exp2(x * (factor * LOG2E) - lse * LOG2E)
    return p
