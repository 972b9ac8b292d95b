"""Write a torch model's rewritten forward as ONNX, each node with its decision and the reason for it.

The plan is made on the FX graph, written there, and goes through ``torch.onnx.export`` with its casts; the exporter's
own record of which FX node an ONNX node came from joins the two.  Its optimizer is off: it folds ``x + 1e-8`` away.
Types that PyTorch promotes silently are made explicit (`mpcompile.onnx.export.unify_types`).
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import fx

from mpcompile.aten.capture import export
from mpcompile.aten.exported import inline_regions
from mpcompile.aten.write import write
from mpcompile.errors import OnnxError
from mpcompile.graph import PrecisionGraph
from mpcompile.onnx.export.decompositions import forward_table
from mpcompile.onnx.export.replacements import replace_wrong
from mpcompile.onnx.export.unify_types import unify_types
from mpcompile.onnx.read.prepare import OPSETS
from mpcompile.onnx.write import check as onnx_check
from mpcompile.onnx.write.edits import annotate
from mpcompile.onnx.write.simulate import simulate


@dataclass
class OnnxExport:
    """An exported model.

    Fields:
      ir_model: the model, in `onnx_ir`.
      graph: the precision graph of the FX model, after the passes.
      notes: lines for the user.
    """

    ir_model: ir.Model
    graph: PrecisionGraph
    notes: list[str] = field(default_factory=list)

    @property
    def model(self) -> onnx.ModelProto:
        return ir.to_proto(self.ir_model)

    def simulated(self) -> onnx.ModelProto:
        """The same with FP32 operators and rounded values: its numbers, on any provider."""
        return ir.to_proto(simulate(self.ir_model))


def export_onnx(mp: Any, path: str | os.PathLike[str], *args: Any, dynamic_shapes: Any = None, annotate_only: bool = False,
                custom_translation_table: Mapping[Any, Any] | None = None, **kwargs: Any) -> OnnxExport:  # fmt: skip
    """Export the forward of a `MixedPrecisionModule` for these example arguments, and write it to `path`.

    Args:
      dynamic_shapes: as in `torch.export.export`; the example's shapes when None.
      annotate_only: the FP32 graph with the annotations and no casts, for tools that choose precisions themselves.
      custom_translation_table: as in `torch.onnx.export`.

    Raises:
      CaptureError: MP101. OnnxError: MP602, MP603 (nothing is written), MP607, MP612.
    """
    from mpcompile.compiler import decide
    from mpcompile.hardware import device_of

    module = export(mp.model, args, kwargs, dynamic_shapes).module()
    inline_regions(module)
    plan = decide(module, mp.settings, device_of(mp.parameters()))
    if fast := next((node for node in plan.graph if node.fp8), None):
        raise OnnxError("MP612", "a linear layer reads its operands in FP8", where=fast.module or fast.id,
                        try_="mpcompile(model, 'bf16').export_onnx(...)")  # fmt: skip
    written = plan.capture.module if annotate_only else write(plan.capture, plan.graph).module
    _mark(written, plan.graph)
    replace_wrong(written)
    held = translate(written, args, kwargs, dynamic_shapes, OPSETS.get(plan.policy.low, 20), custom_translation_table)
    made = OnnxExport(held[0], plan.graph)
    added = unify_types(made.ir_model, "cuda")
    if added:
        made.notes.append(f"{added} casts make explicit what PyTorch's kernels promote inside")
    plan.graph.header.update(policy=str(plan.policy), device=plan.row)
    _annotate(made, held[1])
    _save(made, path)
    return made


def _mark(module: fx.GraphModule, graph: PrecisionGraph) -> None:
    """Give every FX node the id of its decision, in the one field that survives torch's exporters."""
    for node in module.graph.nodes:
        key = node.meta.get("mp_node", node.name)
        if key in graph.nodes:
            node.meta["custom"] = {**node.meta.get("custom", {}), "mp_node": key}
        elif node.op == "call_function":
            node.meta["custom"] = {**node.meta.get("custom", {}), "mp_node": ""}


def translate(module: Any, args: Any, kwargs: Any, dynamic_shapes: Any, version: int,
              table: Mapping[Any, Any] | None = None) -> tuple[ir.Model, dict[str, str]]:  # fmt: skip
    """The ONNX model of `module`, and per FX node of the exported program the id of its decision.

    Raises:
      OnnxError: MP607.
    """
    with _quiet(), torch.no_grad():
        exported = torch.export.export(module, args, dict(kwargs), dynamic_shapes=dynamic_shapes, strict=False)
        if any(_trains_batch_norm(node) for node in exported.graph.nodes):
            exported = exported.run_decompositions(forward_table())
        try:
            program = torch.onnx.export(
                exported, dynamo=True, optimize=False, verbose=False, opset_version=version,
                custom_translation_table=dict(table or {}),
            )  # fmt: skip
        except Exception as error:  # the exporter's errors have no base of their own
            reasons = [line for line in str(error).splitlines() if line.startswith("<class ")] or [str(error)]
            raise OnnxError("MP607", "torch.onnx.export refused the model",
                            where=reasons[-1][:300] if len(reasons) > 1 else "", why=reasons[0][:300]) from error  # fmt: skip
    assert program is not None
    assert program.exported_program is not None
    origins = {n.name: n.meta.get("custom", {}).get("mp_node", "") for n in program.exported_program.graph.nodes}
    return program.model, origins


def _trains_batch_norm(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.batch_norm.default and bool(node.args[5])


def _annotate(made: OnnxExport, origins: dict[str, str]) -> None:
    """Copy each decision to the ONNX nodes that carry it out."""
    for graph in (made.ir_model.graph, *made.ir_model.graph.subgraphs()):
        for node in graph:
            key = origins.get(_fx_name(node), "")
            if key in made.graph.nodes:
                annotate(made.ir_model, made.graph, {key: node})


def _fx_name(node: ir.Node) -> str:
    """Name of the FX node that the exporter made `node` for: "%linear : [num_users=1] = …"."""
    return node.metadata_props.get("pkg.torch.onnx.fx_node", "").partition(" ")[0].lstrip("%")


def _save(made: OnnxExport, path: str | os.PathLike[str]) -> None:
    name, large = Path(path).name, onnx_check.weight_bytes(made.ir_model) > onnx_check.EXTERNAL_FROM

    def fill(folder: Path) -> None:
        ir.save(made.ir_model, folder / name, external_data=f"{name}.data" if large else None)
        target = folder / name if large else made.model
        # Where no provider here has the kernels, the simulation is loaded: it has the same structure.
        stand_in = simulate(made.ir_model) if large else made.simulated()
        made.notes += onnx_check.check(target, lambda: stand_in, loads=stand_in)

    onnx_check.save_atomic(path, fill)


@contextmanager
def _quiet() -> Any:
    """Torch's exporter logs what it registers and warns of its own deprecations."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


__all__ = ["OnnxExport", "export_onnx", "translate"]
