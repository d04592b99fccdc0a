"""Whether a forward looks at the mode, so that one trace can serve training and inference."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from locc.capture.eager import Run, Sight
from locc.capture.targets import printable
from locc.ir.calls import Switched

DROPOUTS = frozenset(
    getattr(nn.functional, name)
    for name in (
        *("dropout", "dropout1d", "dropout2d", "dropout3d"),
        *("alpha_dropout", "feature_alpha_dropout"),
    )
)


@dataclass
class Reads:
    """Whether anything has read `training` of a module."""

    any: bool = False


@contextmanager
def modes_watched(model: nn.Module) -> Iterator[Reads]:
    """Note every read of a module's `training` by attribute, from the first call of the model on."""
    reads = Reads()

    def start(*_: Any) -> None:
        reads.any = False  # some models look at it in `train()`

    def read(module: nn.Module) -> bool:
        reads.any = True
        try:
            return bool(module.__dict__["training"])
        except KeyError:
            raise AttributeError("training") from None

    def write(module: nn.Module, value: bool) -> None:
        module.__dict__["training"] = value

    # A property of the class comes before what an instance holds under its name.
    setattr(nn.Module, "training", property(read, write))  # noqa: B010
    hook = model.register_forward_pre_hook(start, prepend=True)
    try:
        yield reads
    finally:
        hook.remove()
        delattr(nn.Module, "training")


def alike(one: Run, other: Run) -> bool:
    """Whether two runs called the same closed modules and got the same, but for the values of tensors."""
    return _told(one) == _told(other)


def _told(run: Run) -> list[Any]:
    plain = [None if isinstance(v, Tensor) else _seen(v) for v in run.outputs]
    calls = [(c.path, c.structure, c.mutated, c.refilled, [_seen(r) for r in c.results]) for c in run.calls]
    return [run.structure, plain, calls]


def _seen(result: Any) -> Any:
    if isinstance(result, Sight):
        return result.shape, result.stride, result.dtype, result.device  # a dropout returns its input in eval
    return result if printable(result) else id(result)


def switch_dropouts(training: fx.Graph, inference: fx.Graph) -> None:
    """Have the calls of dropout functions that follow the mode say so, for phases in which a module rests.

    A call whose line draws in eval mode as well is meant to.
    """
    always = {node.meta.get("line") for node in inference.nodes if _drops(node)}
    for node in training.nodes:
        if _drops(node) and node.meta.get("line") not in always:
            node.target = Switched(node.target)


def _drops(node: fx.Node) -> bool:
    """Whether a node is a call of a dropout function of `torch.nn.functional`, in training."""
    if node.op != "call_function" or node.target not in DROPOUTS:
        return False
    given = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    given.apply_defaults()
    return given.arguments["training"] is True
