# What a generated script runs on: one world trained plainly, one by mpcompile, and how far apart they end.
# Every script carries this text, so it needs nothing but torch and mpcompile. It is filled in by names the script
# defines: Model, optimizer(m), scheduler(o), EVENTS, SIZES, POLICY, BACKEND, HOW, CLIP, WINDOW, SEED, MODES, STATES.
import copy
import math
import os
import pickle
import random
import tempfile
import types
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mpcompile import MPCompileError, load_checkpoint, mpcompile, save_checkpoint

D, V = 8, 11  # width of the stream, classes


def batch(i, size, poison=False):
    """Ids and classes (rows, length), features (rows, length, D), drawn from `i` alone."""
    rows, length = size
    g = torch.Generator().manual_seed(1000 + i)
    x, y = (torch.randint(1, V, (rows, length), generator=g) for _ in range(2))
    f = torch.randn(rows, length, D, generator=g)
    return x, y, f * float("nan") if poison else f


class Names:
    """What a forward calls by a name; an event puts another function there."""

    @staticmethod
    def of_class(z):
        return torch.tanh(z)


def of_module(z):
    return torch.tanh(z)


AS_WRITTEN = (of_module, Names.of_class)


def names(of_module=AS_WRITTEN[0], of_class=AS_WRITTEN[1]):
    """Put functions where the names are looked up; without arguments, those of the text."""
    globals()["of_module"], Names.of_class = of_module, staticmethod(of_class)


class Passing(TorchDispatchMode):
    """A dispatch mode that changes nothing."""

    def __torch_dispatch__(self, call, kinds, args=(), kwargs=None):
        return call(*args, **(kwargs or {}))


class PassingFunctions(TorchFunctionMode):
    """A function mode that changes nothing."""

    def __torch_function__(self, call, kinds, args=(), kwargs=None):
        return call(*args, **(kwargs or {}))


class World:
    """A model, its optimizer and what trains it: `how` is "plain", "autocast", "step" or "dropin"."""

    def __init__(self, how):
        self.how, self.seen, self.open, self.i = how, [], 0, 0
        self.kept, self.skipped = {}, False
        torch.manual_seed(SEED)
        self.take(Model())

    def take(self, m):
        self.m, self.open = m, 0
        self.o = optimizer(m)
        self.sched = scheduler(self.o)
        self.mp = m if self.how in ("plain", "autocast") else mpcompile(m, POLICY, backend=BACKEND)
        self.s = self.new_step() if self.how == "step" else None

    def new_step(self):
        return self.mp.train_step(
            self.o, accumulate=WINDOW, max_grad_norm=CLIP, scale=1.0 if "fp16" in POLICY else "auto", states=STATES
        )

    def move(self, m, o, sched, mp=None, s=None):
        """Go on with copies of everything, an open window's gradients with them."""
        for mine, p in zip(self.params(), [p for group in o.param_groups for p in group["params"]]):
            p.grad = None if mine.grad is None else mine.grad.clone()
        self.m, self.o, self.sched = m, o, sched
        self.mp = mp if mp is not None else m
        self.s = s

    def copied(self, how):
        """The copies that `how` (deepcopy, a pickle) makes of what trains."""
        if self.mp is self.m:
            self.move(*how((self.m, self.o, self.sched)))
            return
        mp, s, o, sched = how((self.mp, self.s, self.o, self.sched))
        self.move(mp.model, o, sched, mp, s)

    def through_a_file(self):
        """Everything written to a file and read into new ones."""
        window, grads = self.open, [p.grad for p in self.params()]
        parts = {"model": self.m, "optimizer": self.o, **({"step": self.s} if self.s is not None else {})}
        extra = self.sched.state_dict() if self.sched else None
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(folder + "/c", **parts, extra=extra)
            torch.manual_seed(SEED)
            self.take(Model())
            parts = {"model": self.m, "optimizer": self.o, **({"step": self.s} if self.s is not None else {})}
            extra = load_checkpoint(folder + "/c", **parts)
        if self.sched:
            self.sched.load_state_dict(extra)
        self.open = window
        for p, grad in zip(self.params(), grads):
            p.grad = grad

    def params(self):
        return [p for group in self.o.param_groups for p in group["params"]]

    def loss(self, *data, **more):
        """The loss of the drop-in, or of the model itself."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.how == "autocast"):
            return self.mp(*data, **more)

    def micro(self, *data, **more):
        """One microbatch; the update at the end of the window, unless a gradient is not finite."""
        if self.how == "step":
            result = self.s(*data, **more)
            self.open = (self.open + 1) % WINDOW
            loss, stepped = result.loss, bool(result.stepped)
        else:
            loss, stepped = self.by_hand(data, more)
        if self.open == 0 and self.sched is not None and stepped:
            self.sched.step()
        skipped = self.open == 0 and not stepped
        # In a step that is skipped a kernel and its decomposition may differ in what they make of NaN.
        self.note("loss", 0.0 if skipped else loss)
        self.note("stepped", stepped)

    def by_hand(self, data, more):
        if self.open == 0:
            self.o.zero_grad()
        loss = self.loss(*data, **more)
        (loss / WINDOW).backward()
        self.open = (self.open + 1) % WINDOW
        return loss, self.open == 0 and self.update()

    def update(self):
        grads = [p.grad for p in self.params() if p.grad is not None]
        if not all(bool(g.isfinite().all()) for g in grads):
            self.skipped = True
            return False
        if CLIP is not None:
            nn.utils.clip_grad_norm_(self.params(), CLIP)
        self.o.step()
        return True

    def foreign(self):
        """A step of the optimizer's own, between two of the step's."""
        window, self.open = self.open, 0
        for p in self.params():
            p.grad = None
        self.loss(*batch(500, SIZES[0]), 0.5).backward()
        self.o.step()
        for p in self.params():
            p.grad = None
        self.open = window

    def note(self, what, value):
        value = value.detach().clone() if isinstance(value, torch.Tensor) else value
        self.seen.append((f"{what} at step {self.i}", value))

    def end(self):
        """What is left: parameters, buffers, and the optimizer's state."""
        for name, value in self.m.state_dict().items():
            self.note(name, value)
        for p, state in self.o.state_dict()["state"].items():
            for key in sorted(state, key=str):
                if isinstance(state[key], torch.Tensor) or key == "step":
                    self.note(f"state {p} {key}", torch.as_tensor(state[key]))


def linear(w, n=0):
    """The model's n-th linear layer."""
    found = [m for m in w.m.modules() if type(m) is nn.Linear]
    return found[n % len(found)]


def swap(w, old, new):
    """Put `new` where `old` is in the model."""
    for parent in list(w.m.modules()):
        for name, child in list(parent.named_children()):
            if child is old:
                setattr(parent, name, new)
    return new


def tell(w, new, old=()):
    """Give the optimizer new parameters in the place of old ones, or as a group of their own."""
    gone = {id(p) for p in old}
    for group in w.o.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in gone]
    for p in old:
        w.o.state.pop(p, None)
    held = {id(p) for p in w.params()}
    fresh = [p for p in new if id(p) not in held]
    if fresh and w.sched is None:
        w.o.add_param_group({"params": fresh})
    elif fresh:  # a scheduler knows the groups that it was made for
        w.o.param_groups[0]["params"] += fresh


def train(how, shake=0.0):
    """Train; `shake` moves every parameter at the start by that share of itself (what rounding alone would do)."""
    names()
    random.seed(SEED)
    numpy.random.seed(SEED)
    w = World(how)
    if shake:
        with torch.no_grad():
            for p in w.m.parameters():
                p.mul_(1 + shake * torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))
    for i, size in enumerate(SIZES):
        w.i = i
        for event in EVENTS.get(i, ()):
            torch.manual_seed(7000 + i)
            event(w)
        torch.manual_seed(9000 + i)
        w.micro(*batch(i, size), MODES[i % len(MODES)])
    w.end()
    return w


def far(a, b):
    """The largest difference of two worlds, relative to the size of each thing; infinite where they are not alike."""
    if [what for what, _ in a.seen] != [what for what, _ in b.seen]:
        other = [x for x, y in zip(a.seen, b.seen) if x[0] != y[0]]
        return math.inf, f"what is there: {len(a.seen)} and {len(b.seen)} things, first {other[:1]}"
    worst = (0.0, "")
    for (what, x), (_, y) in zip(a.seen, b.seen):
        buffer = a.skipped and "state" not in what and "loss" not in what
        worst = max(worst, (apart(x, y, buffer), what))
    return worst


def apart(x, y, loose=False):
    if not isinstance(x, torch.Tensor):
        return 0.0 if x == y else math.inf
    if x.shape != y.shape or x.dtype != y.dtype:
        return math.inf
    if not x.is_floating_point():
        return 0.0 if loose or torch.equal(x, y) else math.inf
    x, y = x.double(), y.double()
    if not torch.equal(x.isfinite(), y.isfinite()):
        return math.inf
    x, y = x.nan_to_num(0, 0, 0), y.nan_to_num(0, 0, 0)
    return float((x - y).abs().max() / y.abs().max().clamp(min=1e-2)) if x.numel() else 0.0


LIMIT = 1e-5


def verdict():
    """("same" | "refused" | "invalid" | "differs" | "crash", distance, what). Plain torch is the judge."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    try:
        plain = train("plain")
    except Exception as error:
        return "invalid", 0.0, f"{type(error).__name__}: {error}"
    try:
        mine = train(HOW)
    except MPCompileError as error:
        return "refused", 0.0, str(error)
    except Exception as error:
        return "crash", math.inf, f"{type(error).__name__}: {error}"
    distance, what = far(mine, plain)
    if "fp32" in POLICY:
        return exactly(distance, what, plain)
    return nearly(mine, plain)


def exactly(distance, what, plain):
    """FP32: equal, but for what a model's own chaos makes of one rounding of its weights."""
    if distance > LIMIT and math.isfinite(distance):
        limit = max(LIMIT, 30 * far(train("plain", 1e-7), plain)[0])
        return ("differs" if distance > limit else "same"), distance, what
    return ("differs" if distance > LIMIT else "same"), distance, what


def spread(a, b):
    """Root of the mean square of the distances of all that is there: one element alone is luck."""
    pairs = [
        apart(x, y, True) for (what, x), (_, y) in zip(a.seen, b.seen) if "stepped" not in what and "state" not in what
    ]
    return math.sqrt(sum(min(p, 1e6) ** 2 for p in pairs) / max(len(pairs), 1))


def nearly(mine, plain):
    """Low: as near to FP32 as autocast is, within a factor for luck and a few roundings; and low products were there."""
    if [what for what, _ in mine.seen] != [what for what, _ in plain.seen]:
        return ("differs", *far(mine, plain))
    auto, own = spread(train("autocast"), plain), spread(mine, plain)
    limit = 4 * auto + 2**-6
    return ("differs" if own > limit else "same"), own, f"{own:.3g} from FP32, autocast {auto:.3g}"
