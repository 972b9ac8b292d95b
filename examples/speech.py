"""Speech with the CTC loss: a convolutional front end, a bidirectional LSTM, labels shorter than the frames."""

from __future__ import annotations

import torch
from curves import Wrap, both
from torch import Tensor, nn
from torch.nn import functional as F


class Net(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.front = nn.Sequential(nn.Conv1d(20, width, 5, stride=2, padding=2), nn.GELU())
        self.listens, self.says = nn.LSTM(width, width, batch_first=True, bidirectional=True), nn.Linear(2 * width, 12)

    def forward(self, sound: Tensor) -> Tensor:
        heard, _ = self.listens(self.front(sound).transpose(1, 2))
        return self.says(heard)  # type: ignore[no-any-return]


def train(wrap: Wrap, steps: int) -> list[float]:
    """The drop-in: CTC's lengths are numbers that only the data have, and a training step is traced without data."""
    model = Net()
    hears, optimizer = wrap(model), torch.optim.AdamW(model.parameters(), 3e-3)
    sound, labels = torch.randn(8, 20, 64), torch.randint(1, 12, (8, 6))
    frames, lengths = torch.full((8,), 32), torch.randint(3, 7, (8,))
    losses = []
    for _ in range(steps):
        chances = hears(sound).log_softmax(-1).transpose(0, 1)
        loss = F.ctc_loss(chances, labels, frames, lengths, zero_infinity=True)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(arguments: list[str] | None = None) -> tuple[list[float], list[float]]:
    return both(__doc__ or "", train, arguments, steps=60)


if __name__ == "__main__":
    main()
