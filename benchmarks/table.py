"""Print the tables of docs/benchmarks.md from the files that `mpcompile bench` and `kernels.py` wrote.

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


GPU = [
    ("h100-bf16.json", "gpt2", "GPT-2 124M, 16 x 1024 tokens, BF16"),
    ("h100-fp16.json", "gpt2", "the same, FP16 (GradScaler, dynamic scale)"),
    ("h100-bf16-micro.json", "gpt2", "the same, BF16, as 8 microbatches of 2"),
    ("h100-bf16.json", "bert", "BERT-base, 32 x 512 tokens, BF16"),
    ("h100-bf16.json", "resnet", "ResNet-50, 256 images, channels_last, BF16"),
    ("h100-bf16.json", "mlp", "MLP, 4 layers of 4096, 4096 rows, BF16"),
]
PROFILED = {"vit": "ViT-B/16, 128 images, BF16 (profile)", "llama": "Llama 1B, 4 x 2048 tokens, BF16 (profile)"}
GPU_HEAD = (
    "| | eager FP32 | eager TF32 | compiled FP32 | pure BF16 | drop-in | peak | step | peak | `recompute=True` | peak | MFU |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|"
)

HAND = {
    "gpt2-by-hand": "GPT-2 124M by hand, 16 x 1024 tokens, BF16",
    "gpt2-by-hand-1x256": "GPT-2 124M by hand, 1 x 256 tokens, BF16",
    "llama-by-hand": "Llama 1.2B by hand, 4 x 2048 tokens, BF16",
}
HAND_HEAD = (
    "| | peer, ms | drop-in | with the peer in CUDA graphs | peak | step | with the peer in CUDA graphs | peak | MFU |\n"
    "|---|---|---|---|---|---|---|---|---|"
)
GRAPHS = "compile+autocast graphs"


def main() -> None:
    print(hand_table())
    print()
    print(table(load("cpu-bf16.json"), load("cpu-bf16-micro.json")))
    print()
    print(gpu_table())


def hand_table() -> str:
    """The same for models as an expert writes them, against the peer with and without `mode="reduce-overhead"`."""
    rows, found = [HAND_HEAD], load("h200-by-hand.json")
    for model, name in HAND.items():
        ways = by_name(found, model)
        cells = [f"{1e3 * ways[PEER]['seconds']:.1f}"]
        for way in ("mpcompile", "mpcompile step"):
            if way not in ways or ways[way]["seconds"] is None:
                cells += ["", "", ""]
                continue
            peak = f"{ways[way]['peak'] / ways[PEER]['peak']:.2f}"
            cells += [f"{ways[way]['versus'][PEER]:.2f}", f"{ways[way]['versus'][GRAPHS]:.2f}", peak]
        best = max(ways[way]["mfu"] for way in ways if way.startswith("mpcompile") and ways[way]["mfu"])
        rows.append(f"| {name} | {' | '.join([*cells, f'{100 * best:.0f} %'])} |")
    return "\n".join(rows)


def gpu_table() -> str:
    """Speeds and peaks as ratios to torch.compile + autocast + fused AdamW; MFU in per cent, of the faster of our ways."""
    rows = [GPU_HEAD]
    for file, model, name in GPU:
        ways = by_name(load(file), model)
        cells = [speed(ways, way) for way in ("eager FP32", "eager TF32", "compile FP32", "pure BF16")]
        for way in ("mpcompile", "mpcompile step", "mpcompile step remake"):
            cells += [speed(ways, way), f"{ways[way]['peak'] / ways[PEER]['peak']:.2f}" if way in ways else ""]
        best = max(ways[way]["mfu"] for way in ways if way.startswith("mpcompile"))
        rows.append(f"| {name} | {' | '.join([*cells, f'{100 * best:.0f} %'])} |")
    profiles = load("h100-kernels.json")["models"]
    for model, name in PROFILED.items():
        wall = {way: one["wall"] for way, one in profiles[model].items()}
        ours, remade = (f"{wall[PEER] / wall[way]:.2f}" for way in ("mpcompile", "mpcompile step"))
        rows.append(f"| {name} |  |  |  |  | {ours} |  |  |  | {remade} |  |  |")
    return "\n".join(rows)


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
