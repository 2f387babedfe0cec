"""The table of all rows, and what the figures say of each claim."""

from typing import Any

from rich.console import Console
from rich.table import Table

from scripts.bench_gpu.bench import Row

COLUMNS = (
    ("median_s", "ms", 1e3),
    ("floor_s", "floor ms", 1e3),
    ("of_floor", "of floor", 1.0),
    ("over_dense", "over dense", 1.0),
    ("tflops", "TFLOP/s", 1.0),
    ("gb_s", "GB/s", 1.0),
    ("relative_error", "error", 1.0),
    ("density", "density", 1.0),
    ("python_share", "Python", 1.0),
    ("host_s", "host ms", 1e3),
    ("first_s", "first ms", 1e3),
)
Sections = dict[str, dict[str, Any]]


def show(sections: Sections, targets: list[Row], console: Console) -> None:
    """Print a line of each row, then each claim."""
    table = Table("section", "case", *(title for _, title, _ in COLUMNS), "note")
    for name, section in sections.items():
        for row in section["rows"]:
            cells = [_cell(row.get(key), scale) for key, _, scale in COLUMNS]
            note = row.get("error") or row.get("skipped") or ""
            table.add_row(name, row["case"], *cells, str(note).splitlines()[0][:80] if note else "")
        if section["status"] != "ok":
            table.add_row(name, section["status"], *[""] * len(COLUMNS), section.get("why", ""))
    console.print(table)
    claims = Table("claim", "measured", "wanted", "met")
    for target in targets:
        met = {True: "yes", False: "NO", None: "not measured"}[target["met"]]
        claims.add_row(target["claim"], _cell(target["measured"], 1.0), target["wanted"], met)
    console.print(claims)


def _cell(value: object, scale: float) -> str:
    if not isinstance(value, int | float):
        return ""
    return f"{value * scale:.4g}"


def targets(sections: Sections) -> list[Row]:
    """Each claim with what was measured, None where nothing was."""
    return [
        _target("largest relative error of a kernel", _worst_error(sections), "<", 1e-2),
        _target(
            "block-sparse prefill at density 0.10, over the best dense kernel's time",
            _value(sections, "prefill", "density 0.1: attention", "over_dense"), "<=", 0.15,
        ),
        _target(
            "block-sparse prefill at density 1.0, speed over the best dense kernel's",
            _inverse(_value(sections, "prefill", "density 1: attention", "over_dense")), ">=", 0.6,
        ),
        _target(
            "selection with blocks of 128, over the best dense kernel's time",
            _value(sections, "selection", "planted 1/10, blocks of 128: parts", "over_dense"),
            "<", 0.05,
        ),
        _target(
            "decode attention of 8 x 131072, bytes per second over the copy's",
            _value(sections, "decode", "triton: 8 x 131072", "of_floor"), ">=", 0.85,
        ),
        _target("largest share of Python in a decode step", _worst_share(sections), "<", 0.10),
    ]  # fmt: skip


def _target(claim: str, measured: float | None, relation: str, limit: float) -> Row:
    met = None
    if measured is not None:
        met = {"<": measured < limit, "<=": measured <= limit, ">=": measured >= limit}[relation]
    return {"claim": claim, "measured": measured, "wanted": f"{relation} {limit}", "met": met}


def _value(sections: Sections, section: str, case: str, key: str) -> float | None:
    rows = sections.get(section, {}).get("rows", [])
    return next((row.get(key) for row in rows if row["case"] == case), None)


def _inverse(value: float | None) -> float | None:
    return 1.0 / value if value else None


def _worst_error(sections: Sections) -> float | None:
    """None if any case could not be compared: then the claim is not shown."""
    rows = sections.get("parity", {}).get("rows", [])
    errors = [row.get("relative_error") for row in rows]
    return max(errors) if errors and None not in errors else None


def _worst_share(sections: Sections) -> float | None:
    """Of steps in CUDA graphs, where any were."""
    rows = [
        row
        for name in ("llama", "default_model")
        for row in sections.get(name, {}).get("rows", [])
        if row.get("python_share") is not None
    ]
    rows = [row for row in rows if row["cuda_graphs"]] or rows
    return max((row["python_share"] for row in rows), default=None)
