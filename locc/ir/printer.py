"""The training graph as readable Python, grouped by owner."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import fx

from locc.ir import ops
from locc.ir.captured import strip
from locc.ir.state import states
from locc.ir.view import View

_METHODS = {
    "add": "{} + {}",
    "sub": "{} - {}",
    "mul": "{} * {}",
    "truediv": "{} / {}",
    "iadd": "{} += {}",
    "matmul": "{} @ {}",
}


def render(ir: View) -> str:
    """Return the graph as text: a header, then one block of assignments for each stretch of an owner."""
    lines = _header(ir)
    names = ", ".join(n.name for n in (*ir.inputs, ir.target))
    lines.append(f"def step(self, {names}):")
    current = None
    for node in ir.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        owner = node.meta.get("owner", "")
        if owner != current:
            lines.append(f"    # {_title(ir, owner)}")
            current = owner
        lines.append("    " + statement(node))
    lines.append(f"    return {ir.output.name}")
    return "\n".join(lines) + "\n"


def _header(ir: View) -> list[str]:
    lines = [f"# {len(ir.modules)} modules: " + ", ".join(o.name for o in ir.modules)]
    lines += [f"# phase {phase}" for phase in ir.phases]
    for region in ir.repeats.values():
        carried = ", ".join(f"{a.name} <- {b.name}" for a, b in region.carried)
        lines.append(f"# region '{region.name}' runs {region.times} times, carrying {carried}")
    for path, state in states(ir.root):
        starts = f"self{_path(path)}.initial" if state.starts is None else f"{state.starts:g}"
        lines.append(f"# state '{state.name}' of '{state.owner}', {state.spec}, starts at {starts}")
    return lines


def _title(ir: View, owner: str) -> str:
    found = ir.owners.get(owner)
    if found is None:
        return f"---- {owner}"
    kind = "auxiliary" if found.auxiliary else f"module {found.index}"
    scale = f", learning rate x{found.lr_scale:g}" if found.lr_scale != 1.0 else ""
    norms = ", weights keep their norms" if found.keeps_norms else ""
    return f"---- {kind}: {owner}{scale}{norms}"


def statement(node: fx.Node, inline: Collection[fx.Node] = ()) -> str:
    """Return a node as a line of Python, with its spec; reads in `inline` stand where they are used."""
    call = _call(node, {read: f"self{_path(str(read.target))}" for read in inline})
    note = []
    if node.meta.get("spec") is not None and not isinstance(node.meta["spec"], (tuple, list, dict)):
        note.append(str(node.meta["spec"]))
    if node.target is ops.objective:
        return f"{call}  # {node.meta.get('objective')}"
    if node.meta.get("repeat"):
        note.append(f"in {node.meta['repeat']}")
    if "stream" in node.meta:
        note.append(f"draws as {node.meta['stream'].name}")
    text = f"{node.name} = {call}"
    return f"{text}  # {', '.join(note)}" if note else text


Names = Mapping[fx.Node, str]
"""What stands for a node, where that is not its name."""


def _call(node: fx.Node, names: Names) -> str:
    args = [_value(a, names) for a in node.args]
    args += [f"{k}={_value(v, names)}" for k, v in node.kwargs.items()]
    if node.op == "get_attr":
        return f"self{_path(str(node.target))}"
    if node.op == "call_module":
        return f"self{_path(str(node.target))}({', '.join(args)})"
    if node.op == "call_method":
        return f"{args[0]}.{node.target}({', '.join(args[1:])})"
    name = str(getattr(node.target, "__name__", node.target))
    if name == "getitem" and len(node.args) == 2:
        return f"{args[0]}[{_index(node.args[1], names)}]"
    form = _METHODS.get(name)
    if form and not node.kwargs and form.count("{}") == len(args):
        return form.format(*args)
    return f"{name}({', '.join(args)})"


def _index(value: Any, names: Names) -> str:
    """Return what stands between the brackets: slices keep their colons only there."""
    parts = value if isinstance(value, tuple) and value else (value,)
    inside = ", ".join(_slice(v, names) if isinstance(v, slice) else _value(v, names) for v in parts)
    return f"{inside}," if isinstance(value, tuple) and len(value) == 1 else inside


def _slice(value: slice, names: Names) -> str:
    parts = [value.start, value.stop] + ([value.step] if value.step is not None else [])
    return ":".join("" if p is None else _value(p, names) for p in parts)


def _path(target: str) -> str:
    """Return a dotted path as Python: `.blocks[0].fc`."""
    atoms = [] if target == "model" else strip(target).split(".")
    return "".join(f".{a}" if a.isidentifier() else f"[{a if a.isdigit() else repr(a)}]" for a in atoms)


def _value(value: Any, names: Names) -> str:
    if isinstance(value, fx.Node):
        return names.get(value, value.name)
    if isinstance(value, (tuple, list)):
        inside = ", ".join(_value(v, names) for v in value)
        if isinstance(value, list):
            return f"[{inside}]"
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {_value(v, names)}" for k, v in value.items()) + "}"
    return str(value) if str(value).startswith("torch.") else repr(value)
