"""Parts that fail today, and why: left out of the default run. A slow test asks of each that it still fails, so none stays listed."""

from __future__ import annotations

KNOWN = {
    # the model's identity after the first step
    "replace parameter": "the old parameter is trained on",
    "replace parameter and tell": "inside a window the old parameter's sum is used",
    "replace in its group": "an equal count of parameters is taken for the same ones",
    "replace layer": "the old layer is trained on",
    "replace layer and tell": "inside a window the old layer's sums are used",
    "wrap layer": "the old structure runs",
    "replace activation": "the old module runs",
    "drop bias": "the old bias is trained on",
    "load assigned": "the old parameters are trained on",
    "transpose layout": "the layout of the first call is taken for granted",
    "prune": "not seen",
    "weight norm": "not seen",
    "forward hook": "not seen, by the drop-in either",
    "forward pre-hook": "not seen, by the drop-in either",
    "backward hook": "not seen",
    "gradient hook": "not seen",
    "accumulated hook": "not seen",
    "attribute": "numbers of modules are constants of the graph",
    "add parameter": "inside a window a renamed parameter is looked for by its old name",
    # the optimizer's identity
    "swap groups": "not seen",
    "one state emptied": "not seen",
    "moments replaced": "the old moments are written",
    "steps edited": "the counters are copies",
    "maximize": "not read again",
    "nesterov": "not read again",
    # windows
    "late": "inside a window a head without gradient is updated",
    "either": "inside a window a head without gradient is updated",
    # the graph
    "max_norm": "a trained parameter written in the forward",
    "ema buffer assigned": "not written back",
    "tensor hook": "dropped",
    "clamp lowest": "FP32's lowest number has no BF16",
    "batch norm": "of a transposed tensor, op by op",
    "batch norm no stats": "of a transposed tensor, op by op",
}
