"""Train a GPT on the bytes of text files: alone, on the GPUs of one host, or on several hosts.

    python examples/train_gpt.py README.md
    torchrun --nproc-per-node 2 examples/train_gpt.py README.md --reduce low --accumulate 4
    torchrun --nproc-per-node 2 examples/train_gpt.py README.md --save run.ckpt          # and --resume run.ckpt
    torchrun --nproc-per-node 2 examples/train_gpt.py README.md --shard update           # masters and moments in shares
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 examples/train_gpt.py TEXT

Each rank takes its own places of the text; gradients are averaged by collectives in the emitted step.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mpcompile import load_checkpoint, mpcompile, save_checkpoint


class Block(nn.Module):
    """Causal attention and a feed-forward net, each behind a norm, each added to the stream: [batch, time, width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, length, 3 * self.heads, width // self.heads).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(*heads.chunk(3, dim=1), is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Bytes in, the loss of the next ones out."""

    def __init__(self, length: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.words(x) + self.places.weight[: x.shape[1]]
        return F.cross_entropy(self.head(self.norm(self.blocks(h))).flatten(0, 1), y.flatten())


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, nargs="+")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8, help="rows of a rank's microbatch")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--policy", default="bf16")
    parser.add_argument("--reduce", choices=["fp32", "low"], default="fp32", help="what gradients travel in")
    parser.add_argument("--shard", choices=["none", "update", "full"], default="none", help="what ranks hold in shares")
    parser.add_argument("--backend", choices=["inductor", "eager"], default="inductor")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--resume", type=Path)
    return parser.parse_args()


def main() -> None:
    given = options()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    several = "RANK" in os.environ  # set by torchrun
    if several:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)

    torch.manual_seed(0)  # the same weights everywhere
    model = GPT(given.length, given.width, max(1, given.width // 64), given.layers).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    mp = mpcompile(model, f"low={given.policy},reduce={given.reduce}", backend=given.backend)
    ranked = {"process_group": dist.group.WORLD, "shard": given.shard} if several else {}
    step = mp.train_step(optimizer, max_grad_norm=1.0, accumulate=given.accumulate, **ranked)
    done = load_checkpoint(given.resume, model=model, optimizer=optimizer, step=step)["done"] if given.resume else 0

    text = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in given.text)), dtype=torch.uint8).long()
    places = torch.Generator().manual_seed(1 + done * ranks + rank)  # other places on each rank
    loss, start = torch.zeros(()), time.perf_counter()
    for number in range(done, given.steps):
        for _ in range(given.accumulate):
            begins = torch.randint(len(text) - given.length - 1, (given.batch,), generator=places)
            rows = torch.stack([text[i : i + given.length + 1] for i in begins.tolist()]).to(device, non_blocking=True)
            loss = step(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()).loss
        if number == done:  # the first one compiles
            float(loss)
            start = time.perf_counter()
        if rank == 0 and (number + 1) % 10 == 0:
            print(f"\rstep {number + 1} of {given.steps}, loss {float(loss):.3f}", end="", flush=True)
    last, seconds = float(loss), time.perf_counter() - start
    tokens = (given.steps - done - 1) * given.accumulate * given.batch * given.length * ranks
    if rank == 0:
        memory = f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB at most" if cuda else "on a CPU"
        print(f"\n{ranks} ranks, {tokens / seconds:,.0f} tokens/s, {memory}, loss {last:.4f}")
    if given.save and (rank == 0 or given.shard != "none"):  # shares are gathered by all; the first rank writes
        save_checkpoint(given.save, model=model, optimizer=optimizer, step=step, extra={"done": given.steps})
    if several:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
