"""The policy: which low type, which plan, and what comes out; a value that prints as one line."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args, get_type_hints

from mpcompile.devices import is_file, pinned
from mpcompile.errors import RuleError, suggest

# A comma or blank between quotes belongs to a file's name.
_COMMA = re.compile(r',(?=(?:[^"]*"[^"]*")*[^"]*$)')
_PLAIN = re.compile(r"[^\s,\"]+")


@dataclass(frozen=True)
class Policy:
    """What "mixed precision" means for one model.

    Fields:
      low: the low type. "auto" is settled by the device (see `mpcompile.api`); "fp32" turns the compiler off.
      plan: "global" is the cost-based plan; "autocast" takes torch.autocast's op-by-op decisions on CUDA;
        "strict" is the cost-based plan with nothing stored below what autocast stores.
      output: dtype of floating outputs: "fp32", "low", or "keep" (as the last node gives it).
      grads: precision of gradient buffers between microbatches of a training step.
      reduce: what gradients are carried in between the ranks of a step: FP32, or "low" where they are low.
      fp32_matmul: how matmuls that stay FP32 may round inside (torch.set_float32_matmul_precision's three names).
      products: "fp8" lets BF16 products read their operands in FP8 where that is faster (`mpcompile.fp8`); the word
        "fp8" alone is "low=bf16,products=fp8".
      fp8: how FP8 operands are scaled: "tensorwise" (one number for all of an operand), or "rowwise".
      device: what the plan is priced for, wherever it then runs: "auto" (where the model is), the name of a row of
        devices.toml ("h100", "cpu", ...), or a FILE.toml of the user's (FILE.toml#ROW where it has several rows).

    >>> str(Policy("fp16"))
    'low=fp16,plan=global,output=fp32,grads=fp32'
    >>> Policy.parse("bf16") == Policy(low="bf16")
    True
    >>> str(Policy("bf16", device="h100"))
    'low=bf16,plan=global,output=fp32,grads=fp32,device=h100'
    >>> str(Policy.parse("fp8"))
    'low=bf16,plan=global,output=fp32,grads=fp32,products=fp8'
    """

    low: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    plan: Literal["global", "autocast", "strict"] = "global"
    output: Literal["fp32", "low", "keep"] = "fp32"
    grads: Literal["fp32", "low"] = "fp32"
    reduce: Literal["fp32", "low"] = "fp32"
    fp32_matmul: Literal["highest", "high", "medium"] = "highest"
    products: Literal["low", "fp8"] = "low"
    fp8: Literal["tensorwise", "rowwise"] = "tensorwise"
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, allowed in _allowed().items():
            value = getattr(self, name)
            if allowed and value not in allowed:
                raise _bad(
                    f"{name}={value!r} is not a policy", f"{name} is one of {', '.join(allowed)}", value, allowed
                )
        self._check_device()
        if self.products == "fp8" and self.low == "fp16":
            raise _bad("products=fp8 is no policy of low=fp16", "FP8 products give BF16", "", ())
        if self.products == "fp8" and self.plan == "autocast":
            raise _bad("products=fp8 is no policy of plan=autocast", "torch.autocast knows no FP8", "", ())

    def _check_device(self) -> None:
        """A file is looked at when a plan is made: a policy may be read where the file is not."""
        name = self.device
        if not isinstance(name, str) or not name or not name.isprintable() or '"' in name or name != name.strip():
            raise _bad(f"device={name!r} is not a policy", "device is auto, the name of a row, or a FILE.toml", "", ())
        if name != "auto" and not is_file(name):
            pinned(name)

    def __str__(self) -> str:
        """The one-line form; what comes after `grads` is printed only where it is not the default."""
        quiet = {f.name for f in fields(self)[4:] if getattr(self, f.name) == f.default}
        return ",".join(f"{f.name}={_quoted(getattr(self, f.name))}" for f in fields(self) if f.name not in quiet)

    @classmethod
    def parse(cls, text: str | Policy) -> Policy:
        """Read the one-line form; missing fields take their defaults, a bare word is `low` ("fp8" is BF16 with FP8 products).

        Raises:
          RuleError: MP201, naming the allowed words; MP206, for a device without a row.
        """
        if isinstance(text, Policy):
            return text
        if not isinstance(text, str):
            raise _bad(f"a policy is a string or a Policy, not {type(text).__name__}", "", "", ())
        given: dict[str, str] = {}
        low = ""  # of the bare word "fp8"
        for part in _COMMA.split(text):
            name, eq, value = (word.strip(" ") for word in part.partition("="))
            if not eq:
                name, value = ("products" if name == "fp8" else "low"), name
                low = low or ("bf16" if name == "products" else "")
            if name not in _allowed():
                raise _bad(
                    f"{text!r} has no policy field {name!r}",
                    f"the fields are {', '.join(_allowed())}",
                    name,
                    _allowed(),
                )
            if name in given:
                raise _bad(f"{text!r} gives {name} twice", "", "", ())
            given[name] = value[1:-1] if len(value) > 1 and value[0] == value[-1] == '"' else value
        return cls(**({"low": low} if low else {}) | given)  # type: ignore[arg-type]  # __post_init__ checks the words

    def with_low(self, low: str) -> Policy:
        return replace(self, low=low)  # type: ignore[arg-type]


def _quoted(value: str) -> str:
    return value if _PLAIN.fullmatch(value) else f'"{value}"'


def _allowed() -> dict[str, tuple[str, ...]]:
    hints = get_type_hints(Policy)
    return {f.name: get_args(hints[f.name]) for f in fields(Policy)}


def _bad(what: str, why: str, word: str, known: object) -> RuleError:
    near = suggest(str(word), [str(k) for k in known]) if word else ""  # type: ignore[attr-defined]
    hint = f"did you mean {near}?" if near else "'fp16', 'bf16', or fields such as 'low=fp16,output=low'"
    return RuleError("MP201", what, why=why, try_=hint)
