"""Print the README's CPU table from the files that `mpcompile bench` wrote.

python benchmarks/table.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PEER = "compile+autocast"
NAMES = {
    "gpt2": "GPT-2-like, 4 x 256 tokens",
    "bert": "BERT-like, 8 x 128 tokens",
    "resnet": "ResNet-like, 8 images of 128²",
    "llama": "Llama-like, 4 x 256 tokens",
    "vit": "ViT-like, 8 images of 224²",
    "mlp": "MLP, 8 layers of 64, 32 rows",
}
HEAD = (
    "| | drop-in: speed | kept | peak | step: speed | kept | peak | 8 microbatches: drop-in | step |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    print(table(load("cpu-bf16.json"), load("cpu-bf16-micro.json")))


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return found


def table(large: dict[str, Any], micro: dict[str, Any]) -> str:
    """One row a model; every figure is a ratio to torch.compile + autocast + fused AdamW."""
    rows = [HEAD]
    for model, name in NAMES.items():
        if model not in large["models"]:
            continue
        ways = by_name(large, model)
        few = by_name(micro, model) if model in micro["models"] else {}
        cells = [*figures(ways, "mpcompile"), *figures(ways, "mpcompile step")]
        cells += [speed(few, way) for way in ("mpcompile", "mpcompile step")]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def by_name(found: dict[str, Any], model: str) -> dict[str, Any]:
    return {one["candidate"]: one for one in found["models"][model]["results"] if not one["error"]}


def figures(ways: dict[str, Any], name: str) -> list[str]:
    one, peer = ways[name], ways[PEER]
    return [speed(ways, name), f"{one['saved'] / peer['saved']:.2f}", f"{one['peak'] / peer['peak']:.2f}"]


def speed(ways: dict[str, Any], name: str) -> str:
    return f"{ways[name]['versus'][PEER]:.2f}" if name in ways else ""


if __name__ == "__main__":
    main()
