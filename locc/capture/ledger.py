"""The graph that a concrete trace writes, and which node stands for which fake tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from locc.capture.calls import Calls
from locc.capture.eager import Eager, Records
from locc.capture.graphs import RefusalError, tensor_paths
from locc.capture.sizes import Sizes, is_symbolic, same_size
from locc.capture.source import user_code, user_line
from locc.capture.targets import Constant, Region, printable
from locc.capture.tree import flatten
from locc.errors import CaptureError
from locc.ir.captured import Root
from locc.ir.ops import Rebuild


class Ledger:
    """Keeps a node for each tensor that the forward meets.

    Attributes:
        records: what the closed modules returned in real runs.
        outside: the autograd and autocast modes in which the forward was called.
        writers: nodes that change an argument in place.
    """

    def __init__(
        self, root: Root, graph: fx.Graph, calls: Calls, sizes: Sizes, records: Records, eager: Eager
    ) -> None:
        super().__init__()
        self.root, self.graph, self.calls, self.sizes = root, graph, calls, sizes
        self.records, self.eager = records, eager
        self.fake = FakeTensorMode(shape_env=sizes.env, allow_non_fake_inputs=True)
        self.outside = Region.now()
        self.paths = tensor_paths(root)
        self.writers: set[fx.Node] = set()
        self._nodes: dict[int, fx.Node] = {}
        self._fakes: dict[int, Tensor] = {}
        self._read: dict[int, Tensor] = {}
        self._lost: dict[int, str] = {}
        self._held: list[Any] = []  # so that an id names one object

    def bind(self, fake: Tensor, node: fx.Node) -> Tensor:
        """Let `node` stand for a fake tensor from now on."""
        self._nodes[id(fake)] = node
        self._held.append(fake)
        return fake

    def lose(self, fake: Tensor, why: str) -> None:
        """Let no node stand for a fake tensor: whoever uses it gets `why`, which ends in "is used"."""
        self._lost[id(fake)] = why
        self._held.append(fake)

    def as_fake(self, tensor: Tensor) -> Tensor:
        """Return the fake tensor of a parameter, buffer or constant."""
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in self._fakes:
            self._fakes[id(tensor)] = self.fake.from_tensor(tensor, static_shapes=True)
            self._held += [tensor, self._fakes[id(tensor)]]
            self._read[id(self._fakes[id(tensor)])] = tensor
        return self._fakes[id(tensor)]

    def node_of(self, tensor: Tensor) -> fx.Node:
        """Return the node of a tensor, real or fake."""
        fake = self.as_fake(tensor)
        if id(fake) not in self._nodes:
            real = self._read.get(id(fake))
            if real is None:
                why = self._lost.get(id(fake), "a tensor of unknown origin is used")
                raise CaptureError(f"{why} at {user_code()}")
            self.bind(fake, self._outside_tensor(real))
        return self._nodes[id(fake)]

    def size_of_input(self, node: fx.Node) -> tuple[fx.Node, int] | None:
        """Return the input, and the dimension of it, that has the size which a node reads off a tensor."""
        if node.op != "call_method" or node.target != "size":
            return None
        fakes = {self._nodes[id(t)]: t for t in self._held if id(t) in self._nodes}
        tensor, dim = node.args
        if not isinstance(tensor, fx.Node) or tensor not in fakes:
            return None
        read = fakes[tensor].shape[dim]
        inputs = [(n, i) for n in fakes if n.op == "placeholder" for i in range(fakes[n].dim())]
        return next(((n, i) for n, i in inputs if same_size(fakes[n].shape[i], read)), None)

    def _outside_tensor(self, real: Tensor) -> fx.Node:
        path = self.paths.get(id(real))
        if path is not None:
            return self.emit("get_attr", path, (), {})
        if isinstance(real, nn.Parameter):
            raise RefusalError(
                f"a parameter of shape {tuple(real.shape)} that the model does not register is used at "
                f"{user_code()}; assign it to an attribute of its module, or put its module into a ModuleList"
            )
        return self.emit("call_function", Constant(real.detach()), (), {})

    def _node_or_none(self, value: Any) -> fx.Node | None:
        return self.node_of(value) if isinstance(value, Tensor) else None

    def emit(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        """Add a node, with the calls and the line of the moment."""
        node = self.graph.create_node(op, target, args, kwargs)
        node.meta["stack"] = self.calls.now()
        line = user_line()
        if line:
            node.meta["line"] = line
        return node

    def argument(self, value: Any, near: list[Tensor]) -> Any:
        """Return a value as a node's argument."""
        if isinstance(value, Tensor):
            return self.node_of(value)
        if is_symbolic(value):
            return self.sizes.node(value, near, self.node_of, self.emit)
        if isinstance(value, torch.Size):
            return tuple(self.argument(v, near) for v in value)
        if isinstance(value, slice):
            return slice(*(self.argument(v, near) for v in (value.start, value.stop, value.step)))
        if type(value) in (tuple, list):
            return type(value)(self.argument(v, near) for v in value)
        if type(value) is dict and all(printable(k) for k in value):
            return {k: self.argument(v, near) for k, v in value.items()}
        values, structure = flatten(value)
        if structure.branches is not None and any(isinstance(v, Tensor) or is_symbolic(v) for v in values):
            kind = structure.kind.__name__ if structure.kind else "value"
            parts = tuple(self.argument(v, near) for v in values)
            return self.emit("call_function", Rebuild(structure.build, f"build_{kind}"), parts, {})
        if isinstance(value, nn.Module):
            raise CaptureError(
                f"a module ({type(value).__name__}) is passed as an argument at {user_code()}, which hides "
                "whose parameters are used there; call it, or pass its tensors"
            )
        return value if printable(value) else self.emit("call_function", Constant(value), (), {})
