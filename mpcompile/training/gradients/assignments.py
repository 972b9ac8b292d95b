"""What a forward assigns to its modules: a buffer is written back, another tensor that it reads again is refused."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mpcompile.errors import TrainingError
from mpcompile.torch_internals.modules import buffers_of, made_before_each_forward

Held = list[tuple[nn.Module, str, Tensor, bool]]


def held(root: nn.Module) -> Held:
    """(module, name, tensor, is a buffer) of what the modules of `root` hold beside parameters."""
    found: Held = []
    for module in root.modules():
        found += [(module, name, value, True) for name, value in buffers_of(module).items() if value is not None]
        made = made_before_each_forward(module)
        found += [
            (module, name, value, False)
            for name, value in vars(module).items()
            if isinstance(value, Tensor) and name not in made
        ]
    return found


def write_back(root: nn.Module, before: Held) -> None:
    """Inside of a trace: what the forward put in a buffer's place is the buffer's new value.

    Raises:
      TrainingError: MP537.
    """
    for module, name, old, is_buffer in before:
        new: Any = buffers_of(module).get(name) if is_buffer else vars(module).get(name)
        if new is old:
            continue
        path = next(p for p, m in root.named_modules() if m is module).removeprefix("model").lstrip(".")
        where = f"{path}.{name}" if path else name
        if not is_buffer or not isinstance(new, Tensor) or (new.shape, new.dtype) != (old.shape, old.dtype):
            kind = "a buffer of another size or type" if is_buffer else "a tensor that is no buffer"
            raise TrainingError("MP537", f"the forward assigns {where}, {kind}", where=type(module).__name__,
                                why="the next step would read the old one",
                                try_=f"self.register_buffer({name!r}, …), assigned in its size and type")  # fmt: skip
        old.copy_(new.detach())
        buffers_of(module)[name] = old


__all__ = ["held", "write_back"]
