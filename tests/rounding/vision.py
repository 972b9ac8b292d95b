"""Images: convolutions, patches, coordinates, segmentation, keypoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rounding.registry import COORDINATES, RAW, TABLE, Built, Domain, Net, cross_entropy, mlp, mse

case = Domain("vision")


def _images(
    size: int = 16, classes: int = 5, scale: float = 1.0, shift: float = 0.0
) -> tuple[tuple[Tensor], tuple[Tensor]]:
    return (torch.randn(4, 3, size, size) * scale + shift,), (torch.randint(0, classes, (4,)),)


def _conv(a: int, b: int, stride: int = 1, kernel: int = 3, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(a, b, kernel, stride, kernel // 2, groups=groups)


ACTS = (nn.ReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Mish, nn.ELU, nn.LeakyReLU, nn.Softplus, nn.PReLU, nn.Tanh)


@case(*ACTS)
def plain_cnn(act: type[nn.Module]) -> Built:
    model = nn.Sequential(
        _conv(3, 8), act(), _conv(8, 16, 2), act(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)
    )
    return model, _images, cross_entropy


@case("batch", "group", "instance", "layer")
def normed_cnn(how: str) -> Built:
    made = {
        "batch": nn.BatchNorm2d,
        "group": lambda n: nn.GroupNorm(4, n),
        "instance": lambda n: nn.InstanceNorm2d(n, affine=True),
        "layer": lambda n: nn.GroupNorm(1, n),
    }[how]
    model = nn.Sequential(
        _conv(3, 8),
        made(8),
        nn.ReLU(),
        _conv(8, 16, 2),
        made(16),
        nn.ReLU(),
        nn.AvgPool2d(4),
        nn.Flatten(),
        nn.Linear(64, 5),
    )
    return model, _images, cross_entropy


@case("bytes", "mean-std", "batch-norm", row=RAW)
def raw_pixels(how: str) -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = {
            "bytes": lambda: x.float() / 255.0,
            "mean-std": lambda: (x - net.mean) / net.std,
            "batch-norm": lambda: net.norm(x),
        }[how]()
        return net.body(x)

    body = nn.Sequential(_conv(3, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    model = Net(
        forward, mean=torch.full((3, 1, 1), 120.0), std=torch.full((3, 1, 1), 3.0), norm=nn.BatchNorm2d(3), body=body
    )
    if how == "bytes":
        return (
            model,
            lambda: ((torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8),), (torch.randint(0, 5, (4,)),)),
            cross_entropy,
        )
    return model, lambda: _images(scale=3.0, shift=120.0), cross_entropy


class _Residual(nn.Module):
    def __init__(self, wide: int, pre: bool) -> None:
        super().__init__()
        self.a, self.b, self.pre = _conv(wide, wide), _conv(wide, wide), pre
        self.m, self.n = nn.BatchNorm2d(wide), nn.BatchNorm2d(wide)

    def forward(self, x: Tensor) -> Tensor:
        if self.pre:
            return x + self.b(F.relu(self.n(self.a(F.relu(self.m(x))))))
        return F.relu(x + self.n(self.b(F.relu(self.m(self.a(x))))))


@case((True, 2), (False, 2), (False, 4))
def residual_cnn(pre: bool, deep: int) -> Built:
    model = nn.Sequential(
        _conv(3, 8), *[_Residual(8, pre) for _ in range(deep)], nn.AvgPool2d(8), nn.Flatten(), nn.Linear(32, 5)
    )
    return model, _images, cross_entropy


@case("separable", "squeeze", "shuffle", "inverted", "dense", "dilated", "grouped", "bottleneck")
def blocks(how: str) -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x)
        if how == "squeeze":
            x = x * torch.sigmoid(net.up(F.relu(net.down(x.mean((2, 3), keepdim=True)))))
        elif how == "shuffle":
            x = net.point(x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2))
        elif how == "dense":
            x = torch.cat([x, F.relu(net.point(x))], 1)[:, 4:12]
        elif how == "dilated":
            x = net.dilated(F.relu(x))
        elif how == "grouped":
            x = net.grouped(F.relu(x))
        elif how == "bottleneck":
            x = x + net.up(F.relu(net.down(F.relu(x))))
        elif how == "inverted":
            x = x + net.narrow(F.relu6(net.depth2(F.relu6(net.wide(x)))))
        else:
            x = net.point(F.relu(net.depth(x)))
        return net.head(x.mean((2, 3)))

    model = Net(
        forward,
        stem=_conv(3, 8),
        down=nn.Conv2d(8, 4, 1),
        up=nn.Conv2d(4, 8, 1),
        point=nn.Conv2d(8, 8, 1),
        dilated=nn.Conv2d(8, 8, 3, padding=2, dilation=2),
        grouped=_conv(8, 8, groups=4),
        depth=_conv(8, 8, groups=8),
        wide=nn.Conv2d(8, 16, 1),
        depth2=_conv(16, 16, groups=16),
        narrow=nn.Conv2d(16, 8, 1),
        head=nn.Linear(8, 5),
    )
    return model, _images, cross_entropy


@case("max", "avg", "adaptive-max", "lp", "fractional")
def pooling(how: str) -> Built:
    pool = {
        "max": nn.MaxPool2d(2),
        "avg": nn.AvgPool2d(2),
        "adaptive-max": nn.AdaptiveMaxPool2d(4),
        "lp": nn.LPPool2d(2, 2),
        "fractional": nn.AdaptiveAvgPool2d(5),
    }[how]
    model = Net(
        lambda net, x: net.head(net.pool(F.relu(net.conv(x))).mean((2, 3))),
        conv=_conv(3, 8),
        pool=pool,
        head=nn.Linear(8, 5),
    )
    return model, _images, cross_entropy


@case("learned", "sine", "fixed", "relative")
def vit(position: str) -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.patch(x).flatten(2).transpose(1, 2)
        if position == "learned":
            x = x + net.position
        elif position in ("sine", "fixed"):
            x = x + net.table
        x = torch.cat([net.cls.expand(len(x), 1, -1), x], 1)
        for norm, attention, norm2, body in zip(net.norms, net.attentions, net.norms2, net.bodies, strict=True):
            q, k, v = attention(norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            scores = q @ k.transpose(-1, -2) / 8**0.5
            if position == "relative":
                scores = scores + net.relative[net.index.view(-1)].view(17, 17, 2).permute(2, 0, 1)
            x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
            x = x + body(norm2(x))
        return net.head(net.final(x)[:, 0])

    parts = [
        nn.ModuleList(make() for _ in range(2))
        for make in (
            lambda: nn.LayerNorm(16),
            lambda: nn.Linear(16, 48),
            lambda: nn.LayerNorm(16),
            lambda: mlp(16, 32, 16, act=nn.GELU),
        )
    ]
    model = Net(
        forward,
        patch=nn.Conv2d(3, 16, 4, 4),
        position=nn.Parameter(torch.randn(1, 16, 16) * 0.02),
        table=torch.sin(torch.arange(256.0).view(1, 16, 16)),
        cls=nn.Parameter(torch.zeros(1, 1, 16)),
        norms=parts[0],
        attentions=parts[1],
        norms2=parts[2],
        bodies=parts[3],
        final=nn.LayerNorm(16),
        head=nn.Linear(16, 5),
        relative=nn.Parameter(torch.randn(20, 2) * 0.1),
        index=torch.randint(0, 20, (17, 17)),
    )
    return model, _images, cross_entropy


@case("bias", "both", row=TABLE)
def window_attention(how: str) -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.patch(x).flatten(2).transpose(1, 2).reshape(-1, 16, 16)
        q, k, v = net.qkv(net.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        bias = net.table[net.index.view(-1)].view(16, 16, 2).permute(2, 0, 1)
        scores = q @ k.transpose(-1, -2) / 8**0.5 + bias
        if how == "both":
            scores = (scores.unflatten(0, (-1, 4)) + net.mask[:, None]).flatten(0, 1)
        x = x + net.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return net.head(x.unflatten(0, (4, -1)).mean((1, 2)))

    mask = torch.where(torch.rand(4, 16, 16) < 0.3, -100.0, 0.0)
    model = Net(
        forward,
        patch=nn.Conv2d(3, 16, 4, 4),
        norm=nn.LayerNorm(16),
        qkv=nn.Linear(16, 48),
        out=nn.Linear(16, 16),
        table=nn.Parameter(torch.randn(49, 2) * 0.02),
        index=torch.randint(0, 49, (16, 16)),
        mask=mask,
        head=nn.Linear(16, 5),
    )
    return model, lambda: _images(32), cross_entropy


@case("pixels", "meshgrid", "normalised", "affine", "deformable", row=COORDINATES)
def warp(how: str) -> Built:
    high, wide = 8, 400

    def grid(net: Net, flow: Tensor) -> Tensor:
        if how == "affine":
            return F.affine_grid(
                net.theta + 0.01 * flow.mean((2, 3)).view(-1, 2, 1), [2, 8, high, wide], align_corners=True
            )
        if how == "normalised":
            ys, xs = torch.meshgrid(torch.linspace(-1, 1, high), torch.linspace(-1, 1, wide), indexing="ij")
            return torch.stack([xs + flow[:, 0] / wide, ys + flow[:, 1] / high], -1)
        if how == "pixels":
            ys, xs = torch.arange(high).float()[:, None], torch.arange(wide).float()
        else:
            ys, xs = torch.meshgrid(torch.arange(high).float(), torch.arange(wide).float(), indexing="ij")
        move = flow * torch.sigmoid(flow) if how == "deformable" else flow
        return torch.stack([2 * (xs + move[:, 0]) / (wide - 1) - 1, 2 * (ys + move[:, 1]) / (high - 1) - 1], -1)

    def forward(net: Net, x: Tensor) -> Tensor:
        return net.head(F.grid_sample(net.features(x), grid(net, net.flow(x)), align_corners=True))

    model = Net(
        forward,
        flow=_conv(8, 2),
        features=_conv(8, 8),
        head=_conv(8, 4),
        theta=nn.Parameter(torch.tensor([[[1.0, 0.0, 0.1], [0.0, 1.0, 0.0]]])),
    )
    return model, lambda: ((torch.randn(2, 8, high, wide),), (torch.randn(2, 4, high, wide),)), mse


@case("soft-argmax", "heat-map", "offsets", row=COORDINATES, scale=1.0)
def keypoints(how: str) -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        maps = net.maps(F.relu(net.conv(x)))
        places = torch.arange(300.0)
        if how == "heat-map":
            return maps
        weights = maps.mean(2).softmax(-1)
        if how == "soft-argmax":
            return (weights * places).sum(-1)
        return (maps.mean(2) * 2 + places)[..., ::30]

    shape = {"soft-argmax": (2, 4), "heat-map": (2, 4, 8, 300), "offsets": (2, 4, 10)}[how]
    return (
        Net(forward, conv=_conv(3, 8), maps=_conv(8, 4)),
        lambda: ((torch.randn(2, 3, 8, 300),), (torch.randn(shape) + 150,)),
        mse,
    )


@case("unet", "fpn", "pixel-shuffle", "transposed", "deeplab")
def segmentation(how: str) -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        a = F.relu(net.first(x))
        b = F.relu(net.second(F.max_pool2d(a, 2)))
        if how == "unet":
            return net.mix(torch.cat([a, F.interpolate(b, scale_factor=2.0)], 1))
        if how == "fpn":
            return net.head(a + F.interpolate(net.lateral(b), scale_factor=2.0, mode="bilinear", align_corners=False))
        if how == "pixel-shuffle":
            return net.head(F.pixel_shuffle(net.shuffle(b), 2))
        if how == "transposed":
            return net.head(net.up(b))
        pooled = b.mean((2, 3), keepdim=True).expand_as(b)
        return F.interpolate(
            net.mix(torch.cat([net.lateral(b), pooled], 1)), scale_factor=2.0, mode="bilinear", align_corners=True
        )

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out, y)

    model = Net(
        forward,
        first=_conv(3, 8),
        second=_conv(8, 16),
        mix=_conv(24, 5),
        lateral=nn.Conv2d(16, 8, 1),
        head=_conv(8, 5),
        shuffle=nn.Conv2d(16, 32, 1),
        up=nn.ConvTranspose2d(16, 8, 2, 2),
    )
    return model, lambda: ((torch.randn(2, 3, 16, 16),), (torch.randint(0, 5, (2, 16, 16)),)), loss


@case("dice", "focal", "tversky", "bce", "lovasz-like", scale=256.0)
def mask_losses(how: str) -> Built:
    def loss(out: Tensor, y: Tensor) -> Tensor:
        p = torch.sigmoid(out)
        if how == "dice":
            return 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)
        if how == "tversky":
            hit = (p * y).sum()
            return 1 - hit / (hit + 0.3 * (p * (1 - y)).sum() + 0.7 * ((1 - p) * y).sum())
        if how == "focal":
            each = F.binary_cross_entropy_with_logits(out, y, reduction="none")
            return ((1 - torch.exp(-each)) ** 2 * each).mean()
        if how == "bce":
            return F.binary_cross_entropy_with_logits(out, y)
        errors = (1 - out * (2 * y - 1)).relu().flatten().sort(descending=True).values
        return (errors * torch.linspace(1, 0, len(errors))).mean()

    model = nn.Sequential(_conv(3, 8), nn.ReLU(), _conv(8, 1))
    return model, lambda: ((torch.randn(2, 3, 16, 16),), ((torch.rand(2, 1, 16, 16) < 0.3).float(),)), loss


@case("3d", "1d", "video")
def other_ranks(how: str) -> Built:
    if how == "3d":
        model = nn.Sequential(
            nn.Conv3d(1, 4, 3, padding=1),
            nn.BatchNorm3d(4),
            nn.ReLU(),
            nn.AdaptiveAvgPool3d(1),
            nn.Flatten(),
            nn.Linear(4, 3),
        )
        return model, lambda: ((torch.randn(2, 1, 6, 6, 6),), (torch.randint(0, 3, (2,)),)), cross_entropy
    if how == "1d":
        model = nn.Sequential(
            nn.Conv1d(2, 8, 5, padding=2), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(128, 3)
        )
        return model, lambda: ((torch.randn(4, 2, 32),), (torch.randint(0, 3, (4,)),)), cross_entropy

    def forward(net: Net, x: Tensor) -> Tensor:
        seen = F.relu(net.conv(x.flatten(0, 1))).mean((2, 3)).unflatten(0, x.shape[:2])
        return net.head(seen[:, 1:] - seen[:, :-1]).mean(1)

    return (
        Net(forward, conv=_conv(3, 8), head=nn.Linear(8, 3)),
        lambda: ((torch.randn(2, 4, 3, 8, 8),), (torch.randint(0, 3, (2,)),)),
        cross_entropy,
    )


@case("coord-conv", "fourier", "nerf", "siren", row=COORDINATES)
def coordinates_in(how: str) -> Built:
    def forward(net: Net, p: Tensor) -> Tensor:
        if how == "coord-conv":
            return (
                net.conv(
                    torch.stack(
                        [p.view(1, -1, 1).expand(1, 300, 4), torch.arange(300.0).view(1, -1, 1).expand(1, 300, 4)], 1
                    )
                    / 300.0
                )
                .mean((0, 3))
                .T
            )
        if how == "siren":
            return net.out(torch.sin(30 * net.first(p[:, None] / 300.0)))
        many = 2.0 ** torch.arange(8) * 3.14159 if how == "nerf" else net.matrix
        angle = p[:, None] / 300.0 * many
        return net.body(torch.cat([angle.sin(), angle.cos()], -1))

    model = Net(
        forward,
        conv=nn.Conv2d(2, 3, 3, padding=1),
        first=nn.Linear(1, 16),
        out=nn.Linear(16, 3),
        matrix=torch.randn(8) * 10,
        body=mlp(16, 32, 3),
    )
    return model, lambda: ((torch.arange(300.0) + torch.rand(300),), (torch.randn(300, 3),)), mse
