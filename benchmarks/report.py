"""Draw the committed results as figures and print them as Markdown tables.

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


STEP_COLOURS = {
    "non-private": "#999999",
    "dpfunc": "#c8641b",
    "dpfunc vmap": "#f0b27a",
    "opacus ghost": "#1f5fa8",
    "opacus hooks": "#5b8fc7",
    "opacus functorch": "#9ab8d8",
    "opacus ew": "#c9d9ea",
    "opake": "#7a9e6b",
}
"""Contestants of the step table; each is the better of its eager and compiled forms."""


def best(seconds: dict[str, dict[str, float]], contestant: str) -> float | None:
    """The least median of a contestant's forms, or None where it did not run."""
    spelled = {"dpfunc": "dpfunc auto"}.get(contestant, contestant)
    forms = [
        spelled,
        *(f"{spelled} {form}" for form in ("eager", "compiled", "in place", "compiled module")),
    ]
    return min((seconds[form]["median"] for form in forms if form in seconds), default=None)


def step_table(result: dict[str, Any]) -> str:
    machine = result["machine"]
    lines = [
        f"Whole steps over the non-private step, {machine['cpu']}, device {machine['device']}, torch "
        f"{machine['torch']}:",
        "",
        "| model | threads | non-private | dpfunc eager | dpfunc compiled | "
        + " | ".join(c for c in STEP_COLOURS if c not in ("non-private", "dpfunc"))
        + " |",
        "|---|---:|" + "---:|" * (len(STEP_COLOURS) + 1),
    ]
    for row in result["rows"]:
        base = best(row["seconds"], "non-private")
        assert base is not None
        columns = ["dpfunc auto eager", "dpfunc auto compiled", *list(STEP_COLOURS)[2:]]
        cells = [best(row["seconds"], column) for column in columns]
        lines.append(
            f"| {row['model']}, B = {row['batch']} | {row['threads']} | {base * 1e3:.1f} ms | "
            + " | ".join("-" if c is None else f"{c / base:.2f}x" for c in cells)
            + " |"
        )
    return "\n".join(lines)


def step_figure(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axis = figure.subplots()
    for i, (contestant, colour) in enumerate(STEP_COLOURS.items()):
        bars = [(place, best(row["seconds"], contestant)) for place, row in enumerate(rows)]
        ratios = [
            (place + 0.1 * (i - 3.5), seconds / (best(rows[place]["seconds"], "non-private") or 1))
            for place, seconds in bars
            if seconds is not None
        ]
        places, heights = zip(*ratios, strict=True) if ratios else ((), ())
        axis.bar(places, heights, 0.1, color=colour, label=contestant)
    axis.set_xticks(range(len(rows)), [row["model"] for row in rows])
    axis.set(yscale="log", ylabel="time of a step over the non-private step")
    axis.set_yticks([1, 2, 5, 10, 20, 50, 100], ["1x", "2x", "5x", "10x", "20x", "50x", "100x"])
    axis.set_title(f"Whole private steps, {rows[0]['threads']} thread(s), best form of each")
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=8, ncols=2)
    return figure


def graph_table(result: dict[str, Any]) -> str:
    lines = [
        "| model | matmuls | convolutions | FLOPs | dpfunc: matmuls | convolutions | FLOPs |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in {row["model"]: row for row in result["rows"]}.values():
        plain, ours = row["graph"]["non-private"], row["graph"]["dpfunc auto"]
        lines.append(
            f"| {row['model']} | {plain['matmuls']} | {plain['convolutions']} | "
            f"{plain['flops'] / 1e9:.2f} G | {ours['matmuls']} | {ours['convolutions']} | "
            f"{ours['flops'] / plain['flops'] - 1:+.1%} |"
        )
    return "\n".join(lines)


def memory_table(result: dict[str, Any]) -> str:
    names = list(dict.fromkeys(name for row in result["rows"] for name in row["ratio"]))
    models = [f"{row['model']}, B = {row['batch']}" for row in result["rows"]]
    lines = [
        "| peak memory of a step | " + " | ".join(models) + " |",
        "|---|" + "---:|" * len(models),
    ]
    for name in names:
        cells = [
            f"{row['bytes'][name] / 2**20:.0f} MiB, {row['ratio'][name]:.2f}x"
            if name in row["ratio"]
            else "-"
            for row in result["rows"]
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sampling_table(result: dict[str, Any]) -> str:
    names = list(result["rows"][0]["seconds"])
    lines = ["| examples | " + " | ".join(names) + " |", "|---:|" + "---:|" * len(names)]
    for row in result["rows"]:
        cells = [
            f"{row['seconds'][name]['median'] * 1e3:.2f} ms" if name in row["seconds"] else "-"
            for name in names
        ]
        lines.append(f"| {row['size']:.0e} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


ACCOUNTANT_COLOURS = {
    "dpfunc pld": "#c8641b",
    "dpfunc rdp": "#f0b27a",
    "dpfunc gdp": "#f6d9b8",
    "opacus rdp": "#9ab8d8",
    "opacus gdp": "#c9d9ea",
    "opacus prv": "#1f5fa8",
    "dp-accounting rdp": "#b9cfae",
    "dp-accounting pld": "#4f7a3f",
    "prv_accountant": "#7d5ba6",
}


def accounting_table(result: dict[str, Any]) -> str:
    def percent(value: float | None) -> str:
        if value is None:
            return "-"
        return f"{value:+.1e}" if 0 < abs(value) < 1e-4 else f"{value:+.2%}"

    def milliseconds(value: float | None) -> str:
        return "-" if value is None else f"{value * 1e3:,.{0 if value > 0.1 else 1}f}"

    machine = result["machine"]
    lines = [
        f"Epsilon of {len(result['rows'])} logs, {machine['cpu']}, one thread:",
        "",
        "| accountant | offered | failed | under-reports | excess: median | worst | CPU ms: median "
        "| p90 | max |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in (name for name in ACCOUNTANT_COLOURS if name in result["summary"]):
        row = result["summary"][name]
        under = row["under_reports"]
        wrong = f"{under}, worst {row['least_excess']:+.2%}" if under else "0"
        lines.append(
            f"| {name} | {row['offered']} | {row['failed']} | {wrong} "
            f"| {percent(row['median_excess'])} | {percent(row['worst_excess'])} "
            f"| {milliseconds(row['median_cpu'])} | {milliseconds(row['p90_cpu'])} "
            f"| {milliseconds(row['max_cpu'])} |"
        )
    return "\n".join(lines)


def calibration_table(result: dict[str, Any]) -> str:
    lines = [
        "| accountant | "
        + " | ".join(_target(row["target"]) for row in result["calibration"])
        + " |",
        "|---" + "|---:" * len(result["calibration"]) + "|",
    ]
    names = [n for n in ACCOUNTANT_COLOURS if any(n in r["engines"] for r in result["calibration"])]
    for name in names:
        cells = [_calibrated(row["engines"].get(name, {})) for row in result["calibration"]]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _target(target: dict[str, Any]) -> str:
    return f"epsilon {target['epsilon']:g}, {target['steps']:,} steps at {target['prob']:.3g}"


def _calibrated(answer: dict[str, Any]) -> str:
    if "cpu" not in answer:
        return "failed"
    excess = answer["excess"]
    shown = f"{excess:+.0e}" if abs(excess) < 1e-4 else f"{excess:+.2%}"
    told = " (violates it)" if answer["violates"] else ""
    return f"{shown}{told}, {answer['cpu']['median'] * 1e3:,.0f} ms"


def large_table(result: dict[str, Any]) -> str:
    lines = [
        "| accountant | distinct | steps | built | first epsilon | another | width |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        for name, answer in row["engines"].items():
            start = f"| {name} | {row['kind'].removeprefix('distinct ')} | {row['size']:,} |"
            if "cpu" not in answer:
                lines.append(f"{start} - | {answer['failed']} | - | - |")
                continue
            times = [f"{answer['cpu'][part] * 1e3:,.0f} ms" for part in ("build", "first", "again")]
            lower, upper = answer["lower"], answer["upper"]
            apart = "-" if lower is None else f"{upper - lower:.0e}"
            lines.append(f"{start} {' | '.join(times)} | {apart} |")
    return "\n".join(lines)


def width(answer: dict[str, Any], truth: dict[str, Any]) -> float:
    """Of the interval, or what stands in for it where there is no lower bound; over the truth."""
    middle = (truth["lower"] + truth["upper"]) / 2
    if answer["lower"] is not None:
        return max((answer["upper"] - answer["lower"]) / middle, 1e-16)
    return max(abs(answer["excess"]), 1e-16)


def accounting_figure(result: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(12, 6), layout="constrained")
    every, one = figure.subplots(1, 2, sharey=True)
    for name, colour in ACCOUNTANT_COLOURS.items():
        for mark, wrong in (("o", False), ("x", True)):
            answers = [
                (answer["cpu"]["median"] * 1e3, width(answer, row["truth"]), answer["lower"])
                for row in result["rows"]
                if "cpu" in (answer := row["engines"].get(name, {}))
                and answer["under_reports"] == wrong
            ]
            if answers:
                times, widths, lower = zip(*answers, strict=True)
                fill = colour if wrong or lower[0] is not None else "none"
                style = {} if wrong else {"edgecolors": colour}
                label = f"{name}, under-reports" if wrong else name
                every.scatter(times, widths, 24, c=fill, marker=mark, label=label, **style)
    every.set_title(f"{len(result['rows'])} logs")
    for row in result["ladder"]:
        steps: dict[str, list[tuple[float, float]]] = {}
        for name, answer in row["engines"].items():
            if "cpu" in answer and answer["lower"] is not None:
                place = (answer["cpu"]["median"] * 1e3, width(answer, row["truth"]))
                steps.setdefault(name.partition(",")[0], []).append(place)
        for name, places in steps.items():
            one.plot(*zip(*places, strict=True), "o-", color=ACCOUNTANT_COLOURS[name], label=name)
        one.set_title(f"{row['config']}: finer and finer settings")
    every.set_ylabel("upper - lower bound (hollow: upper bound - truth), over epsilon")
    for axis in (every, one):
        axis.set(xscale="log", yscale="log", xlabel="CPU ms a call")
        axis.grid(alpha=0.3)
    figure.legend(*every.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


def results(pattern: str) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob(pattern))}


def main() -> None:
    noise = results("noise-*.json")
    noise_figure(noise).savefig(RESULTS / "noise.png", dpi=120)
    tables = [noise_table(result) for result in noise.values()]
    for name, result in results("steps-*.json").items():
        first = min(row["threads"] for row in result["rows"])
        rows = [row for row in result["rows"] if row["threads"] == first]
        step_figure(rows).savefig(RESULTS / f"{name}.png", dpi=120)
        tables += [step_table(result), graph_table(result)]
    tables += [memory_table(result) for result in results("memory-*.json").values()]
    tables += [sampling_table(result) for result in results("sampling-*.json").values()]
    for name, result in results("accounting-cpu.json").items():
        accounting_figure(result).savefig(RESULTS / f"{name}.png", dpi=120)
        tables += [accounting_table(result), calibration_table(result)]
    tables += [large_table(result) for result in results("accounting-large-*.json").values()]
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
