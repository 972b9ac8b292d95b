"""Fine-tune a Llama-shaped model by LoRA: a frozen BF16 base, FP32 adapters, the whole training step.

    python examples/lora_llama.py --tiny                         # seconds on a CPU
    python examples/lora_llama.py --billions 60 --tokens 2048    # one GPU of 141 GB; random weights, nothing is downloaded
    python examples/lora_llama.py --billions 60 --way autocast   # the same by PEFT + autocast + torch.compile

Prints the loss of each step, and at the end tokens per second and the peak memory.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

from mpcompile import mpcompile

# Width, layers, heads, key-value heads, feed-forward: the published Llama shapes, by billions of parameters.
SHAPES = {
    1: (2048, 16, 32, 8, 8192),
    8: (4096, 32, 32, 8, 14336),
    35: (8192, 40, 64, 8, 28672),
    53: (8192, 61, 64, 8, 28672),
    60: (8192, 69, 64, 8, 28672),
    70: (8192, 80, 64, 8, 28672),
}


def llama(billions: int, device: torch.device) -> Any:
    """A causal model with random BF16 weights, made on the device itself."""
    width, layers, heads, pairs, inner = SHAPES[billions] if billions else (32, 1, 2, 2, 64)
    config = transformers.LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=pairs,
        intermediate_size=inner, vocab_size=128_256 if billions else 97, max_position_embeddings=8192, use_cache=False,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)


def adapted(model: Any, rank: int, checkpoint: bool) -> Any:
    """FP32 adapters (`autocast_adapter_dtype`) on every product of the attention and of the feed-forward."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    if checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules=names), autocast_adapter_dtype=True)


def by_step(model: Any, optimizer: Any, policy: str, backend: str) -> Callable[[Tensor], Tensor]:
    step = mpcompile(model, policy, backend=backend).train_step(optimizer, max_grad_norm=1.0)
    return lambda ids: step(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]


def by_autocast(model: Any, optimizer: Any, kind: str, compiled: bool) -> Callable[[Tensor], Tensor]:
    run = torch.compile(model) if compiled else model
    trained = [p for p in model.parameters() if p.requires_grad]

    def step(ids: Tensor) -> Tensor:
        with torch.autocast(kind, torch.bfloat16):
            loss: Tensor = run(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def main(arguments: list[str] | None = None) -> list[float]:
    """Train; the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--billions", type=int, choices=sorted(SHAPES), default=60)
    parser.add_argument("--way", choices=["step", "autocast"], default="step")
    parser.add_argument("--policy", default="bf16")
    parser.add_argument("--tokens", type=int, default=2048, help="of each sequence")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--no-checkpoint", action="store_true", help="keep activations instead of making them again")
    parser.add_argument("--tiny", action="store_true", help="one layer of 32, eager, on any machine")
    given = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() and not given.tiny else "cpu")
    torch.manual_seed(0)
    model = adapted(llama(0 if given.tiny else given.billions, device), given.rank, not given.no_checkpoint)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2 if given.tiny else 1e-4, fused=device.type == "cuda")
    count = sum(p.numel() for p in model.parameters())
    print(
        f"{count / 1e9:.2f} billion parameters, {sum(p.numel() for p in trained) / 1e6:.2f} million trained, on {device}"
    )
    if given.way == "step":
        step = by_step(model, optimizer, given.policy, "eager" if given.tiny else "inductor")
    else:
        step = by_autocast(model, optimizer, device.type, not given.tiny)
    tokens = 16 if given.tiny else given.tokens
    ids = torch.randint(0, model.config.vocab_size, (given.batch, tokens), device=device)
    losses, times = [], []
    for turn in range(given.steps):
        start = time.perf_counter()
        losses.append(step(ids).item())
        times.append(time.perf_counter() - start)
        print(f"step {turn}: loss {losses[-1]:.4f}, {times[-1]:.2f} s", flush=True)
    best = sorted(times)[len(times) // 2]
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else float("nan")
    print(f"{given.way}: {given.batch * tokens / best:,.0f} tokens/s (median step), peak {peak:.1f} GB")
    return losses


if __name__ == "__main__":
    main()
