"""The lists of torch.autocast on CUDA, read from the header that the installed torch ships."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import torch

# Registered outside the header's lists. CUDA autocast refuses binary_cross_entropy; FP32 is what its message asks for.
MORE_CUDA = {
    "norm.Scalar": "fp32", "norm.ScalarOpt_dim": "fp32", "binary_cross_entropy.default": "fp32",
    "cudnn_convolution.default": "lower", "cudnn_convolution_transpose.default": "lower",
}  # fmt: skip
_MACROS = {"LOWER_PRECISION_FP": "lower", "FP32": "fp32", "FP32_SET_OPT_DTYPE": "set_dtype", "PROMOTE": "promote"}


@functools.cache
def _header_lists() -> dict[str, str]:
    text = (Path(torch.__file__).parent / "include/ATen/autocast_mode.h").read_text()
    found = dict(MORE_CUDA)
    for macro, name in _MACROS.items():
        body = re.search(rf"#define AT_FORALL_{macro}\(_\)(.*?)\n\n", text, re.S)
        assert body is not None, macro
        for op, overload in re.findall(r"_\(\s*(\w+)(?:,\s*(\w+))?\)", body.group(1)):
            found[f"{op}.{overload or 'default'}"] = name
    return found


def header_lists() -> dict[str, str]:
    """Overload -> "lower", "fp32", "set_dtype" or "promote"."""
    return dict(_header_lists())


def registered(device: str) -> set[str]:
    """The overloads that torch has autocast kernels of, for "CUDA" or "CPU"."""
    names = torch._C._dispatch_get_registrations_for_dispatch_key(f"Autocast{device}")
    plain = [name.removeprefix("aten::") for name in names if name.startswith("aten::")]
    return {name if "." in name else f"{name}.default" for name in plain}
