"""What a step refuses before it compiles: batches, hooks and parameters that it could not train rightly."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mpcompile.aten.graphs import outputs_of, values_of
from mpcompile.errors import TrainingError
from mpcompile.runtime.sharded import refuse_gathered, refuse_sharded
from mpcompile.training.gradients.batch import Batch
from mpcompile.training.gradients.forward import Forward
from mpcompile.training.gradients.gradient_hooks import refuse_unseen
from mpcompile.training.gradients.joint import Joint


def refuse_gradient(batch: Batch) -> None:
    place = next(i for i, t in enumerate(batch.given) if t.requires_grad)
    raise TrainingError(
        "MP536",
        f"tensor {place} of the batch requires a gradient",
        why="the step's backward ends at its batch",
        try_="pass it detached; or let loss_fn make it, and give its parameters to the optimizer",
    )


def refuse_hooks(model: nn.Module, named: dict[str, Tensor]) -> None:
    """Hooks on gradients, those of DDP among them, would silently not run.

    Raises:
      TrainingError: MP523, MP535.
      CaptureError: MP107.
    """
    refuse_gathered(model)
    refuse_sharded(model)
    inside = [name for name, m in model.named_modules() if isinstance(m, nn.parallel.DistributedDataParallel)]
    if inside:
        raise TrainingError("MP535", "a part of the step's model is a DistributedDataParallel", where=inside[0],
                            why="its reducer would never see a gradient",
                            try_="mpcompile(DDP(model)).train_step(...), with all of the model inside")  # fmt: skip
    refuse_unseen(named.items(), model.named_modules())


def refuse_masters(named: dict[str, Tensor], trained: set[int]) -> None:
    """What is trained must be FP32.

    Raises:
      TrainingError: MP522.
    """
    for name, held in named.items():
        if id(held) in trained and held.dtype != torch.float32:
            split = "BF16 and trained: does another step hold it split (its join_masters() gives it back)?"
            raise TrainingError(
                "MP522",
                f"the optimizer trains {name!r}, which is {str(held.dtype).removeprefix('torch.')}",
                why=split if held.dtype == torch.bfloat16 else "masters are FP32",
                try_="model.float(), or the drop-in way: loss = mp(x); loss.backward(); optimizer.step()",
            )


def refuse_no_gradient(joint: Joint, forward: Forward) -> None:
    """Say what is wrong when there is nothing that the update could use.

    Raises:
      TrainingError: MP522, MP521.
    """
    trained = [one.name for one in forward.inputs if one.trained]
    if not joint.grads:
        why = "the loss reads none of them"
        if trained:
            why = f"the loss does not depend on {trained[0]!r}, nor on any other"
        raise TrainingError("MP522", "the loss has no gradient for a parameter that the optimizer trains",
                            why=f"{why}: is it detached, or made under no_grad?")  # fmt: skip
    values = values_of(outputs_of(joint.module)[len(joint.mutated) + 1 :])
    for place, value in zip(joint.grads, values, strict=True):
        if value.layout != torch.strided:
            name, instead = forward.inputs[place].name, "the drop-in way: loss.backward(); optimizer.step()"
            raise TrainingError("MP521", f"the gradient of {name} is sparse", why="the update works on dense gradients",
                                try_=f"nn.Embedding(..., sparse=False), or {instead}")  # fmt: skip


__all__ = ["refuse_gradient", "refuse_hooks", "refuse_masters", "refuse_no_gradient"]
