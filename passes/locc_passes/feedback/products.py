"""Products with a weight that are written as functions: `F.linear(x, w)`, `x @ w`, packed attention."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from locc.ir import TrainingGraph, owned_tensor, stop_gradient
from locc.nn import feedback_linear
from locc.rewrite import spec_of

Slot = int | str
"""A position among the arguments of a call, or a keyword."""

_LINEAR = (
    "linear",
    "matmul",
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "mv",
    "addmv",
    "dot",
    "einsum",
    "tensordot",
    "grouped_mm",
)
_CONVOLUTIONS = ("convolution", "conv1d", "conv2d", "conv3d")
_TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
ATTENTION = "multi_head_attention_forward"
PRODUCTS = frozenset([*_LINEAR, *_CONVOLUTIONS, *_TRANSPOSED, "bilinear", ATTENTION])
_PICKS = ("getitem", "__getitem__", "index_select", "index", "gather", "take_along_dim")

_ADDED: dict[str, tuple[Slot, ...]] = {  # what is no factor; the third argument unless listed
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), (0, "input")),
    **dict.fromkeys(("einsum", "tensordot"), ()),
    "bilinear": (3, "bias"),
    "grouped_mm": (2, "offs", 3, "bias"),
}
_RIGHT = (
    "matmul",
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "grouped_mm",
)  # a weight that stands right has its inputs in its rows


class FeedbackProduct:
    """A function that is affine in an activation x, with the weight w: its gradient to x runs through B.

    The value is that of the function, and so are the gradients to w and to what is added.
    """

    def __init__(
        self, function: Callable[..., Tensor], name: str, activation: Slot, weight: Slot, right: bool
    ) -> None:
        self.function, self.activation, self.weight = function, activation, weight
        self.right, self.transposed = right, name in _TRANSPOSED
        self.convolves = name in (*_CONVOLUTIONS, *_TRANSPOSED)
        self.__name__ = self.__qualname__ = f"feedback_{name}"

    def __call__(self, args: tuple[Any, ...], feedback: Tensor, **kwargs: Any) -> Tensor:
        """Return the product; `args` and `kwargs` are the function's, `feedback` has the weight's shape."""
        given: dict[Slot, Any] = dict(enumerate(args))
        given.update(kwargs.items())
        x = given[self.activation]
        if not (x.requires_grad and torch.is_grad_enabled()):
            return self._call(given, len(args))
        exact = self._call({**given, self.activation: x.detach()}, len(args))
        fixed = {slot: v.detach() if isinstance(v, Tensor) else v for slot, v in given.items()}
        # x - x.detach() is zero, so what is returned is exact, whatever B is.
        fixed.update({self.weight: feedback.detach(), self.activation: x - x.detach()})
        back = self._call(fixed, len(args))
        return exact + (back - back.detach())

    def groups(self, call: fx.Node) -> int:
        """Return the groups of a call of a convolution that this stands for."""
        args = call.args[0]
        assert isinstance(args, tuple)
        place = 8 if self.__name__ == "feedback_convolution" else 6
        found = args[place] if len(args) > place else call.kwargs.get("groups", 1)
        assert isinstance(found, int)
        return found

    def multiplied(self, call: fx.Node) -> list[fx.Node]:
        """Return the weight of a call that this stands for."""
        (args, *_), kwargs = call.args, call.kwargs
        assert isinstance(args, tuple)
        found = args[self.weight] if isinstance(self.weight, int) else kwargs[self.weight]
        assert isinstance(found, fx.Node)
        return [found]

    def _call(self, given: dict[Slot, Any], count: int) -> Tensor:
        rest = {slot: value for slot, value in given.items() if isinstance(slot, str)}
        return self.function(*(given[i] for i in range(count)), **rest)


def multiplied(call: fx.Node) -> list[fx.Node]:
    """Return the weights of a call of a `replacement`, one for each of its matrices; of no other call any."""
    if isinstance(call.target, FeedbackProduct):
        return call.target.multiplied(call)
    if call.target is not feedback_attention:
        return []
    given = inspect.signature(F.multi_head_attention_forward).bind(*call.args[0], **call.kwargs)  # type: ignore[misc]
    return [given.arguments[n] for n in _PROJECTIONS if given.arguments.get(n) is not None]


def feedback_attention(args: tuple[Any, ...], matrices: tuple[Tensor, ...], **kwargs: Any) -> Any:
    """Call `F.multi_head_attention_forward`; the gradients through its projections run through `matrices`.

    The projections are done outside of it, in which they are then identities.

    Args:
        args: of that function.
        matrices: for each of its weights that is given, in `_PROJECTIONS`' order.
        **kwargs: of that function.
    """
    given = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs).arguments
    feedback = dict(zip((n for n in _PROJECTIONS if given.get(n) is not None), matrices, strict=True))
    if given.get("use_separate_proj_weight"):
        weights = [(given[n], feedback[n]) for n in _PROJECTIONS[1:4]]
    else:
        packed = (given["in_proj_weight"].chunk(3), feedback["in_proj_weight"].chunk(3))
        weights = list(zip(*packed, strict=True))
    bias = given["in_proj_bias"]
    biases = [None] * 3 if bias is None else bias.chunk(3)
    inputs = [given[n] for n in ("query", "key", "value")]
    done = [feedback_linear(x, w, b, m) for x, (w, m), b in zip(inputs, weights, biases, strict=True)]
    out, out_bias = given["out_proj_weight"], given["out_proj_bias"]
    eye = torch.eye(out.shape[0], dtype=out.dtype, device=out.device)
    given.update(zip(("query", "key", "value"), done, strict=True))
    given.update(dict.fromkeys((*_PROJECTIONS[1:],), eye), use_separate_proj_weight=True)
    given.update(in_proj_weight=None, in_proj_bias=None, out_proj_bias=None)
    value, scores = F.multi_head_attention_forward(**given)
    return feedback_linear(value, out, out_bias, feedback["out_proj_weight"]), scores


_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj_weight")


@dataclass(frozen=True)
class Product:
    """A node that multiplies an activation with a weight.

    Attributes:
        node: the call.
        activations: what is multiplied.
        weights: by what, computed from parameters alone.
        replacement: the function to call instead, with ((args), B, ..., **kwargs); None if there is none.
        right: the weight stands right of the activation, as [inputs, outputs].
    """

    node: fx.Node
    activations: tuple[fx.Node, ...]
    weights: tuple[fx.Node, ...]
    replacement: Callable[..., Any] | None
    right: bool = False

    @property
    def convolves(self) -> bool:
        """Whether the weight is a kernel."""
        return isinstance(self.replacement, FeedbackProduct) and self.replacement.convolves


def products(ir: TrainingGraph) -> list[Product]:
    """Return the calls of functions that multiply an activation with a weight."""
    weights = weights_in(ir)
    found = []
    for node in ir.graph.nodes:
        name = product_name(node)
        if name in PRODUCTS:
            product = _attention(node, weights) if name == ATTENTION else _product(node, name, weights)
            found += [product] if product.weights and product.activations else []
    return found


def product_name(node: fx.Node) -> str:
    """Return the name of the function that a node calls, as PyTorch spells it; "" for a module's call."""
    if node.op not in ("call_function", "call_method"):
        return ""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.split(".")[0]  # torch.export writes `linear.default`


def weights_in(ir: TrainingGraph) -> set[fx.Node]:
    """Return the nodes that are computed from parameters alone, lent ones of other modules included."""
    found: set[fx.Node] = set()
    for node in ir.graph.nodes:
        if node.op == "get_attr":
            own = isinstance(owned_tensor(ir.root, str(node.target)), nn.Parameter)
        else:
            sources = node.all_input_nodes
            computed = node.op in ("call_function", "call_method", "call_module")
            own = computed and any(n in found for n in sources)
            own = own and all(n in found or n.op == "get_attr" for n in sources)
        if own:
            found.add(node)
    return found


def selected(ir: TrainingGraph) -> list[fx.Node]:
    """Return the stacks of matrices of which a product takes those that data picks."""
    weights, stacks = weights_in(ir), dict[fx.Node, fx.Node]()
    for node in ir.graph.nodes:
        sources = node.all_input_nodes
        if product_name(node) in PRODUCTS:
            continue
        if product_name(node) in _PICKS and sources and sources[0] in weights and node not in weights:
            if len(spec_of(sources[0]).shape) > 2:
                stacks[node] = sources[0]
        elif sources and sources[0] in stacks:
            stacks[node] = stacks[sources[0]]
    used = (n for n in ir.graph.nodes if product_name(n) in PRODUCTS)
    return list(dict.fromkeys(stacks[s] for n in used for s in n.all_input_nodes if s in stacks))


def spelled(node: fx.Node) -> str:
    """Return how a weight is computed: the same text for the same parameter under the same views."""
    if node.op == "get_attr":
        return str(node.target)
    if node.target is stop_gradient:
        return spelled(node.all_input_nodes[0])
    sources = ",".join(spelled(n) for n in node.all_input_nodes)
    rest = [a for a in (*node.args, *node.kwargs.items()) if not isinstance(a, fx.Node)]
    return f"{product_name(node) or node.target}({sources};{rest})"


def _product(node: fx.Node, name: str, weights: set[fx.Node]) -> Product:
    added = _ADDED.get(name, (2, "bias"))
    given: dict[Slot, Any] = dict(enumerate(node.args))
    given.update(node.kwargs.items())
    slots = {s: a for s, a in given.items() if isinstance(a, fx.Node) and s not in added}
    held = [s for s, a in slots.items() if a in weights]
    moving = [s for s, a in slots.items() if a not in weights]
    right = name in _RIGHT and bool(held and moving) and list(slots).index(held[0]) > 0
    replacement = None
    if len(held) == len(moving) == 1 and name != "bilinear":
        function = getattr(Tensor, str(node.target)) if node.op == "call_method" else node.target
        replacement = FeedbackProduct(function, name, moving[0], held[0], right)  # type: ignore[arg-type]
    return Product(node, tuple(slots[s] for s in moving), tuple(slots[s] for s in held), replacement, right)


def _attention(node: fx.Node, weights: set[fx.Node]) -> Product:
    given = inspect.signature(F.multi_head_attention_forward).bind(*node.args, **node.kwargs).arguments
    moving = tuple(dict.fromkeys(given[n] for n in ("query", "key", "value")))
    held = tuple(given[n] for n in _PROJECTIONS if given.get(n) is not None)
    return Product(node, moving, held, feedback_attention)
