"""Draw the committed results as one figure and print them as Markdown tables.

./dev bench report
"""

from __future__ import annotations

import json
from typing import Any

from harness import RESULTS
from matplotlib.figure import Figure

COLOURS = {
    "torch.randn eager": "#9ab8d8",
    "torch.randn compiled": "#1f5fa8",
    "dpfunc eager": "#f0b27a",
    "dpfunc compiled": "#c8641b",
    "dpfunc keystream alone": "#999999",
}


def noise_table(result: dict[str, Any]) -> str:
    machine = result["machine"]
    lines = [
        f"Normals, {machine['cpu']}, device {machine['device']}, torch {machine['torch']}:",
        "",
        "| normals | threads | torch.randn eager | dpfunc eager | ratio | torch.randn compiled "
        "| dpfunc compiled | ratio | keystream alone |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        t = {name: value["median"] for name, value in row["seconds"].items()}
        rates = {name: f"{row['size'] / seconds / 1e6:.0f} M/s" for name, seconds in t.items()}
        eager = t["dpfunc eager"] / t["torch.randn eager"]
        compiled = t["dpfunc compiled"] / t["torch.randn compiled"]
        lines.append(
            f"| {row['size']:.0e} | {row['threads']} | {rates['torch.randn eager']} "
            f"| {rates['dpfunc eager']} | {eager:.2f}x | {rates['torch.randn compiled']} "
            f"| {rates['dpfunc compiled']} | {compiled:.2f}x | {rates['dpfunc keystream alone']} |"
        )
    return "\n".join(lines)


def noise_figure(results: dict[str, dict[str, Any]]) -> Figure:
    panels = [
        (name, threads)
        for name, result in results.items()
        for threads in sorted({row["threads"] for row in result["rows"]})
    ]
    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (name, threads) in zip(axes, panels, strict=True):
        rows = [row for row in results[name]["rows"] if row["threads"] == threads]
        for i, (contestant, colour) in enumerate(COLOURS.items()):
            rates = [row["size"] / row["seconds"][contestant]["median"] / 1e6 for row in rows]
            places = [group + 0.16 * (i - 2) for group in range(len(rows))]
            axis.bar(places, rates, 0.16, color=colour, label=contestant)
        axis.set_xticks(range(len(rows)), [f"{row['size']:.0e}" for row in rows])
        axis.set(title=f"{name}, {threads} thread(s)", xlabel="normals", yscale="log")
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("million a second")
    axes[0].legend(fontsize=8)
    return figure


def main() -> None:
    paths = sorted(RESULTS.glob("noise-*.json"))
    results = {path.stem: json.loads(path.read_text()) for path in paths}
    noise_figure(results).savefig(RESULTS / "noise.png", dpi=120)
    print("\n\n".join(noise_table(result) for result in results.values()))


if __name__ == "__main__":
    main()
