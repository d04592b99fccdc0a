"""What a compiled forward pass keeps for its backward pass, on a CPU: the sign of an activation.

A mask of a value that is handed on (a ReLU's, say) is smaller than the value, so the compiler keeps the mask.
To store booleans takes its code on a CPU longer than all else that a forward pass does with the value, which
is kept by whoever reads it; so the mask is made again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy

_SAME = {torch.ops.aten.alias.default, torch.ops.aten.detach.default}


def made_again(graph: torch.fx.GraphModule, inputs: Any) -> torch.fx.GraphModule:
    """Mark the masks of what a joint graph of both passes returns, so that none is kept."""
    (output,) = graph.graph.find_nodes(op="output")
    known = set(output.all_input_nodes)
    for node in graph.graph.nodes:
        made = node.meta.get("val")
        if not (node.all_input_nodes and known.issuperset(node.all_input_nodes) and isinstance(made, Tensor)):
            continue
        if node.target in _SAME:
            known.add(node)
        elif made.dtype == torch.bool and made.device.type == "cpu":
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            known.add(node)
    return graph
