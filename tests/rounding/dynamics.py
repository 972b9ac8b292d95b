"""States that are integrated: ODEs, leaky integrators, running sums, physics, control."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rounding.registry import STATE, Built, Domain, Net, mlp, mse

case = Domain("dynamics")


def _states(shift: float = 1.0, wide: int = 8) -> tuple[tuple[Tensor], tuple[Tensor]]:
    return (torch.rand(16, wide) + shift,), (torch.rand(16, wide) + shift,)


def _moved(output: Tensor, target: Tensor) -> Tensor:
    return ((output - target) ** 2).mean()


@case("euler", "midpoint", "heun", "rk4", row=STATE)
def neural_ode(how: str) -> Built:
    steps, h = (16, 0.004) if how == "euler" else (6, 0.01)

    def forward(net: Net, x: Tensor) -> Tensor:
        for _ in range(steps):
            k1 = torch.tanh(net.field(x))
            if how == "euler":
                x = x + h * k1
            elif how == "midpoint":
                x = x + h * torch.tanh(net.field(x + h / 2 * k1))
            elif how == "heun":
                x = x + h / 2 * (k1 + torch.tanh(net.field(x + h * k1)))
            else:
                k2 = torch.tanh(net.field(x + h / 2 * k1))
                k3 = torch.tanh(net.field(x + h / 2 * k2))
                x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + torch.tanh(net.field(x + h * k3)))
        return x

    return Net(forward, field=nn.Linear(8, 8)), _states, _moved


@case("moved", "times-100", row=STATE)
def what_moved(how: str) -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        start = x
        for _ in range(12):
            x = x + 0.002 * torch.tanh(net.field(x))
        return x - start if how == "moved" else (x - start) * 100.0

    return Net(forward, field=nn.Linear(8, 8)), lambda: ((torch.rand(16, 8) + 1,), (torch.zeros(16, 8),)), mse


@case("leaky", "lerp", "decay", "addcmul", row=STATE)
def leaky_integrator(how: str) -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        state = torch.ones(16, 8)
        for t in range(12):
            drive = net.drive(x[:, t])
            if how == "leaky":
                state = state + 0.01 * (drive - state)
            elif how == "lerp":
                state = torch.lerp(state, drive.float(), 0.01)
            elif how == "decay":
                state = 0.99 * state + 0.01 * drive
            else:
                state = torch.addcmul(state, drive - state, torch.full((8,), 0.01))
        return state

    return Net(forward, drive=nn.Linear(4, 8)), lambda: ((torch.randn(16, 12, 4),), (torch.rand(16, 8),)), mse


@case("zeros", "input", "parameter", row=STATE)
def running_sum(start: str) -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        total = {"zeros": torch.zeros(16, 8), "input": x[:, 0] + 30.0, "parameter": net.first.expand(16, 8)}[start]
        sums = []
        for t in range(12):
            total = total + torch.sigmoid(net.drive(x[:, t]))
            sums.append(total)
        return torch.stack(sums, 1)

    model = Net(forward, drive=nn.Linear(8, 8), first=nn.Parameter(torch.full((8,), 40.0)))
    return model, lambda: ((torch.randn(16, 12, 8),), (torch.rand(16, 12, 8) * 10,)), mse


@case("cumsum", "cumprod", row=STATE)
def accumulated(how: str) -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        rate = torch.sigmoid(net.drive(x))
        return torch.cumsum(rate, 1) if how == "cumsum" else torch.cumprod(1 + 0.01 * rate, 1)

    return Net(forward, drive=nn.Linear(8, 8)), lambda: ((torch.randn(8, 64, 8),), (torch.rand(8, 64, 8),)), mse


@case("in-place", "slice", row=STATE)
def state_in_place(how: str) -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        state = torch.ones(16, 8)
        for t in range(8):
            change = 0.003 * net.drive(x[:, t])
            if how == "in-place":
                state += change
            else:
                state = state.clone()
                state[:, :4] = state[:, :4] + change[:, :4]
        return state

    return Net(forward, drive=nn.Linear(4, 8)), lambda: ((torch.randn(16, 8, 4),), (torch.ones(16, 8),)), mse


@case("symplectic", "leapfrog", row=STATE)
def hamiltonian(how: str) -> Built:
    def forward(net: Net, q: Tensor, p: Tensor) -> Tensor:
        for _ in range(6):
            if how == "leapfrog":
                p = p - 0.005 * net.force(q)
                q = q + 0.01 * p
                p = p - 0.005 * net.force(q)
            else:
                p = p - 0.01 * net.force(q)
                q = q + 0.01 * p
        return torch.cat([q, p], 1)

    state = lambda: torch.rand(16, 4) + 1  # noqa: E731
    return Net(forward, force=mlp(4, 16, 4, act=nn.Tanh)), lambda: ((state(), state()), (torch.rand(16, 8) + 1,)), mse


@case("heat", "wave", "burgers", row=STATE)
def finite_difference_solver(how: str) -> Built:
    def forward(net: Net, u: Tensor) -> Tensor:
        previous = u
        for _ in range(6):
            lap = torch.roll(u, 1, 1) - 2 * u + torch.roll(u, -1, 1)
            force = 0.01 * net.force(u)
            if how == "heat":
                u = u + 0.1 * lap + force
            elif how == "wave":
                u, previous = 2 * u - previous + 0.1 * lap + force, u
            else:
                u = u - 0.05 * u * (torch.roll(u, -1, 1) - torch.roll(u, 1, 1)) + 0.1 * lap + force
        return u

    return (
        Net(forward, force=mlp(32, 32, 32, act=nn.Tanh)),
        lambda: ((torch.rand(8, 32) + 2,), (torch.rand(8, 32) + 2,)),
        mse,
    )


@case("step", "rollout", row=STATE)
def learned_simulator(how: str) -> Built:
    def forward(net: Net, place: Tensor, speed: Tensor) -> Tensor:
        for _ in range(1 if how == "step" else 5):
            push = net.push(torch.cat([place / 100.0, speed], -1))
            speed = speed + 0.05 * push
            place = place + 0.05 * speed
        return place

    batch = lambda: ((torch.rand(16, 3) * 100, torch.randn(16, 3)), (torch.rand(16, 3) * 100,))  # noqa: E731
    return Net(forward, push=mlp(6, 32, 3, act=nn.Tanh)), batch, mse


@case("pid", "mpc", "residual-policy")
def control(how: str) -> Built:
    def forward(net: Net, x: Tensor, goal: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for _ in range(5):
            error = goal - x
            total = total + 0.1 * error
            if how == "pid":
                u = net.gains[0] * error + net.gains[1] * total + 0.1 * net.policy(error)
            elif how == "mpc":
                u = net.policy(torch.cat([x, goal], 1)[:, :4])
            else:
                u = 0.5 * error + 0.1 * net.policy(x)
            x = x + 0.02 * u
        return x

    model = Net(forward, gains=nn.Parameter(torch.tensor([0.5, 0.1])), policy=mlp(4, 16, 4, act=nn.Tanh))
    return model, lambda: ((torch.randn(16, 4) + 10, torch.randn(16, 4) + 10), (torch.randn(16, 4) + 10,)), mse


@case("linear", "gated")
def state_space(how: str) -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        decay = torch.sigmoid(net.decay)
        state, seen = torch.zeros(8, 8), []
        for t in range(10):
            u = net.into(x[:, t])
            gate = torch.sigmoid(net.gate(x[:, t])) if how == "gated" else 1.0
            state = decay * state + (1 - decay) * u * gate
            seen.append(net.out(state))
        return torch.stack(seen, 1)

    model = Net(
        forward,
        decay=nn.Parameter(torch.full((8,), 3.0)),
        into=nn.Linear(4, 8),
        gate=nn.Linear(4, 8),
        out=nn.Linear(8, 4),
    )
    return model, lambda: ((torch.randn(8, 10, 4),), (torch.randn(8, 10, 4),)), mse


@case()
def deep_equilibrium() -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(8):
            z = torch.tanh(net.inner(z) + x)
        return net.out(z)

    return (
        Net(forward, inner=nn.Linear(8, 8), out=nn.Linear(8, 4)),
        lambda: ((torch.randn(16, 8),), (torch.randn(16, 4),)),
        mse,
    )


@case()
def spiking() -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        v, total = torch.zeros(8, 16), torch.zeros(8, 16)
        for t in range(8):
            v = 0.9 * v + net.into(x[:, t])
            spike = torch.sigmoid(8 * (v - 1))
            v, total = v - spike, total + spike
        return net.out(total / 8)

    return (
        Net(forward, into=nn.Linear(6, 16), out=nn.Linear(16, 4)),
        lambda: ((torch.randn(8, 8, 6),), (torch.randn(8, 4),)),
        mse,
    )


@case()
def pinn() -> Built:
    def forward(net: Net, x: Tensor, t: Tensor) -> Tensor:
        h = 1e-2
        u = lambda a, b: net.body(torch.cat([a, b], 1))  # noqa: E731
        return (u(x, t + h) - u(x, t - h)) / (2 * h) - 0.1 * (u(x + h, t) - u(x - h, t)) / (2 * h)

    model = Net(forward, body=mlp(2, 16, 16, 1, act=nn.Tanh))
    return model, lambda: ((torch.rand(32, 1), torch.rand(32, 1)), (torch.zeros(32, 1),)), mse


@case("kalman", "alpha-beta", row=STATE)
def filtering(how: str) -> Built:
    def forward(net: Net, z: Tensor) -> Tensor:
        x, p = z[:, 0] * 1.0, torch.ones(8, 4)
        for t in range(1, 8):
            seen = z[:, t] + 0.1 * net.sensor(z[:, t] - x)
            gain = p / (p + 0.5) if how == "kalman" else torch.full((8, 4), 0.1)
            x = x + gain * (seen - x)
            p = (1 - gain) * p + 0.01
        return x

    return Net(forward, sensor=mlp(4, 16, 4)), lambda: ((torch.randn(8, 8, 4) + 200,), (torch.randn(8, 4) + 200,)), mse


@case(row=STATE)
def momentum_encoder() -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        average = net.average
        for t in range(4):
            average = 0.999 * average + 0.001 * net.body(x[:, t]).mean(0)
        return average

    return (
        Net(forward, average=torch.ones(8), body=nn.Linear(8, 8)),
        lambda: ((torch.randn(8, 4, 8),), (torch.ones(8),)),
        mse,
    )


@case(row=STATE)
def clock() -> Built:
    def forward(net: Net, x: Tensor, t: Tensor) -> Tensor:
        for _ in range(4):
            t = t + 0.25
            x = net.field(torch.cat([x, torch.sin(t)], 1))
        return torch.cat([x, t], 1)

    return (
        Net(forward, field=nn.Linear(9, 8)),
        lambda: ((torch.randn(8, 8), torch.full((8, 1), 300.0)), (torch.randn(8, 9),)),
        mse,
    )
