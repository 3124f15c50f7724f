"""A graph as a picture: Graphviz text with data edges solid and effect edges dashed."""

from __future__ import annotations

from sagellm.ir.edit import only_block
from sagellm.ir.graph import IRGraph, dependences


def dot(graph: IRGraph) -> str:
    """Every function of the module as a cluster."""
    lines = ["digraph sagellm {", "  rankdir=TB; node [shape=box, fontname=monospace];"]
    for number, function in enumerate(graph):
        name = function.properties["sym_name"].data
        lines.append(f'  subgraph cluster_{number} {{ label="@{name}";')
        view = dependences(only_block(function))
        for node in view:
            weight = node.op.properties.get("weight")
            label = node.name if weight is None else f"{node.name}\\n@{weight.root_reference.data}"
            lines.append(f'    n{number}_{node.index} [label="{label}"];')
        for source, target, data in view.edges(data=True):
            style = ' [style=dashed, label="{}"]'.format(data["value"]) if data["kind"] == "effect" else ""
            lines.append(f"    n{number}_{source.index} -> n{number}_{target.index}{style};")
        lines.append("  }")
    return "\n".join([*lines, "}"]) + "\n"
