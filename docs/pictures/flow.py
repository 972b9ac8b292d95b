"""Draws flow.svg, the README's picture: ``python docs/pictures/flow.py``."""

from __future__ import annotations

from pathlib import Path

BOXES = [
    ("capture", "torch.fx or ONNX", "#e8eef7"),
    ("classify", "a verdict and\na reason per node", "#e8eef7"),
    ("hazards", "ranges that\nneed FP32", "#e8eef7"),
    ("assign", "minimum cut:\nlowest total cost", "#dff0e0"),
    ("casts", "one per value,\nweights once a step", "#e8eef7"),
    ("verify", "the laws", "#e8eef7"),
]
ENDS = [
    ("run", "torch.compile, ONNX Runtime"),
    ("train_step", "forward, backward, update: one graph"),
    ("report", "every node, and why"),
]
W, H, GAP = 128, 74, 22


def text(x: float, y: float, words: str, size: int, weight: str = "normal") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" text-anchor="middle">{words}</text>'


def box(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{fill}" stroke="#5a6b7f"/>'


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#5a6b7f" stroke-width="1.5" marker-end="url(#tip)"/>'


def draw() -> str:
    width = len(BOXES) * (W + GAP) - GAP + 20
    parts = []
    for i, (name, about, fill) in enumerate(BOXES):
        x = 10 + i * (W + GAP)
        parts += [box(x, 10, W, H, fill), text(x + W / 2, 32, name, 15, "bold")]
        parts += [text(x + W / 2, 52 + 15 * j, line, 11) for j, line in enumerate(about.split("\n"))]
        if i:
            parts.append(arrow(x - GAP, 10 + H / 2, x - 4, 10 + H / 2))
    each = (width - 20 - 2 * GAP) / len(ENDS)
    for i, (name, about) in enumerate(ENDS):
        x = 10 + i * (each + GAP)
        parts += [
            box(x, 140, each, 54, "#f7f2e4"),
            text(x + each / 2, 162, name, 14, "bold"),
            text(x + each / 2, 181, about, 11),
        ]
        parts.append(arrow(width / 2 + (i - 1) * 60, 10 + H, x + each / 2, 134))
    head_of_arrow = '<path d="M0,0 L6,3 L0,6 z" fill="#5a6b7f"/>'
    marker = '<marker id="tip" markerWidth="8" markerHeight="8" refX="6" refY="3" orient="auto">'
    tip = f"<defs>{marker}{head_of_arrow}</marker></defs>"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 204" font-family="sans-serif" fill="#1d2733">'
    return "\n".join([head, tip, f'<rect width="{width}" height="204" fill="white"/>', *parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw(), encoding="utf-8")
