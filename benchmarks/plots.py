"""Figures of benchmarks, from their records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.runner import Record

if TYPE_CHECKING:
    from benchmarks.timeline import Span
    from ringattn.parallel import TimedOp

BLUE, RED, ORANGE, GREY = "#4878a8", "#c03028", "#e0a030", "#777777"
SPANS = {
    "compute": (BLUE, "computing"),
    "transfer": (ORANGE, "transfer, as long as it takes alone"),
    "flight": ("#f4e2bd", "until the wait for it returns"),
    "wait": (RED, "waiting"),
}
OPS = {
    "F": (BLUE, "forward"),
    "B": ("#58a058", "backward, or its part for the input"),
    "I": ("#58a058", ""),
    "W": ("#a8d0a8", "backward of the weights"),
}


@contextmanager
def figure(path: Path, size: tuple[float, float], rows: int = 1, columns: int = 1, **options: Any) -> Iterator[Any]:
    """Yields the figure and its (rows, columns) axes; saves it afterwards."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawn, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)
    yield drawn, axes
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=120)
    plt.close(drawn)
    print(f"figure: {path}")


def _legend(drawn: Any, colours: Mapping[str, tuple[str, str]]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=label) for colour, label in colours.values() if label]
    drawn.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)


def _rank_rows(axis: Any, ranks: int) -> None:
    axis.set_yticks([-rank for rank in range(ranks)], [f"rank {rank}" for rank in range(ranks)])
    axis.spines[["top", "right", "left"]].set_visible(False)


def _box(axis: Any, span: tuple[float, float], low: float, height: float, colour: str, label: str, edge: str) -> None:
    """A labelled bar over a span of seconds, on an axis in milliseconds."""
    start, width = span[0] * 1e3, (span[1] - span[0]) * 1e3
    axis.broken_barh([(start, width)], (low, height), facecolors=colour).set(edgecolor=edge, linewidth=0.6)
    middle = (start + width / 2, low + height / 2)
    axis.annotate(label, middle, ha="center", va="center", color="white", fontsize=7)


def _stacked(axis: Any, places: Sequence[int], series: Mapping[str, tuple[Sequence[float], str | None]]) -> None:
    """Horizontal bars on top of each other, with a legend above."""
    left = [0.0] * len(places)
    for label, (values, colour) in series.items():
        axis.barh(places, values, left=left, label=label, color=colour)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)


def losses(together: Sequence[float], alone: Sequence[float], name: str, path: Path) -> None:
    """Draws two loss curves, and their difference below."""
    with figure(path, (7, 5), 2, sharex=True, height_ratios=(3, 1)) as (_, axes):
        top, bottom = axes[:, 0]
        top.plot(alone, color=RED, linewidth=5, alpha=0.35, label="1 process")
        top.plot(together, color=BLUE, marker="o", markersize=4, label=name)
        top.set(ylabel="loss, nats per byte", title="The same training, distributed and in one process")
        top.legend()
        bottom.bar(range(len(alone)), [abs(a - b) for a, b in zip(together, alone, strict=True)], color=GREY)
        bottom.set(xlabel="step", ylabel="|difference|")


def timeline(spans: Sequence[Span], path: Path) -> None:
    """Draws each rank's computing, with its transfers below."""
    ranks = 1 + max(span.rank for span in spans)
    with figure(path, (11, 1.5 + 1.1 * ranks)) as (drawn, axes):
        for span in spans:
            low, height = (0.05, 0.4) if span.kind == "compute" else (-0.26, 0.24)
            colour = SPANS[span.kind][0]
            _box(axes[0, 0], (span.start, span.stop), low - span.rank, height, colour, span.label, "white")
        _rank_rows(axes[0, 0], ranks)
        axes[0, 0].set(xlabel="milliseconds", title="One ring attention, forward and backward")
        _legend(drawn, SPANS)


def pipelines(runs: Mapping[str, Sequence[Sequence[TimedOp]]], path: Path) -> None:
    """Draws the operations of each rank of a pipeline; labels are micro-batches, black frames mark second stages."""
    heights = [len(ops) for ops in runs.values()]
    size = (11, sum(0.7 + 0.3 * height for height in heights) + 0.6)
    with figure(path, size, len(runs), sharex=True, height_ratios=heights) as (drawn, axes):
        for axis, (title, ops) in zip(axes[:, 0], runs.items(), strict=True):
            for rank, of_rank in enumerate(ops):
                first = min(op.op.stage for op in of_rank)
                for (kind, stage, micro_batch), start, stop in of_rank:
                    edge = "white" if stage == first else "black"
                    _box(axis, (start, stop), -0.45 - rank, 0.9, OPS[kind][0], str(micro_batch), edge)
            _rank_rows(axis, len(ops))
            axis.set_title(title, fontsize=9, loc="left")
        axes[-1, 0].set_xlabel("milliseconds")
        _legend(drawn, OPS)


def speed(records: Sequence[Record], path: Path) -> None:
    """Draws `attention`: a panel for each pass and dtype, a line for each contender."""
    panels = sorted({(r["pass"], r["dtype"]) for r in records})
    with figure(path, (3.4 * len(panels), 3.4), 1, len(panels), sharey=True) as (_, axes):
        for axis, panel in zip(axes[0], panels, strict=True):
            here = [r for r in records if (r["pass"], r["dtype"]) == panel]
            for contender in dict.fromkeys(r["contender"] for r in here):
                line = sorted((r["seq_len"], r["times_torch"]) for r in here if r["contender"] == contender)
                axis.plot(*zip(*line, strict=True), marker="o", label=contender)
            axis.set_xscale("log", base=2)
            axis.set(title=", ".join(panel), xlabel="tokens")
            axis.grid(alpha=0.3)
        axes[0][0].set(ylabel="times as fast as torch, one process")
        axes[0][0].set_ylim(bottom=0)
        axes[0][0].legend(fontsize=7)


def kernels(records: Sequence[Record], path: Path) -> None:
    """Draws `kernels`: a panel for each setting and pass, with each case's share of the matmul rate."""
    names = ("dtype", "head_dim", "heads", "kv_heads", "seq_len", "threads")
    settings = list(dict.fromkeys(tuple(r[name] for name in names) for r in records))
    passes, cases = (list(dict.fromkeys(r[name] for r in records)) for name in ("backward", "case"))
    bars = ["best of torch", *dict.fromkeys(r["contender"] for r in records if r["kind"] in ("flash-attn", "backend"))]
    size = (2 + 3.2 * len(settings), 0.8 + 2.6 * len(passes))
    with figure(path, size, len(passes), len(settings), sharex=True, sharey=True) as (drawn, axes):
        for (line, backward), (column, setting) in product(enumerate(passes), enumerate(settings)):
            here = [r for r in records if r["backward"] == backward and tuple(r[name] for name in names) == setting]
            heights = {(r["case"], r["contender"]): r["of_matmul"] for r in here}
            heights |= {(r["case"], "best of torch"): r["of_matmul"] for r in here if r["contender"] == r["baseline"]}
            axis, width = axes[line][column], 0.8 / len(bars)
            for index, name in enumerate(bars):
                places = [x + (index - (len(bars) - 1) / 2) * width for x in range(len(cases))]
                axis.bar(places, [heights.get((case, name), 0.0) for case in cases], width, label=name)
            axis.set_xticks(range(len(cases)), cases, rotation=45, ha="right")
            axis.grid(axis="y", alpha=0.3)
            title = "{}, D {}, heads {}/{}\n{:,} tokens, {} threads, ".format(*setting)
            axis.set_title(title + ("backward" if backward else "forward"), fontsize=8)
            axes[line][0].set_ylabel("of the matmul rate")
        drawn.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)


def exchanges(records: Sequence[Record], path: Path) -> None:
    """Draws `exchanges`: a panel for each mask and pass, bars of the computing with the exposed time on top."""
    panels = list(dict.fromkeys((r["mask"], r["direction"]) for r in records))
    bars = list(dict.fromkeys((r["layout"], r["exchange"]) for r in records))
    size = (1.5 + 2.4 * len(panels), 1.2 + 0.22 * len(bars))
    with figure(path, size, 1, len(panels), sharey=True) as (_, axes):
        for axis, panel in zip(axes[0], panels, strict=True):
            here = [r for r in records if (r["mask"], r["direction"]) == panel]
            places = [-bars.index((r["layout"], r["exchange"])) for r in here]
            exposed = [max(r["exposed_s"], 0.0) * 1e3 for r in here]
            computing = [r["whole_s"] * 1e3 - x for r, x in zip(here, exposed, strict=True)]
            _stacked(axis, places, {"computing": (computing, BLUE), "exposed": (exposed, RED)})
            axis.set(xlabel=f"{' '.join(panel)}, milliseconds")
        axes[0][0].set_yticks([-place for place in range(len(bars))], [" ".join(bar) for bar in bars], fontsize=7)


def decode(records: Sequence[Record], styles: Mapping[str, tuple[str, str, str]], path: Path) -> None:
    """Draws `decode`: the time of a token by length; styles are (colour, marker, line) of each contender."""
    with figure(path, (7, 4.5)) as (_, axes):
        axis, first = axes[0, 0], records[0]
        for name, (colour, marker, line) in styles.items():
            if points := sorted((r["tokens"], r["min_s"] * 1e3) for r in records if r["contender"] == name):
                axis.plot(*zip(*points, strict=True), color=colour, marker=marker, linestyle=line, label=name)
        title = f"One layer, {first['ranks']} ranks, {first['dtype']}, heads {first['heads']}/{first['kv_heads']}"
        axis.set(xlabel="tokens in the cache", ylabel="milliseconds per token, fastest round", title=title)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)


def mixes(records: Sequence[Record], path: Path) -> None:
    """Draws `mixes`: the speed of each mix, its memory, and the bytes that a rank sends in a step, by axis."""
    places = [-place for place in range(len(records))]
    with figure(path, (13, 1.6 + 0.3 * len(records)), 1, 3, sharey=True, width_ratios=(2, 3, 4)) as (_, axes):
        speeds, memory, traffic = axes[0]
        speeds.barh(places, [r["tokens_per_s"] for r in records], color=GREY)
        speeds.set_yticks(places, [r["mix"] for r in records], fontsize=8)
        state, peak = ([r[name] for r in records] for name in ("max_state_mib", "max_peak_mib"))
        _stacked(memory, places, {"weights, optimizer state": (state, BLUE), "the rest, in a step": (peak, ORANGE)})
        names = dict.fromkeys(axis for r in records for axis in r["sent_mib"])
        _stacked(traffic, places, {name: ([r["sent_mib"].get(name, 0.0) for r in records], None) for name in names})
        labels = ("tokens/s", "MiB, the largest of all ranks", "MiB that a rank sends in a step, mean over ranks")
        for axis, label in zip(axes[0], labels, strict=True):
            axis.set(xlabel=label)
