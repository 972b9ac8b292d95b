"""What the law of origins and ``plan="strict"`` cost: predicted seconds and kept bytes of a forward, per bench model.

    python benchmarks/rounding_price.py [--device h200] [--low bf16 fp16] [model ...]

Nothing is run: each model is captured at the shapes of `mpcompile bench --size full` (Llama with two layers) and planned
for the device's row, with the law of origins, without it, strict, and by torch.autocast's rule.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence

import torch
from torch import nn

from mpcompile import mpcompile
from mpcompile.aten.capture import export
from mpcompile.aten.exported import inline_regions
from mpcompile.compiler import decide
from mpcompile.pipeline import run
from mpcompile.report.costs import Estimate
from mpcompile.tools import bench_by_hand as by_hand
from mpcompile.tools.bench_models import WORKLOADS, Batch, Loss

MODELS = (
    "gpt2",
    "gpt2-by-hand",
    "bert",
    "bert-by-hand",
    "vit",
    "vit-by-hand",
    "resnet",
    "convnext",
    "llama",
    "llama-by-hand",
)
LAYERS = 2


def made(name: str) -> tuple[nn.Module, Batch]:
    """The model and one batch."""
    if name == "convnext":
        from transformers import ConvNextConfig, ConvNextForImageClassification

        batch = {"pixel_values": torch.randn(128, 3, 224, 224), "labels": torch.randint(0, 1000, (128,))}
        return Loss(ConvNextForImageClassification(ConvNextConfig(num_labels=1000))), batch
    work = WORKLOADS[name](True)
    build: Callable[[], nn.Module] = work.build
    if name == "llama-by-hand":
        build = functools.partial(by_hand.Llama, 128256, 2048, 2048, 8192, 32, 8, LAYERS)
    if name == "llama":
        build = _llama
    return build(), work.sample(work.rows)


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 8192}
    config = LlamaConfig(
        **sizes, num_hidden_layers=LAYERS, vocab_size=128256, use_cache=False, tie_word_embeddings=True
    )
    return Loss(LlamaForCausalLM(config))


def prices(model: nn.Module, batch: Batch, low: str, device: str) -> dict[str, tuple[float, float]]:
    """Plan -> (predicted seconds of a forward, bytes that it keeps for the backward)."""
    found = {}
    for label, plan in (("law", "global"), ("no law", "global"), ("strict", "strict")):
        wrapped = mpcompile(model, f"low={low},plan={plan},device={device}")
        module = export(model, (), batch).module()
        inline_regions(module)
        decided = decide(module, wrapped.settings, "cuda")
        passes = [one for one in decided.passes if label != "no law" or one.name != "origins"]
        graph, _ = run(decided.capture.graph, passes)
        sums = Estimate(graph, decided.policy, decided.row).breakdown()
        found[label] = sums["plan"]["total"], sums["plan"]["kept"]
        found["autocast"] = sums["autocast"]["total"], sums["autocast"]["kept"]
    return found


def row(name: str, low: str, found: dict[str, tuple[float, float]]) -> str:
    """One line of a Markdown table: milliseconds and megabytes, and what they are against those without the law."""
    base = found["no law"]
    cells = [f"{base[0] * 1e3:.2f} ms, {base[1] / 1e6:,.0f} MB"]
    cells += [f"{found[k][0] / base[0]:.3f} / {found[k][1] / base[1]:.3f}" for k in ("law", "strict", "autocast")]
    return f"| {name} {low.upper()} | {' | '.join(cells)} |"


def main(given: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--device", default="h200")
    parser.add_argument("--low", nargs="*", default=["bf16", "fp16"])
    options = parser.parse_args(given)
    print("| model | without the law | with it | strict | autocast |\n|---|---|---|---|---|")
    for name in options.models:
        model, batch = made(name)
        for low in options.low:
            print(row(name, low, prices(model, batch, low, options.device)), flush=True)


if __name__ == "__main__":
    main()
