"""How far a low residual stream is from FP32, by depth, before and after a real training.

PYTHONPATH=. python benchmarks/stream_by_depth.py [--steps 200] [--layers 6]

A character GPT is trained in FP32 on the text of Python's standard library.  Then one batch runs through the same weights three
times: in FP32, with our BF16 plan (low products forced, so that the stream is low), and with `plan=strict`, whose stream is
torch.autocast's.  Printed: the stream's relative distance to FP32 after each block, and the loss of each.
"""

from __future__ import annotations

import argparse
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mpcompile import mpcompile

WIDTH, HEADS, CONTEXT, ROWS = 64, 4, 64, 16
ROW = """[forced]  # low products cost nothing and bytes are dear: whatever may be low is
fp32 = 1.0e9
bf16 = 1.0e15
fp16 = 1.0e15
bandwidth = 1.0e10
launch = 1.0e-12
source = "made up, for this measurement"
"""


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n, s, _ = x.shape
        heads = [t.view(n, s, HEADS, -1).transpose(1, 2) for t in self.qkv(self.one(x)).chunk(3, -1)]
        seen = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).reshape(n, s, WIDTH)
        x = x + self.out(seen)
        return x + self.down(F.gelu(self.up(self.two(x))))


class CharGPT(nn.Module):
    """Gives the logits. (What is returned keeps its digits: the stream is read off the rewritten graph.)"""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Watch(fx.Interpreter):
    """Runs a rewritten graph and keeps every sum that has the stream's shape."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.sums: list[Tensor] = []

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        if n.target is torch.ops.aten.add.Tensor and found.shape == (ROWS, CONTEXT, WIDTH):
            self.sums.append(found)
        return found


def text() -> Tensor:
    """The standard library's sources, as bytes."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.tensor(list(b"".join(file.read_bytes() for file in files)[:2_000_000]))


def batch(data: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    starts = torch.randint(0, len(data) - CONTEXT - 1, (ROWS,), generator=draw)
    rows = torch.stack([data[s : s + CONTEXT + 1] for s in starts.tolist()])
    return rows[:, :-1], rows[:, 1:]


def loss_of(logits: Tensor, wanted: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten())


def measure(model: CharGPT, ids: Tensor, wanted: Tensor, row: Path) -> dict[str, tuple[float, list[float]]]:
    """Way -> (loss, the stream's relative distance to FP32 by depth)."""
    found: dict[str, tuple[float, list[float]]] = {}
    full: list[Tensor] = []
    with torch.no_grad():
        for way, fields in (("FP32", "low=fp32"), ("BF16", "low=bf16"), ("strict BF16", "low=bf16,plan=strict")):
            watch = Watch(mpcompile(model, f"{fields},device={row}", backend="eager").graph(ids))
            loss = float(loss_of(watch.run(ids), wanted))
            full = watch.sums if way == "FP32" else full
            far = [float((s.float() - f).norm() / f.norm()) for s, f in zip(watch.sums, full, strict=True)]
            found[f"{way}, stream {str(watch.sums[-1].dtype).removeprefix('torch.')}"] = loss, far[::2]
    return found


def show(when: str, found: dict[str, tuple[float, list[float]]]) -> None:
    for way, (loss, far) in found.items():
        print(f"| {when} | {way} | {loss:.4f} | {' '.join(f'{one:.4f}' for one in far)} |", flush=True)


def main(given: Sequence[str] | None = None) -> None:
    """Train and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument(
        "--row", type=Path, default=Path("stream_by_depth.toml"), help="file to write the device row to"
    )
    options = parser.parse_args(given)
    options.row.write_text(ROW)
    torch.manual_seed(0)
    draw, data, model = torch.Generator().manual_seed(0), text(), CharGPT(options.layers)
    held = batch(data, draw)
    print("| when | way | loss | distance of the stream, embedding to last block |\n|---|---|---|---|")
    show("before", measure(model, *held, options.row))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(options.steps):
        ids, wanted = batch(data, draw)
        loss = loss_of(model(ids), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    show(f"after {options.steps} steps", measure(model, *held, options.row))
    options.row.unlink()


if __name__ == "__main__":
    main()
