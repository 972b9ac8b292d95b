"""Point clouds, poses, distances between sets."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rounding.registry import COORDINATES, HAND, SUM, Built, Domain, Net, cross_entropy, mlp, mse

case = Domain("points")


@case("pointnet", "edge", "centred", "kernel", "transformer", row=HAND)
def cloud(how: str) -> Built:
    def forward(net: Net, p: Tensor) -> Tensor:
        if how == "pointnet":
            return net.head(net.body(p - p.mean(1, keepdim=True)).amax(1))
        if how == "centred":
            middle = p.mean(1, keepdim=True)
            far = (p - middle).norm(dim=2).amax(1)[:, None, None]
            return net.head(net.body((p - middle) / far).mean(1))
        gap = p[:, :, None] - p[:, None]
        if how == "edge":
            return net.head(net.body(gap).amax(2).mean(1))
        near = torch.exp(-gap.square().sum(-1))
        if how == "kernel":
            return net.head((near @ net.body(p - p[:, :1])).mean(1))
        x = net.body(p - p[:, :1])
        scores = (net.q(x) @ net.k(x).transpose(1, 2)) / 4 - gap.norm(dim=-1)
        return net.head((scores.softmax(-1) @ x).mean(1))

    model = Net(forward, body=mlp(3, 16, 16), q=nn.Linear(16, 16), k=nn.Linear(16, 16), head=nn.Linear(16, 3))
    return model, lambda: ((torch.randn(4, 24, 3) + 50,), (torch.randint(0, 3, (4,)),)), cross_entropy


@case("chamfer", "sinkhorn", "flow", row=SUM)
def cloud_to_cloud(how: str) -> Built:
    def forward(net: Net, p: Tensor) -> Tensor:
        return p + 0.05 * net.body(p - p.mean(1, keepdim=True))

    def loss(out: Tensor, y: Tensor) -> Tensor:
        if how == "flow":
            return (out - y).norm(dim=2).mean()
        cost = (out[:, :, None] - y[:, None]).square().sum(-1)
        if how == "chamfer":
            return cost.amin(1).mean() + cost.amin(2).mean()
        u = torch.zeros(cost.shape[:2])
        for _ in range(4):
            v = -torch.logsumexp(u[:, :, None] - cost, 1)
            u = -torch.logsumexp(v[:, None] - cost, 2)
        return (torch.exp(u[:, :, None] + v[:, None] - cost) * cost).sum((1, 2)).mean()

    return (
        Net(forward, body=mlp(3, 16, 3)),
        lambda: (((p := torch.rand(2, 16, 3) + 10),), (p + 0.1 * torch.randn(2, 16, 3),)),
        loss,
    )


@case("icp", "quaternion", "rodrigues", "camera", row=COORDINATES, scale=0.0625)
def pose(how: str) -> Built:
    def forward(net: Net, x: Tensor, p: Tensor) -> Tensor:
        y = 0.1 * net.body(x).float()
        if how == "quaternion":
            w, v = 1.0, y[:, None, :3]
            turned = p + 2 * torch.linalg.cross((torch.linalg.cross(v.expand_as(p), p) + w * p), v.expand_as(p)) * -1
            return turned + y[:, None, 3:6]
        if how == "rodrigues":
            angle = y[:, :3].norm(dim=1, keepdim=True)[:, None] + 1e-4
            axis = (y[:, None, :3] / angle).expand_as(p)
            return (
                p * angle.cos()
                + torch.linalg.cross(axis, p) * angle.sin()
                + axis * (axis * p).sum(-1, keepdim=True) * (1 - angle.cos())
            )
        if how == "icp":
            return p + y[:, None, :3]
        moved = p + y[:, None, :3]
        return moved[..., :2] / moved[..., 2:] * 500.0 + 320.0

    wide = 2 if how == "camera" else 3
    return (
        Net(forward, body=mlp(8, 32, 6)),
        lambda: (
            (torch.randn(4, 8), torch.rand(4, 12, 3) + 5),
            (torch.rand(4, 12, wide) * (700 if how == "camera" else 6),),
        ),
        mse,
    )
