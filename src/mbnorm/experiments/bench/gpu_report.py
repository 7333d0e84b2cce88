"""The tables of a run on a GPU, from its rows alone."""

from mbnorm.experiments.bench.rows import Row, geometric_mean

BASE = "batch_norm"
PASSES = 5
"""Tensors of the input's size that a forward and backward must read or write at least."""
LARGE = 100e6
"""Bytes of an input above which the caches do not hold it."""


def table(rows: list[Row]) -> str:
    """Return the Markdown tables of errors, layers, steps and of what did not run."""
    row = rows[0]
    lines = [
        f"{row.get('device')}, torch {row['torch']}, triton {row.get('triton')}, CUDA {row.get('cuda')}, "
        f"mbnorm {row['mbnorm']}. Written by `python -m mbnorm.experiments.bench.gpu`.",
        "",
    ]
    parts = {"error": _errors, "layer": _layers, "step": _steps, "cut": _cuts, "failure": _failures}
    for kind, part in parts.items():
        if chosen := [r for r in rows if r["kind"] == kind]:
            lines += [*part(chosen), ""]
    return "\n".join(lines)


def _errors(rows: list[Row]) -> list[str]:
    lines = ["Largest error against float64, in units of the largest value.", ""]
    lines += ["| backend, dtype | y | dx | dw | db |", "| --- |" + " ---: |" * 4]
    for backend, dtype in dict.fromkeys((r["backend"], r["dtype"]) for r in rows):
        here = [r for r in rows if (r["backend"], r["dtype"]) == (backend, dtype)]
        worst = (f"{max(r[name] for r in here):.1e}" for name in ("y", "dx", "dw", "db"))
        lines.append(f"| {backend}, {dtype} | " + " | ".join(worst) + " |")
    return lines


def _layers(rows: list[Row]) -> list[str]:
    times: dict[tuple[object, ...], dict[str, Row]] = {}
    for row in rows:
        case = (row["threads"], row["dtype"], row["layout"], *row["shape"])
        times.setdefault(case, {}).setdefault(row["provider"], row)
    names = [n for n in dict.fromkeys(r["provider"] for r in rows) if n != BASE]
    lines = [
        "Time of forward and backward over that of `nn.BatchNorm2d`: geometric mean over ResNet-50's shapes "
        "(worst shape); the most memory over its; and the share of a copy's rate that `momentum` reaches on "
        "inputs of over 100 MB, counting 5 tensors moved.",
        "",
        "| launched, batch, dtype, layout | " + " | ".join(names) + " | peak | share of copy |",
        "| --- |" + " ---: |" * (len(names) + 2),
    ]
    groups = dict.fromkeys((r["threads"], r["shape"][0], r["dtype"], r["layout"]) for r in rows)
    for launched, batch, dtype, layout in groups:
        here = [t for case, t in times.items() if case[:4] == (launched, dtype, layout, batch) and BASE in t]
        cells = []
        for name in names:
            ratios = [t[name]["median_s"] / t[BASE]["median_s"] for t in here if name in t]
            cells.append(f"{geometric_mean(ratios):.2f} ({max(ratios):.2f})" if ratios else "-")
        ours = [(t["momentum"], t[BASE]) for t in here if "momentum" in t]
        peak = max((m["peak_bytes"] / b["peak_bytes"] for m, b in ours), default=None)
        shares = [
            PASSES * m["bytes"] / m["median_s"] / m["copy_bytes_per_s"] for m, _ in ours if m["bytes"] > LARGE
        ]
        cells += [f"{peak:.3f}" if peak else "-", f"{min(shares):.2f}" if shares else "-"]
        lines.append(f"| {launched}, {batch}, {dtype}, {layout} | " + " | ".join(cells) + " |")
    return lines


def _steps(rows: list[Row]) -> list[str]:
    lines = ["Training steps of a ResNet-50 at batch 2 and 224 pixels.", ""]
    lines += [
        "| launched, norm | ms | over batch norm | peak over batch norm |",
        "| --- | ---: | ---: | ---: |",
    ]
    base = {r["threads"]: r for r in rows if r["method"] == "batch"}
    for row in rows:
        other = base.get(row["threads"])
        time = f"{row['median_s'] / other['median_s']:.2f}" if other else "-"
        peak = f"{row['peak_bytes'] / other['peak_bytes']:.3f}" if other else "-"
        lines.append(f"| {row['threads']}, {row['method']} | {1e3 * row['median_s']:.2f} | {time} | {peak} |")
    return lines


def _cuts(rows: list[Row]) -> list[str]:
    names = list(dict.fromkeys(r["cut"] for r in rows))
    lines = [
        "Microseconds of `momentum`, forward and backward in a CUDA graph, with tiles of other sizes, and "
        "other numbers of them that one program takes.",
        "",
        "| shape, layout | " + " | ".join(names) + " |",
        "| --- |" + " ---: |" * len(names),
    ]
    for shape, layout in dict.fromkeys((tuple(r["shape"]), r["layout"]) for r in rows):
        here = {r["cut"]: r["median_s"] for r in rows if (tuple(r["shape"]), r["layout"]) == (shape, layout)}
        cells = (f"{1e6 * here[name]:.1f}" if name in here else "-" for name in names)
        lines.append(f"| {'x'.join(map(str, shape))}, {layout} | " + " | ".join(cells) + " |")
    return lines


def _failures(rows: list[Row]) -> list[str]:
    return ["Did not run:", "", *(f"- {r['of']} {r['what']}: {r['why']}" for r in rows)]
