"""DistributedDataParallel around a wrapper, and a wrapper around it: one plan, a piece for each bucket, and two processes
train as one does on the whole batch.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from ranks import in_own_process, of_all, own_part, same_everywhere, together
from torch import distributed, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.compilers import make_boxed_compiler
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mpcompile import mpcompile
from mpcompile.runtime import buckets, dynamo
from mpcompile.runtime.inductor import plain_autograd

WORDS, WIDTH, STEPS = 48, 32, 4
BUCKET_MB = 0.01
EVENTS: list[str] = []


@torch.library.custom_op("mpcompile_tests::marked", mutates_args=())
def marked(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@torch.library.custom_op("mpcompile_tests::marked_backward", mutates_args=())
def marked_backward(grad: torch.Tensor) -> torch.Tensor:
    EVENTS.append("first layer's backward")
    return grad.clone()


marked.register_fake(torch.empty_like)
marked_backward.register_fake(torch.empty_like)
marked.register_autograd(lambda ctx, grad: marked_backward(grad))


class Block(nn.Module):
    def __init__(self, again: bool = False) -> None:
        super().__init__()
        self.again = again
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def inside(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.gelu(self.up(self.norm(x))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = checkpoint(self.inside, x, use_reentrant=False) if self.again else self.inside(x)
        return x + made


class Net(nn.Module):
    """Words in, scores of words out; the table is the output's weight too, and one bias is frozen."""

    def __init__(self, *, again: bool = False, mark: bool = False, unused: bool = False) -> None:
        super().__init__()
        self.mark, self.table = mark, nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.Sequential(*(Block(again) for _ in range(3)))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.table.weight
        self.blocks[1].up.bias.requires_grad_(False)
        self.unused = nn.Linear(WIDTH, WIDTH) if unused else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.table(x)
        return self.head(self.blocks(marked(x) if self.mark else x))


def loss_of(model: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randint(0, WORDS, (8, 8)), torch.randint(0, WORDS, (8, 8))


def wrapped(model: nn.Module, outside: bool, policy: str, **options: Any) -> tuple[Any, Any]:
    """(what is called, the wrapper): DDP outside of the wrapper, or inside."""
    low = ["*"] if policy == "bf16" else ()
    if outside:
        mp = mpcompile(model, policy, low=low)
        return DistributedDataParallel(mp, bucket_cap_mb=BUCKET_MB, **options), mp
    mp = mpcompile(DistributedDataParallel(model, bucket_cap_mb=BUCKET_MB, **options), policy, low=low)
    return mp, mp


def products(mp: Any) -> set[str]:
    return {n.precision for plan in mp.plans for n in plan.graph if n.kind == "matmul"}


def gradients_arrive_early(rank: int) -> None:
    torch.manual_seed(0)
    model = Net(mark=True)
    plain = copy.deepcopy(model)
    whole = mpcompile(copy.deepcopy(model), "bf16", low=["*"], backend="eager")
    call, mp = wrapped(model, True, "bf16")
    call.register_comm_hook(None, sent)
    x, y = batch()
    for _ in range(2):
        EVENTS.clear()
        model.zero_grad()
        loss_of(call, x, y).backward()
    assert len(mp.plans) == 1
    assert products(mp) == {"bf16"}
    assert EVENTS.count("sent") >= 3
    # Later buckets are sent while the first layer's gradient is still to be made.
    assert EVENTS.index("first layer's backward") >= 2
    loss_of(whole, x, y).backward()
    loss_of(plain, x, y).backward()
    assert model.blocks[1].up.bias.grad is None
    assert far(model, plain) <= 1.3 * far(whole, plain)


def far(model: nn.Module, exact: nn.Module) -> float:
    """How far all gradients of a model are from those of another, relative to these."""
    pairs = [
        (p.grad, q.grad) for p, q in zip(model.parameters(), exact.parameters(), strict=True) if q.grad is not None
    ]
    return float(sum((g - e).square().sum() for g, e in pairs) / sum(e.square().sum() for _, e in pairs)) ** 0.5


def sent(state: object, bucket: Any) -> Any:
    EVENTS.append("sent")
    done: Any = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def compressed(state: object, bucket: Any) -> Any:
    """torch's `bf16_compress_hook`, which asks for NCCL."""
    low = bucket.buffer().to(torch.bfloat16).div_(distributed.get_world_size())
    work = distributed.all_reduce(low, async_op=True).get_future()
    return work.then(lambda done: bucket.buffer().copy_(done.value()[0]))


for one in (sent, compressed):
    # DDP looks for its own types there, and not for their names.
    one.__annotations__.clear()


def by_autograd(module: torch.fx.GraphModule, fakes: Any, **_: Any) -> Any:
    """What Inductor would be given, run op by op: forward and backward are AOTAutograd's."""
    with plain_autograd():
        # It counts, which torch's compiler of pieces looks at.
        return aot_autograd(fw_compiler=make_boxed_compiler(lambda graph, _: graph.forward))(module, fakes)


def test_one_plan_and_gradients_before_the_backward_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "FIRST_BUCKET", 1 << 10)
    monkeypatch.setattr(dynamo, "compile_inductor", by_autograd)
    in_own_process(gradients_arrive_early)
    torch._dynamo.reset()


@pytest.mark.slow
def test_gradients_before_the_compiled_backward_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "FIRST_BUCKET", 1 << 10)
    in_own_process(gradients_arrive_early)


def test_a_model_of_one_bucket_is_not_cut() -> None:
    module = torch.fx.symbolic_trace(nn.Linear(4, 4))
    graph = torch.fx.Graph()
    weight, x = graph.placeholder("w"), graph.placeholder("x")
    graph.output((graph.call_function(torch.ops.aten.linear.default, (x, weight)),))
    module = torch.fx.GraphModule({}, graph)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(nn.Parameter(torch.zeros(4, 4))), mode.from_tensor(torch.zeros(2, 4))]
    assert buckets.split_at_buckets(module, fakes, 1 << 20, lambda *_: pytest.fail("cut")) is None


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "views": ({}, {"gradient_as_bucket_view": True}),
    "static": ({}, {"static_graph": True}),
    "unused": ({"unused": True}, {"find_unused_parameters": True}),
    "again": ({"again": True}, {}),
}


def train(rank: int, policy: str, outside: bool, name: str, windows: int = 1, hook: Any = None) -> None:
    buckets.FIRST_BUCKET = 1 << 10
    made, options = VARIANTS[name]
    torch.manual_seed(0)
    model = Net(**made)
    plain, (x, y) = copy.deepcopy(model), batch()
    call, mp = wrapped(model, outside, policy, **options)
    around = call if outside else mp.model
    if hook is not None:
        around.register_comm_hook(None, hook)
    one, two = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain))
    mine = own_part(x, rank), own_part(y, rank)
    for _ in range(STEPS):
        for count, (a, b) in enumerate(zip(*(t.chunk(windows) for t in mine), strict=True), 1):
            with around.no_sync() if count < windows else contextlib.nullcontext():
                (loss_of(call, a, b) / windows).backward()
        loss_of(plain, x, y).backward()
        for optimizer in (one, two):
            optimizer.step()
            optimizer.zero_grad()
    assert len(mp.plans) == 1
    assert products(mp) == {policy}
    exact = policy == "fp32" and hook is None
    for (key, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert same_everywhere(p), key
        torch.testing.assert_close(p, q, rtol=1e-5 if exact else 0.02, atol=1e-6 if exact else 3e-3)


def train_all(rank: int, policy: str, outside: bool) -> None:
    for name in VARIANTS:
        train(rank, policy, outside, name)
        torch._dynamo.reset()
    train(rank, policy, outside, "plain", windows=2)
    torch._dynamo.reset()
    train(rank, policy, outside, "plain", hook=compressed)


@pytest.mark.slow
@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("policy", ["fp32", "bf16"])
def test_two_processes_train_as_one(policy: str, outside: bool) -> None:
    together(train_all, policy, outside)


def sizes_change(rank: int) -> None:
    buckets.FIRST_BUCKET = 1 << 10
    torch.manual_seed(0)
    model = Net()
    plain = copy.deepcopy(model)
    call, mp = wrapped(model, True, "fp32")
    x, y = batch()
    for width in (8, 5, 3, 7):
        for module in (call, plain):
            module.zero_grad()
            loss_of(module, x[:, :width], y[:, :width]).backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            if p.requires_grad:
                torch.testing.assert_close(p.grad, q.grad)
    assert len(mp.plans) == 2
    assert all(torch.equal(one, model.head.weight) for one in of_all(model.head.weight))


@pytest.mark.slow
def test_pieces_of_symbolic_sizes() -> None:
    in_own_process(sizes_change)


def registered(rank: int) -> None:
    """The bare backend is given pieces by Dynamo."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(600, 600) for _ in range(3)))
    plain = copy.deepcopy(model)
    around = DistributedDataParallel(Around(model), bucket_cap_mb=1)
    call = torch.compile(around, backend="mpcompile", options={"policy": "bf16", "low": ["*"]})
    x = torch.randn(4, 600)
    for module in (call, plain):
        module(x).square().mean().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0.05, atol=1e-4)


class Around(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inside(x)
        return y


@pytest.mark.slow
def test_the_bare_backend_runs_on_dynamos_pieces() -> None:
    in_own_process(registered)
