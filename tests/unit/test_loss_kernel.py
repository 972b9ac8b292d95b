"""The loss kernel against FP64 and torch's own cross-entropy; on a CPU in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="the kernel is Triton's; torch's CUDA builds bring it")

from mpcompile.runtime.kernels import loss
from mpcompile.runtime.kernels.update import available

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(not available(DEVICE), reason="needs a GPU, or Triton's interpreter (TRITON_INTERPRET=1)"),
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks a row, on this device."""
    monkeypatch.setattr(loss, "DEVICES", {DEVICE})
    monkeypatch.setattr(loss, "BLOCK", 32)
    monkeypatch.setattr(loss, "WARPS", 1)


def wanted(
    logits: Tensor, targets: Tensor, unit: float, classes: int, ignore: int, smoothing: float
) -> tuple[Tensor, Tensor]:
    wide = logits[:, :classes].double().requires_grad_()
    each = F.cross_entropy(wide, targets, ignore_index=ignore, label_smoothing=smoothing, reduction="none")
    (gradient,) = torch.autograd.grad(each.sum() * unit, wide)
    return each.detach(), F.pad(gradient, (0, logits.shape[1] - classes))


def check(logits: Tensor, targets: Tensor, unit: float, classes: int, ignore: int, smoothing: float) -> None:
    arriving = torch.tensor(unit, device=DEVICE)
    losses, gradient = loss.loss_rows(logits, targets, arriving, classes, ignore, smoothing)
    expected = wanted(logits, targets, unit, classes, ignore, smoothing)
    assert losses.dtype == torch.float32
    assert gradient.dtype == logits.dtype
    torch.testing.assert_close(losses.double(), expected[0], rtol=4e-6, atol=4e-6)
    # One rounding to the type of the logits, beside FP32's own; Triton's interpreter cuts BF16 off instead.
    brain = 2**-8 if DEVICE == "cuda" else 2**-7
    step = {torch.float32: 4e-6, torch.bfloat16: brain, torch.float16: 2**-11}[logits.dtype]
    tiny = abs(unit) * 2e-6 + (2**-25 if logits.dtype == torch.float16 else 0)
    torch.testing.assert_close(gradient.double(), expected[1], rtol=1.01 * step, atol=tiny)


SIZES = [(1, 1, 0), (5, 31, 1), (2, 32, 0), (3, 33, 9), (4, 64, 3), (2, 100, 28)]


# By hand and not by hypothesis, which the machines with a GPU need not have.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "classes", "padding"), SIZES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_as_fp64(rows: int, classes: int, padding: int, dtype: torch.dtype, smoothing: float) -> None:
    torch.manual_seed(classes)
    for size, unit in ((0.1, 1.0), (3.0, 1 / 16384), (100.0, 512.0)):
        logits = (torch.randn(rows, classes + padding) * size).to(dtype).to(DEVICE)
        targets = torch.randint(0, classes, (rows,)).to(DEVICE)
        targets[torch.rand(rows) < 0.2] = -100
        check(logits, targets, unit, classes, -100, smoothing)


def test_columns_of_minus_infinity_have_no_share() -> None:
    logits = torch.randn(3, 70, device=DEVICE)
    logits[:, :40] = -float("inf")
    check(logits, torch.full((3,), 50, device=DEVICE), 1.0, 70, -100, 0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    logits = torch.randn(2, 70, device=DEVICE)
    logits[0, 45] = bad
    losses, gradient = loss.loss_rows(
        logits, torch.tensor([3, 3], device=DEVICE), torch.ones((), device=DEVICE), 70, -1, 0.0
    )
    # Infinite in the loss, as in the exponentials' sum; the gradient, which the step looks at, has a NaN.
    assert not losses[0].isfinite()
    assert gradient[0].isnan().any()
    assert losses[1].isfinite()
    assert gradient[1].isfinite().all()


def test_rows_that_lie_apart_are_read_right() -> None:
    whole = torch.randn(4, 128, device=DEVICE)
    check(whole[:, :100], torch.tensor([0, 99, 7, -100], device=DEVICE), 2.0, 100, -100, 0.0)


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU it ends the program's context")
@pytest.mark.parametrize("label", [-1, 70, 71])
def test_a_label_that_is_no_class_has_no_loss(label: int) -> None:
    """The interpreter has no check on the device: what is left of it there is that no step is taken."""
    logits = torch.randn(2, 72)
    losses, _ = loss.loss_rows(logits, torch.tensor([3, label]), torch.ones(()), 70, -100, 0.0)
    assert losses.isnan().tolist() == [False, True]


def test_the_operation_is_as_torch_wants_it() -> None:
    logits = torch.randn(3, 40, device=DEVICE, dtype=torch.bfloat16)
    sample = logits, torch.tensor([1, 2, 3], device=DEVICE), torch.ones((), device=DEVICE), 38, -100, 0.1
    torch.library.opcheck(loss.loss_rows, sample)
    losses, gradient = loss.in_atens(*sample)
    expected = wanted(logits, sample[1], 1.0, 38, -100, 0.1)
    torch.testing.assert_close(losses.double(), expected[0], rtol=4e-6, atol=4e-6)
    torch.testing.assert_close(gradient.double(), expected[1], rtol=0.004, atol=2e-6)
