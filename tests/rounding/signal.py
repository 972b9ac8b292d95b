"""Signals: filters, spectra, enhancement."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rounding.registry import STATE, SUM, Built, Domain, Net, mse

case = Domain("signal")


def _waves(length: int = 256, scale: float = 1.0) -> Tensor:
    return torch.randn(4, 1, length) * scale


@case("fir", "enhancer", "masking", "wavenet", row=SUM, scale=1.0)
def denoiser(how: str) -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = torch.tanh(net.first(x))
        if how == "wavenet":
            y = y + torch.tanh(net.dilated(y)) * torch.sigmoid(net.gate(y))
        if how == "masking":
            return x * torch.sigmoid(net.last(y))
        return x + 0.01 * net.last(y)

    def loss(out: Tensor, x: Tensor) -> Tensor:
        return (out[..., 1:] - out[..., :-1] - x[..., 1:] + x[..., :-1]).square().mean() * 1e4

    model = Net(
        forward,
        first=nn.Conv1d(1, 8, 5, padding=2),
        dilated=nn.Conv1d(8, 8, 3, padding=4, dilation=4),
        gate=nn.Conv1d(8, 8, 3, padding=4, dilation=4),
        last=nn.Conv1d(8, 1, 5, padding=2),
    )
    return model, lambda: (((x := 1 + torch.rand(4, 1, 128)),), (x,)), loss


@case("si-sdr", "spectral", "multi-stft", "cepstrum", scale=64.0)
def spectral_losses(how: str) -> Built:
    def loss(out: Tensor, y: Tensor) -> Tensor:
        out, y = out.squeeze(1), y.squeeze(1)
        if how == "si-sdr":
            along = (out * y).sum(1, keepdim=True) / y.square().sum(1, keepdim=True) * y
            return -10 * torch.log10(along.square().sum(1) / (out - along).square().sum(1)).mean()
        found = torch.zeros(())
        for size in (32, 16) if how == "multi-stft" else (32,):
            a, b = (torch.stft(v, size, window=torch.hann_window(size), return_complex=True).abs() for v in (out, y))
            found = found + (
                (torch.log(a + 1e-4) - torch.log(b + 1e-4)).abs().mean()
                if how != "spectral"
                else (a - b).norm() / b.norm()
            )
        return found

    model = nn.Sequential(nn.Conv1d(1, 8, 5, padding=2), nn.Tanh(), nn.Conv1d(8, 1, 5, padding=2))
    return model, lambda: ((_waves(),), (_waves(),)), loss


@case("fft", "fourier-layer", "convolution")
def in_frequency(how: str) -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.into(x).float()
        if how == "convolution":
            n = y.shape[1]
            y = torch.fft.irfft(torch.fft.rfft(y, 2 * n, dim=1) * torch.fft.rfft(net.kernel, 2 * n, dim=0), dim=1)[
                :, :n
            ]
        elif how == "fft":
            y = torch.fft.fft(torch.fft.fft(y, dim=2), dim=1).real
        else:
            modes = torch.fft.rfft(y, dim=1)[:, :6]
            y = y + torch.fft.irfft(
                torch.einsum("bmi,mio->bmo", modes, torch.view_as_complex(net.modes)), n=y.shape[1], dim=1
            )
        return net.out(F.gelu(y))

    model = Net(
        forward,
        into=nn.Linear(2, 8),
        out=nn.Linear(8, 1),
        kernel=nn.Parameter(torch.randn(32, 8) * 0.1),
        modes=nn.Parameter(torch.randn(6, 8, 8, 2) * 0.1),
    )
    return model, lambda: ((torch.randn(4, 32, 2),), (torch.randn(4, 32, 1),)), mse


@case("iir", "envelope", "phase", row=STATE)
def recursive_filter(how: str) -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        drive, y, seen = net.into(x), torch.zeros(4, 8), []
        for t in range(10):
            if how == "iir":
                y = 0.98 * y + 0.02 * drive[:, t]
            elif how == "envelope":
                y = torch.maximum(drive[:, t].abs(), y * 0.99)
            else:
                y = y + 6.0 + 0.1 * torch.tanh(drive[:, t])
            seen.append(torch.sin(y) if how == "phase" else y)
        return net.out(torch.stack(seen, 1))

    return (
        Net(forward, into=nn.Linear(2, 8), out=nn.Linear(8, 1)),
        lambda: ((torch.randn(4, 10, 2),), (torch.randn(4, 10, 1),)),
        mse,
    )
