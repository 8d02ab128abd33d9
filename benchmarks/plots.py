"""Pictures of what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Patch

from benchmarks.timeline import Span
from ringattn.parallel import TimedOp

COLOURS = {"compute": "#4878a8", "transfer": "#e0a030", "flight": "#f4e2bd", "wait": "#c03028"}
LABELS = {
    "compute": "computing",
    "transfer": "transfer, as long as it takes alone",
    "flight": "until it is known to have landed",
    "wait": "waiting",
}


def losses(ring: Sequence[float], single: Sequence[float], mix: str, path: Path) -> None:
    """Draws both loss curves, and their difference below."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, (top, bottom) = plt.subplots(2, sharex=True, height_ratios=(3, 1), figsize=(7, 5), layout="constrained")
    top.plot(single, color="#c03028", linewidth=5, alpha=0.35, label="1 process")
    top.plot(ring, color="#4878a8", marker="o", markersize=4, label=mix)
    top.set(ylabel="loss, nats per byte", title="The same training, sharded and whole")
    top.legend()
    bottom.bar(range(len(ring)), [abs(a - b) for a, b in zip(ring, single, strict=True)], color="#777777")
    bottom.set(xlabel="step", ylabel="|difference|")
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def timeline(spans: Sequence[Span], path: Path) -> None:
    """Draws each rank's computing with the transfers under it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ranks = sorted({span.rank for span in spans})
    figure, axes = plt.subplots(figsize=(11, 1.5 + 1.1 * len(ranks)), layout="constrained")
    for span in spans:
        low, height = (0.05, 0.4) if span.kind == "compute" else (-0.26, 0.24)
        start, width = span.start * 1e3, (span.stop - span.start) * 1e3
        box = axes.broken_barh([(start, width)], (low - span.rank, height), facecolors=COLOURS[span.kind])
        box.set(edgecolor="white", linewidth=0.6)
        if span.label:
            middle = (start + width / 2, low - span.rank + height / 2)
            axes.annotate(span.label, middle, ha="center", va="center", color="white", fontsize=7)
    axes.set_yticks([-rank for rank in ranks], [f"rank {rank}" for rank in ranks])
    axes.set(xlabel="milliseconds", title="One ring attention, forward and backward: transfers run under the computing")
    handles = [Patch(color=COLOURS[kind], label=label) for kind, label in LABELS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def speed(results: Path, path: Path) -> None:
    """Draws the ratios of a speed.jsonl: a panel for each pass and dtype, a line for each contender."""
    records = [json.loads(line) for line in results.read_text().splitlines()]
    panels = sorted({(r["dtype"], r["backward"]) for r in records}, key=lambda panel: (panel[1], panel[0]))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.4 * len(panels), 3.4), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (dtype, backward) in zip(axes[0], panels, strict=True):
        here = [r for r in records if (r["dtype"], r["backward"]) == (dtype, backward)]
        for contender in dict.fromkeys(r["contender"] for r in here):
            line = sorted((r["seq_len"], r["ratio"]) for r in here if r["contender"] == contender)
            axis.plot(*zip(*line, strict=True), marker="o", label=contender)
        axis.set_xscale("log", base=2)
        axis.set(title=f"{dtype}, {'forward + backward' if backward else 'forward'}", xlabel="tokens")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("times as fast as torch, one process")
    axes[0][0].set_ylim(bottom=0)
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def kernels(results: Path, path: Path) -> None:
    """Draws a kernels.jsonl: a panel for each setting and pass, in it each case's share of the matmul rate."""
    records = [r for r in map(json.loads, results.read_text().splitlines()) if "left_out" not in r]
    names = ("dtype", "head_dim", "heads", "kv_heads", "seq_len", "threads")
    settings = list(dict.fromkeys(tuple(r[name] for name in names) for r in records))
    passes = list(dict.fromkeys(r["backward"] for r in records))
    cases = list(dict.fromkeys(r["case"] for r in records))
    bars = ["best of torch", *dict.fromkeys(r["contender"] for r in records if r["kind"] in ("flash-attn", "backend"))]
    size = (2 + 3.2 * len(settings), 0.8 + 2.6 * len(passes))
    figure, axes = plt.subplots(
        len(passes), len(settings), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
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
        dtype, head_dim, heads, kv_heads, seq_len, threads = setting
        title = f"{dtype}, D {head_dim}, heads {heads}/{kv_heads}\n{seq_len:,} tokens, {threads} threads"
        axis.set_title(f"{title}, {'backward' if backward else 'forward'}", fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("of the matmul rate")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def exchanges(results: Path, path: Path) -> None:
    """Draws an exchanges.jsonl: a panel for each mask and pass, bars of computing and of what is exposed on top."""
    records = [json.loads(line) for line in results.read_text().splitlines()]
    panels = list(dict.fromkeys((r["mask"], r["direction"]) for r in records))
    bars = list(dict.fromkeys((r["layout"], r["exchange"]) for r in records))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(1.5 + 2.4 * len(panels), 1.2 + 0.22 * len(bars)), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, panel in zip(axes[0], panels, strict=True):
        for r in (r for r in records if (r["mask"], r["direction"]) == panel):
            place, exposed = -bars.index((r["layout"], r["exchange"])), max(r["exposed_s"], 0.0)
            hidden = r["whole_s"] - exposed
            axis.barh(place, hidden * 1e3, color=COLOURS["compute"])
            axis.barh(place, exposed * 1e3, left=hidden * 1e3, color=COLOURS["wait"])
        axis.set(title=" ".join(panel), xlabel="milliseconds")
    axes[0][0].set_yticks([-place for place in range(len(bars))], [" ".join(bar) for bar in bars], fontsize=7)
    handles = [Patch(color=COLOURS["compute"], label="computing"), Patch(color=COLOURS["wait"], label="exposed")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def decode(results: Path, path: Path) -> None:
    """Draws a decode.jsonl: the time of a token by length, and the least that reading the same bytes takes."""
    records = [r for r in map(json.loads, results.read_text().splitlines()) if r["kind"] == "length"]
    styles = {
        "ringattn, all ranks": ("#4878a8", "o", "-"),
        "the kernel alone": ("#4878a8", "", ":"),
        "raw read, one rank": ("#777777", "", "-"),
        "raw read, all ranks": ("#777777", "", "--"),
        "torch, one process": ("#c03028", "s", "-"),
        "torch, heads packed as rows": ("#e0a030", "s", "-"),
    }
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, (colour, marker, line) in styles.items():
        points = sorted((r["tokens"], r["min_s"] * 1e3) for r in records if r["contender"] == name)
        if points:
            axis.plot(*zip(*points, strict=True), color=colour, marker=marker, linestyle=line, label=name)
    first = records[0]
    title = f"One layer, {first['ranks']} ranks, {first['dtype']}, heads {first['heads']}/{first['kv_heads']}"
    axis.set(xlabel="tokens in the cache", ylabel="milliseconds a token, the fastest round", title=title)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


MOVES = {"F": "#4878a8", "B": "#58a058", "I": "#58a058", "W": "#a8d0a8"}
MOVE_LABELS = {"F": "forward", "B": "backward, or its part down to the input", "W": "backward of weights"}


def pipelines(runs: Mapping[str, Sequence[Sequence[TimedOp]]], path: Path) -> None:
    """Draws what each rank of a pipeline did when, for each title; numbers are micro-batches, frames second stages."""
    path.parent.mkdir(parents=True, exist_ok=True)
    heights = [len(actions) for actions in runs.values()]
    figure, panels = plt.subplots(
        len(runs), 1, figsize=(11, sum(0.7 + 0.3 * height for height in heights) + 0.6), sharex=True, squeeze=False,
        layout="constrained", height_ratios=heights,
    )  # fmt: skip
    for axes, (title, actions) in zip(panels[:, 0], runs.items(), strict=True):
        for rank, moves in enumerate(actions):
            first = min(action.op.stage for action in moves)
            for (kind, stage, micro_batch), start, stop in moves:
                box = axes.broken_barh([(start * 1e3, (stop - start) * 1e3)], (-0.45 - rank, 0.9), fc=MOVES[kind])
                box.set(edgecolor="white" if stage == first else "black", linewidth=0.6)
                middle = ((start + stop) / 2 * 1e3, -rank)
                axes.annotate(str(micro_batch), middle, ha="center", va="center", fontsize=6)
        axes.set_yticks([-rank for rank in range(len(actions))], [f"rank {rank}" for rank in range(len(actions))])
        axes.set_title(title, fontsize=9, loc="left")
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
    panels[-1, 0].set_xlabel("milliseconds")
    handles = [Patch(color=MOVES[kind], label=label) for kind, label in MOVE_LABELS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def mixes(results: Path, path: Path) -> None:
    """Draws a mixes.jsonl: for each mix its speed, its memory, and what a rank sends in a step, by axis."""
    records = [json.loads(line) for line in results.read_text().splitlines()]
    places = [-place for place in range(len(records))]
    figure, axes = plt.subplots(
        1, 3, figsize=(13, 1.6 + 0.3 * len(records)), sharey=True, layout="constrained", width_ratios=(2, 3, 4)
    )
    axes[0].barh(places, [r["tokens_per_s"] for r in records], color="#777777")
    axes[0].set_yticks(places, [r["mix"] for r in records], fontsize=8)
    state, peak = ([max(r[name]) for r in records] for name in ("state_mib", "peak_mib"))
    axes[1].barh(places, state, color="#4878a8", label="weights, optimizer state")
    axes[1].barh(places, peak, left=state, color="#e0a030", label="beyond, in a step")
    left = [0.0] * len(records)
    for name in dict.fromkeys(axis for r in records for axis in r["sent"]):
        sent = [sum(sum(counts) / len(counts) for counts in r["sent"].get(name, {}).values()) / 2**20 for r in records]
        if max(sent) < 0.005:
            continue  # losses and norms
        axes[2].barh(places, sent, left=left, label=name)
        left = [a + b for a, b in zip(left, sent, strict=True)]
    axes[0].set(xlabel="tokens/s")
    axes[1].set(xlabel="MiB, the fullest rank")
    axes[2].set(xlabel="MiB that a rank sends in a step, the mean")
    for axis in axes[1:]:
        axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)
    figure.savefig(path, dpi=120)
    plt.close(figure)
