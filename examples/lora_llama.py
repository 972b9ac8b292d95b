"""Fine-tune a Llama-shaped model by LoRA: a frozen BF16 base, FP32 adapters, the whole training step.

    python examples/lora_llama.py --tiny                         # seconds on a CPU
    python examples/lora_llama.py                                # the largest that fits on this GPU; random weights
    python examples/lora_llama.py --billions 60 --way autocast   # by PEFT + autocast + torch.compile instead

Prints the loss of each step, and at the end tokens per second and the peak memory; `--out FILE` writes them as JSON.
Nothing is downloaded: from 35 billion parameters on the blocks are those of the 405B model, as many as make the size.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

from mpcompile import mpcompile

# Width, layers, heads, key-value heads, feed-forward: Llama's published shapes, by billions of parameters. The large ones
# are few blocks of the widest (405B) rather than many of the 70B's: the same products, a quarter of the graph to compile.
SHAPES = {
    1: (2048, 16, 32, 8, 8192),
    8: (4096, 32, 32, 8, 14336),
    35: (16384, 10, 128, 8, 53248),
    50: (16384, 15, 128, 8, 53248),
    60: (16384, 18, 128, 8, 53248),
    65: (16384, 19, 128, 8, 53248),
}
VOCABULARY = 128_256


def needed(billions: int, rank: int, tokens: int) -> float:
    """Bytes on the device, about: BF16 weights, FP32 adapters with AdamW's state and gradients, what is kept and the loss."""
    width, layers, heads, pairs, inner = SHAPES[billions]
    narrow = width // heads * pairs
    block = 2 * width * width + 2 * width * narrow + 3 * width * inner
    adapter = rank * (4 * width + 2 * (width + narrow) + 3 * (width + inner))
    weights = 2 * (layers * block + 2 * VOCABULARY * width)
    kept = tokens * (2 * layers * width + 24 * inner + 12 * VOCABULARY)
    return weights + 16 * layers * adapter + kept + 1e9


def fitting(rank: int, tokens: int) -> list[int]:
    """The sizes that fit on this GPU by that sum, the largest last."""
    room = torch.cuda.mem_get_info()[1]
    return [one for one in SHAPES if needed(one, rank, tokens) < room]


def llama(billions: int, device: torch.device) -> Any:
    """A causal model with random BF16 weights, made on the device itself."""
    width, layers, heads, pairs, inner = SHAPES[billions] if billions else (32, 1, 2, 2, 64)
    config = transformers.LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=pairs,
        intermediate_size=inner, vocab_size=VOCABULARY if billions else 97, max_position_embeddings=8192, use_cache=False,
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


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--billions", type=int, choices=sorted(SHAPES), help="without it, the largest that fits")
    parser.add_argument("--way", choices=["step", "autocast"], default="step")
    parser.add_argument("--policy", default="bf16")
    parser.add_argument("--tokens", type=int, default=2048, help="of each sequence")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--no-checkpoint", action="store_true", help="keep activations instead of making them again")
    parser.add_argument("--tiny", action="store_true", help="one layer of 32, eager, on any machine")
    parser.add_argument("--out", type=Path, help="write what was measured as JSON")
    return parser.parse_args(arguments)


def chosen(given: argparse.Namespace, device: torch.device) -> int:
    """The size in billions; 0 is the tiny one. Ends the program where nothing fits, or not what was asked for."""
    if given.tiny:
        return 0
    if device.type != "cuda":
        return given.billions or 1
    sizes = fitting(given.rank, given.batch * given.tokens)
    if not sizes or (given.billions or 0) > sizes[-1]:
        raise SystemExit(f"too large for this GPU; what fits at these tokens: {sizes or 'none'} (--billions)")
    return given.billions or sizes[-1]


def timed(step: Callable[[Tensor], Tensor], ids: Tensor, steps: int) -> tuple[list[float], list[float]]:
    """Losses and seconds of each step. The peak is counted anew after the third, when everything is compiled."""
    losses, times = [], []
    for turn in range(steps):
        if turn == 3 and ids.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        losses.append(step(ids).item())
        times.append(time.perf_counter() - start)
        print(f"step {turn}: loss {losses[-1]:.4f}, {times[-1]:.2f} s", flush=True)
    return losses, times


def main(arguments: list[str] | None = None) -> list[float]:
    """Train; the losses."""
    given = parsed(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() and not given.tiny else "cpu")
    on_gpu, billions = device.type == "cuda", chosen(given, device)
    torch.manual_seed(0)
    model = adapted(llama(billions, device), given.rank, not given.no_checkpoint)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2 if given.tiny else 1e-4, fused=on_gpu)
    count, own = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in trained)
    print(f"{count / 1e9:.2f} billion parameters, {own / 1e6:.2f} million trained, on {device}", flush=True)
    if given.way == "step":
        step = by_step(model, optimizer, given.policy, "eager" if given.tiny else "inductor")
    else:
        step = by_autocast(model, optimizer, device.type, not given.tiny)
    tokens = 16 if given.tiny else given.tokens
    ids = torch.randint(0, model.config.vocab_size, (given.batch, tokens), device=device)
    held = torch.cuda.memory_allocated() if on_gpu else 0
    try:
        losses, times = timed(step, ids, given.steps)
    except torch.OutOfMemoryError as error:
        smaller = [one for one in SHAPES if one < billions]
        raise SystemExit(f"{billions} billion do not fit ({error}); try --billions {smaller[-1:]}") from error
    middle = sorted(times)[len(times) // 2]
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    said = f"peak {peak / 1e9:.1f} GB, of which {held / 1e9:.1f} are held" if on_gpu else "peak not measured"
    print(f"{given.way}: {given.batch * tokens / middle:,.0f} tokens/s (median step), {said}")
    if given.out:
        found = {
            "way": given.way, "policy": given.policy, "parameters": count, "trained": own,
            "layers": model.config.num_hidden_layers, "batch": given.batch, "tokens": tokens, "rank": given.rank,
            "checkpoint": not given.no_checkpoint,
            "losses": losses, "seconds": times, "tokens_per_second": given.batch * tokens / middle, "held_bytes": held,
            "peak_bytes": peak, "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "versions": {one.__name__: str(one.__version__) for one in (torch, transformers, peft)},
        }  # fmt: skip
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return losses


if __name__ == "__main__":
    main()
