"""A graph as a picture: Graphviz text with data edges solid and effect edges dashed."""

from __future__ import annotations

from sagellm.ir.check import weight_names
from sagellm.ir.edit import only_block, symbol_name
from sagellm.ir.graph import IRGraph, dependences


def dot(graph: IRGraph) -> str:
    """Every function of the module as a cluster."""
    lines = ["digraph sagellm {", "  rankdir=TB; node [shape=box, fontname=monospace];"]
    for number, function in enumerate(graph):
        name = symbol_name(function)
        lines.append(f'  subgraph cluster_{number} {{ label="@{name}";')
        view = dependences(only_block(function))
        for node in view:
            label = "\\n@".join([node.name, *weight_names(node.op)])
            lines.append(f'    n{number}_{node.index} [label="{label}"];')
        for source, target, data in view.edges(data=True):
            style = ' [style=dashed, label="{}"]'.format(data["value"]) if data["kind"] == "effect" else ""
            lines.append(f"    n{number}_{source.index} -> n{number}_{target.index}{style};")
        lines.append("  }")
    return "\n".join([*lines, "}"]) + "\n"
