"""Draws docs/img/strategy-*.svg: who holds what under each strategy, and what moves per layer.

python scripts/draw_strategies.py [FOLDER]
"""

import sys
from pathlib import Path
from typing import NamedTuple

TOKENS, HEADS = 8, 4  # columns and rows of the picture of KV, and of weights
CELL, GAP = 16, 3
STYLE = """
  text { font-family: Helvetica, Arial, sans-serif; font-size: 13px; fill: #1b1f24; }
  .head { font-weight: bold; }
  .small { font-size: 12px; fill: #444; }
  .mid { text-anchor: middle; }
  .frame { fill: #f6f7f9; stroke: #8a929c; }
  .none { fill: #fff; stroke: #c3c8ce; }
  .weights { fill: #8f6bb3; stroke: #5d3f80; }
  .step { fill: #6fa3dc; stroke: #2b5f9e; }
  .kv { fill: #7cba73; stroke: #3b7a34; }
  .move { stroke: #333; stroke-width: 1.6; fill: none;
    marker-end: url(#tip); marker-start: url(#back); }
"""


class Panel(NamedTuple):
    """One kind of step on two ranks: cells of each picture that rank 0 has; rank 1 the rest.

    `shared_*`: rank 1 has the same cells.
    """

    title: str
    weights: set[int]  # of HEADS slices
    shared_weights: bool
    step: set[int]  # of TOKENS new tokens
    shared_step: bool
    kv: set[tuple[int, int]]  # (token, head)
    moves: tuple[str, ...]


ALL_WEIGHTS, HALF = set(range(HEADS)), set(range(HEADS // 2))
ZIGZAG = {0, 1, 6, 7}
BY_TOKEN = {(token, head) for token in ZIGZAG for head in range(HEADS)}
BY_HEAD = {(token, head) for token in range(TOKENS) for head in HALF}
EVERY = set(range(TOKENS))

PREFILL_RING = Panel(
    "prefill step (SP)", ALL_WEIGHTS, True, ZIGZAG, False, BY_TOKEN,
    ("K, V shards", "round the ring", "f S k"),
)  # fmt: skip
DECODE_SHIP = Panel(
    "decode step (SP)", ALL_WEIGHTS, True, {0}, False, BY_TOKEN,
    ("q there,", "(o, lse) back", "(P-1)(2q + 4H)"),
)  # fmt: skip
TENSOR = Panel(
    "every step (TP)", HALF, False, EVERY, True, BY_HEAD,
    ("two all-reduces", "of hidden states", "4 f n E e"),
)  # fmt: skip
STRATEGIES = {
    "csps": [
        PREFILL_RING._replace(moves=("rows, masses;", "chosen K, V blocks", "u f S k + ...")),
        DECODE_SHIP,
    ],
    "ring": [PREFILL_RING, DECODE_SHIP],
    "sarathi": [TENSOR],
    "shift": [
        Panel(
            "large steps (SP)", ALL_WEIGHTS, True, {0, 1, 2, 3}, False, BY_HEAD,
            ("all-to-all of q, k, v;", "of o back", "f (n/P)(2q + k)"),
        ),
        TENSOR._replace(title="small steps (TP)"),
    ],
}  # fmt: skip


def cell(x: int, y: int, style: str) -> str:
    return f'<rect class="{style}" x="{x}" y="{y}" width="{CELL}" height="{CELL}"/>'


def text(x: int, y: int, words: str, style: str = "") -> str:
    return f'<text class="{style}" x="{x}" y="{y}">{words}</text>'


def rank(panel: Panel, index: int, x: int, y: int) -> list[str]:
    """One rank's box: weights, new tokens of the step, KV."""

    def has(cells: set, item: object, shared: bool) -> bool:
        return shared or (item in cells) == (index == 0)

    pitch = CELL + GAP
    drawn = [f'<rect class="frame" x="{x}" y="{y}" width="262" height="172" rx="6"/>']
    drawn.append(text(x + 12, y + 22, f"rank {index}", "head"))
    drawn.append(text(x + 12, y + 50, "weights", "small"))
    for part in range(HEADS):
        style = "weights" if has(panel.weights, part, panel.shared_weights) else "none"
        drawn.append(cell(x + 92 + part * pitch, y + 38, style))
    drawn.append(text(x + 12, y + 76, "new tokens", "small"))
    for token in range(TOKENS):
        decode = panel.step == {0}
        mine = has(panel.step, token, panel.shared_step)
        if decode:  # one token, computed by the master alone
            mine = token == 0 and index == 0
        drawn.append(cell(x + 92 + token * pitch, y + 64, "step" if mine else "none"))
    drawn.append(text(x + 12, y + 104, "KV: heads", "small"))
    drawn.append(text(x + 12, y + 119, "by tokens", "small"))
    for token in range(TOKENS):
        for head in range(HEADS):
            style = "kv" if has(panel.kv, (token, head), shared=False) else "none"
            drawn.append(cell(x + 92 + token * pitch, y + 90 + head * pitch, style))
    return drawn


def draw(name: str, panels: list[Panel]) -> str:
    """The SVG of one strategy."""
    height = 214 * len(panels) + 6
    alt = "; ".join(f"{panel.title}: {' '.join(panel.moves)}" for panel in panels)
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 740 {height}" role="img" '
        f'aria-label="{name} on two ranks. {alt}">',
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" '
        'markerHeight="8" orient="auto"><path d="M0 1 9 5 0 9z" fill="#333"/></marker>'
        '<marker id="back" viewBox="0 0 10 10" refX="1" refY="5" markerWidth="8" '
        'markerHeight="8" orient="auto"><path d="M10 1 1 5 10 9z" fill="#333"/></marker>'
        f"<style>{STYLE}</style></defs>",
        f'<rect width="740" height="{height}" fill="#fff"/>',
    ]
    for index, panel in enumerate(panels):
        y = 32 + 214 * index
        drawn.append(text(10, y - 10, f"{name}: {panel.title}", "head"))
        drawn += rank(panel, 0, 10, y) + rank(panel, 1, 468, y)
        drawn.append(f'<path class="move" d="M280 {y + 86} H460"/>')
        first, second, formula = panel.moves
        drawn.append(text(370, y + 60, first, "mid"))
        drawn.append(text(370, y + 76, second, "mid"))
        drawn.append(text(370, y + 106, formula, "mid small"))
    return "\n".join([*drawn, "</svg>", ""])


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/img")
    for name, panels in STRATEGIES.items():
        path = folder / f"strategy-{name}.svg"
        path.write_text(draw(name, panels))
        print(path)


if __name__ == "__main__":
    main()
