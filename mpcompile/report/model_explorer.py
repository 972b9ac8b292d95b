"""Node data for Google's Model Explorer: each node's precision over the graph that it shows, coloured as here.

The form is that of a node data file (``NodeDataProviderData`` of its types: results and their colours by graph and node).
Load it with *Upload* under *View node data*.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mpcompile.formats import FORMATS

if TYPE_CHECKING:
    from mpcompile.report.model import NodeRow, Report

FILL = {**{one.name: one.fill for one in FORMATS}, "keep": "#eeeeee"}
# What its adapter for exported programs calls its one graph.
_GRAPH = "graph"


def node_data(report: Report, graph: str = _GRAPH) -> dict[str, Any]:
    """The node data of one graph.

    Args:
      graph: id of the graph in Model Explorer: "graph" for an exported program, the model's own name for an ONNX model.

    Returns:
      ``{graph: {"name", "results": {key: {"value", "bgColor", "textColor"}}, …}}``, plain data. Keys are names of nodes
      (an exported program's) or of their first results (ONNX: what its adapters name nodes by).
    """
    results = {
        _key(report, row): {"value": row.precision, "bgColor": FILL[row.precision], "textColor": "#1d2330"}
        for row in report.nodes
    }
    return {graph: {"name": f"mpcompile {report.policy}", "results": results, "showExpandedSummaryOnGroupNode": True,
                    "showLabelCountColumnsInChildrenStatsTable": True}}  # fmt: skip


def _key(report: Report, row: NodeRow) -> str:
    node = report.graph.nodes.get(row.id)
    return node.outputs[0] if report.source == "onnx" and node is not None and node.outputs else row.id
