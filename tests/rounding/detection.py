"""Detection: boxes, anchors, heads, regions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rounding.registry import AREA, COORDINATES, Built, Domain, Net, mlp, mse

case = Domain("detection")


def _boxes(many: int = 16, wide: float = 500.0, high: float = 400.0) -> Tensor:
    corner = torch.rand(many, 2) * 50
    return torch.cat([corner, corner + torch.tensor([wide, high]) * (0.9 + 0.2 * torch.rand(many, 2))], 1)


def _iou(a: Tensor, b: Tensor) -> Tensor:
    size = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp_min(0)
    both = size[:, 0] * size[:, 1]
    area = lambda t: (t[:, 2] - t[:, 0]) * (t[:, 3] - t[:, 1])  # noqa: E731
    return both / (area(a) + area(b) - both)


@case("inside", "giou", "ciou", row=AREA)
def box_loss(how: str) -> Built:
    def forward(net: Net, x: Tensor, anchors: Tensor) -> Tensor:
        return anchors + net.head(x) * 10.0

    def loss(out: Tensor, y: Tensor) -> Tensor:
        iou = _iou(out, y)
        if how == "inside":
            return (1 - iou).mean()
        hull = torch.maximum(out[:, 2:], y[:, 2:]) - torch.minimum(out[:, :2], y[:, :2])
        if how == "giou":
            whole = hull[:, 0] * hull[:, 1]
            return (1 - iou + (whole - whole * iou) / whole).mean()
        gap = ((out[:, :2] + out[:, 2:] - y[:, :2] - y[:, 2:]) ** 2).sum(1) / 4
        ratio = lambda t: torch.atan((t[:, 2] - t[:, 0]) / (t[:, 3] - t[:, 1]))  # noqa: E731
        return (1 - iou + gap / hull.square().sum(1) + 0.4 * (ratio(out) - ratio(y)) ** 2).mean()

    return Net(forward, head=mlp(8, 32, 4)), lambda: ((torch.randn(16, 8), _boxes()), (_boxes(),)), loss


@case("area", "aspect", "iou-of-boxes", "decoded", row=AREA, scale=64.0)
def box_features(how: str) -> Built:
    def forward(net: Net, x: Tensor, anchors: Tensor) -> Tensor:
        size = anchors[:, 2:] - anchors[:, :2]
        scaled = size * torch.exp(0.05 * net.head(x)[:, :2])
        if how == "area":
            return net.out(torch.log(scaled[:, :1] * scaled[:, 1:]).expand(-1, 4))
        if how == "aspect":
            return net.out((scaled[:, :1] / scaled[:, 1:]).expand(-1, 4))
        centre = (anchors[:, :2] + anchors[:, 2:]) / 2 + 0.1 * net.head(x)[:, 2:] * size
        boxes = torch.cat([centre - scaled / 2, centre + scaled / 2], 1)
        return _iou(boxes, anchors)[:, None].expand(-1, 4) if how == "iou-of-boxes" else boxes / 100.0

    return (
        Net(forward, head=mlp(8, 32, 4), out=nn.Linear(4, 4)),
        lambda: ((torch.randn(16, 8), _boxes()), (torch.rand(16, 4),)),
        mse,
    )


@case("ssd", "fcos", "yolo", "centernet", row=COORDINATES)
def dense_head(how: str) -> Built:
    high, wide = 6, 12

    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.boxes(F.relu(net.conv(x)))
        ys, xs = torch.meshgrid(torch.arange(high) * 64.0, torch.arange(wide) * 64.0, indexing="ij")
        places = torch.stack([xs, ys])[None]
        if how == "fcos":
            away = torch.exp(0.1 * y) * 16
            return torch.cat([places - away[:, :2], places + away[:, 2:]], 1)
        if how == "yolo":
            return torch.cat(
                [(torch.sigmoid(y[:, :2]) * 2 - 0.5) * 64 + places, (torch.sigmoid(y[:, 2:]) * 2) ** 2 * 32], 1
            )
        if how == "ssd":
            return torch.cat([places + y[:, :2] * 6.4, 64 * torch.exp(y[:, 2:] * 0.2)], 1)
        return torch.cat([places / 64.0 + y[:, :2], y[:, 2:]], 1)

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return F.smooth_l1_loss(out, y)

    return (
        Net(forward, conv=nn.Conv2d(3, 8, 3, padding=1), boxes=nn.Conv2d(8, 4, 1)),
        lambda: ((torch.randn(2, 3, high, wide),), (torch.rand(2, 4, high, wide) * 700,)),
        loss,
    )


@case("focal", "varifocal", "objectness", scale=256.0)
def class_head(how: str) -> Built:
    def loss(out: Tensor, y: Tensor) -> Tensor:
        if how == "objectness":
            return F.binary_cross_entropy_with_logits(out, y, pos_weight=torch.tensor(4.0))
        p = torch.sigmoid(out)
        each = F.binary_cross_entropy_with_logits(out, y, reduction="none")
        weight = (1 - torch.where(y > 0, p, 1 - p)) ** 2 if how == "focal" else torch.where(y > 0, y, 0.75 * p**2)
        return (weight * each).sum() / y.sum().clamp_min(1)

    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    return model, lambda: ((torch.randn(2, 3, 8, 8),), ((torch.rand(2, 4, 8, 8) < 0.1).float(),)), loss


@case()
def detr() -> Built:
    def forward(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        seen = net.patch(x).flatten(2).transpose(1, 2) + net.position
        y = net.decoder(net.queries.expand(len(x), -1, -1), seen)
        return net.classes(y), torch.sigmoid(net.boxes(y))

    def loss(out: tuple[Tensor, Tensor], classes: Tensor, boxes: Tensor) -> Tensor:
        return F.cross_entropy(out[0].flatten(0, 1), classes.flatten()) + 5 * F.l1_loss(out[1], boxes)

    model = Net(
        forward,
        patch=nn.Conv2d(3, 16, 4, 4),
        position=nn.Parameter(torch.randn(16, 16)),
        queries=nn.Parameter(torch.randn(1, 5, 16)),
        decoder=nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True),
        classes=nn.Linear(16, 6),
        boxes=nn.Linear(16, 4),
    )
    return model, lambda: ((torch.randn(2, 3, 16, 16),), (torch.randint(0, 6, (2, 5)), torch.rand(2, 5, 4))), loss


@case("roi", "nms-like")
def second_stage(how: str) -> Built:
    def forward(net: Net, x: Tensor, boxes: Tensor) -> Tensor:
        y = F.relu(net.conv(x))
        if how == "nms-like":
            scores = net.score(y).flatten(2).squeeze(1)
            top, where = scores.topk(8, 1)
            return torch.cat([top, y.flatten(2).gather(2, where[:, None].expand(-1, 4, -1)).mean(1)], 1)
        t = torch.linspace(0, 1, 4)
        xs = boxes[:, 0:1] + (boxes[:, 2:3] - boxes[:, 0:1]) * t
        ys = boxes[:, 1:2] + (boxes[:, 3:4] - boxes[:, 1:2]) * t
        grid = torch.stack([xs[:, None].expand(-1, 4, -1), ys[:, :, None].expand(-1, -1, 4)], -1) / 300.0 - 1
        return net.head(F.grid_sample(y[:1].expand(len(boxes), -1, -1, -1), grid, align_corners=False).flatten(1))

    model = Net(forward, conv=nn.Conv2d(3, 4, 3, padding=1), score=nn.Conv2d(4, 1, 1), head=nn.Linear(64, 16))
    shape = (2, 16) if how == "nms-like" else (6, 16)
    return model, lambda: ((torch.randn(2, 3, 8, 8), _boxes(6)), (torch.randn(shape),)), mse
