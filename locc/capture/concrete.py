"""The second mechanism: the forward runs on fake tensors, and every call that it makes is written down."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from locc.capture.batch import Call
from locc.capture.calls import Calls, intercepting
from locc.capture.decisions import Reading, answer, evaluation
from locc.capture.eager import Eager, Records, Run
from locc.capture.graphs import (
    COLLECTED,
    RefusalError,
    Trace,
    access,
    emit_output,
    parents_of,
    placeholder_name,
    tidy,
)
from locc.capture.leaves import record
from locc.capture.ledger import Ledger
from locc.capture.patches import functions_patched
from locc.capture.sizes import Sizes
from locc.capture.source import only_raises, user_code, user_line
from locc.capture.state import bindings, python_random_state, rewritten
from locc.capture.targets import (
    Applied,
    Hooked,
    InRegion,
    Region,
    callable_of,
    name_of,
    target_of,
)
from locc.capture.transforms import Collecting, Transformed, transforms_patched
from locc.capture.tree import flatten, leaves_of, map_plain
from locc.errors import CaptureError
from locc.ir.captured import Decision, Root, strip
from locc.ir.grouped import grouped_mm
from locc.ir.ops import assign
from locc.ir.spec import Point
from locc.snapshot import preserved

_READS_VALUES = {"__bool__", "__int__", "__float__", "__index__", "__complex__", "__contains__", "__array__"}
_READS_VALUES |= {"item", "tolist", "numpy", "is_nonzero", "equal", "allclose"}
_AMBIENT = {"_set_grad_enabled", "set_grad_enabled", "_enter_autocast", "_exit_autocast"}
_WRITTEN_AS = {torch._grouped_mm: grouped_mm}  # what PyTorch cannot run on shapes alone
_DYNAMIC = ("DataDependentOutputException", "DynamicOutputShapeException", "GuardOnDataDependentSymNode")


def trace(
    root: Root,
    call: Call,
    opened: frozenset[str],
    training: bool,
    eager: Eager,
    points: list[Point],
) -> Trace:
    """Record the opened modules' calls on fake tensors with a symbolic batch and free dimensions.

    Raises:
        CaptureError: a value steers the opened code, or something cannot be written into a graph.
    """
    runs = {point: eager.run(training, point, backward=False) for point in points}
    graph = fx.Graph()
    batched = any(point.batch != points[0].batch for point in points)
    sizes = Sizes(points[0], batched, call.dims)
    recorder = Recorder(root, graph, Calls(root, opened), sizes, Records(runs, call.dims), eager)
    with preserved(root), torch.enable_grad():
        root.train(training)
        recorder.run(call, runs[points[0]])
    kept = [f"the forward sets '{strip(path)}'" for path in recorder.stashed]
    kept += [f"'{strip(c.path)}' changes its arguments" for c in runs[points[0]].calls if c.refilled]
    if kept and eager.remembers(training, points[0]):
        raise RefusalError(
            f"{kept[0]} and its next call gives another output, so one "
            "call feeds the next; make it a buffer (register_buffer), or take it as an input and return it"
        )
    tidy(graph)
    for decision in recorder.decisions:
        for point in points[1:]:
            if decision.evaluate(call.at(point)) is not decision.answer:
                raise RefusalError(
                    f"the values of the inputs steer the forward between modules that stay closed, one way "
                    f"at {call.text(points[0])} and another at {call.text(point)}, at {decision.place}\n"
                    f"A graph has no such branch: {decision.remedy}, or use torch.where"
                )
    return Trace(graph, sizes.guards(), recorder.notes, recorder.decisions)


class Recorder(Ledger, TorchFunctionMode):
    """Executes the user's forward on fake tensors and writes down what it calls."""

    def __init__(
        self, root: Root, graph: fx.Graph, calls: Calls, sizes: Sizes, records: Records, eager: Eager
    ) -> None:
        super().__init__(root, graph, calls, sizes, records, eager)
        self.notes: list[str] = []
        self.stashed: list[str] = []
        self.decisions: list[Decision] = []
        self._example: list[Tensor] = []
        self._paused = 0

    def run(self, call: Call, eager: Run) -> None:
        """Record the whole forward."""
        before, drawn = bindings(self.root), python_random_state()
        self.outside = Region.now()
        self._example = call.at(self.records.points[0])
        with self.fake, enable_python_dispatcher():  # composite operators then take symbolic sizes
            inputs = call.inputs([self._placeholder(n, i, call) for i, n in enumerate(call.names)])
            with (
                self.sizes.watching(lambda: self._paused > 0),
                functions_patched(self._applied),
                transforms_patched(self._transformed),
                intercepting(self._called),
                self,
            ):
                result = self._forward(inputs.args, inputs.kwargs)
            if python_random_state() != drawn:
                raise RefusalError(
                    "the forward draws from Python's or NumPy's random numbers between the modules that stay "
                    "closed; use torch's, inside a submodule"
                )
            self._written(before)
            self.graph.output(emit_output(self.graph, eager, result, self._node_or_none))

    def _forward(self, args: Any, kwargs: Any) -> Any:
        try:
            return self.root.model(*args, **kwargs)
        except CaptureError:
            raise
        except Exception as error:
            if type(error).__name__ in _DYNAMIC:
                raise self._data_dependent("a shape or a decision") from error
            hooked = any(m._forward_hooks and self.calls.is_leaf(m) for m in self.root.modules())
            raise CaptureError(
                f"the forward fails on fake tensors: {type(error).__name__}: {error}"
                + (f"; if it misses values, {COLLECTED}" if hooked else "")
            ) from error

    def _placeholder(self, name: str, index: int, call: Call) -> Tensor:
        tensor = call.tensors[index]
        shape = [self.sizes.of(call.free[index].get(i, int(n))) for i, n in enumerate(tensor.shape)]
        if call.batched[index]:
            shape[0] = self.sizes.batch
        fake = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
        node = self.graph.placeholder(placeholder_name(name))
        return self.bind(fake, node)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Record nothing for a while."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    # --- calls of torch functions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._paused or name_of(func) in _AMBIENT:
            return func(*args, **kwargs)
        with self.pause():
            return self._record(func, args, kwargs)

    def _record(self, func: Any, args: Any, kwargs: Any) -> Any:
        func = _WRITTEN_AS.get(func, func)
        name = name_of(func)
        if name == "__iter__":
            return iter(self._record(torch.Tensor.unbind, args, kwargs))
        if name == "__set__":
            self._refuse_setter(func)
        if name == "register_hook":
            return self._hook(args[0], args[1] if len(args) > 1 else kwargs["hook"])
        args, kwargs = map_plain((args, kwargs), self._real_to_fake)
        given = [v for v in leaves_of((args, kwargs)) if isinstance(v, Tensor)]
        if any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in given):
            raise CaptureError(
                f"a functorch transform that was imported by name, at {user_code()}; call torch.func"
            )
        versions = [t._version for t in given]
        result = self._execute(func, name, args, kwargs)
        if name in ("size", "shape"):
            self.sizes.seen(args[0])
        changed = any(t._version != v for t, v in zip(given, versions, strict=True))
        if not changed and not any(isinstance(v, Tensor) for v in leaves_of(result)):
            return result
        node = self._call_node(func, args, kwargs, given)
        if changed:
            self.writers.add(node)
        return self.result(node, result, given if not changed else [])

    def _real_to_fake(self, value: Any) -> Any:
        return self.as_fake(value) if isinstance(value, Tensor) else value

    def _execute(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        try:
            return func(*args, **kwargs)
        except Exception as error:
            chance = self._chance(args[0]) if name == "__bool__" else None
            if chance is not None and chance <= 0:
                return False
            if chance is not None:
                raise RefusalError(
                    f"whether something runs is drawn at random, at {user_code()}\nA graph has no such "
                    "branch: set its probability to 0 (Hugging Face: config.layerdrop = 0)"
                ) from error
            if name in ("__bool__", "is_nonzero") or (name == "item" and args[0].dtype == torch.bool):
                return self._decided(args[0], name)
            if name == "item":
                return Reading(args[0], self._compared, lambda: self._reads("item"))
            if name in _READS_VALUES:
                raise self._reads(name) from error
            if type(error).__name__ in _DYNAMIC:
                raise self._data_dependent(f"the result of '{name}', whose shape depends on data,") from error
            raise

    def _chance(self, value: Tensor) -> float | None:
        """Return p where a value is whether a number drawn from [0, 1) is below p."""
        node = self._nodes.get(id(value))
        if node is None or str(getattr(node.target, "__name__", node.target)).strip("_") != "lt":
            return None
        drawn, bound = node.args[:2]
        uniform = isinstance(drawn, fx.Node) and getattr(drawn.target, "__name__", "") == "rand"
        return float(bound) if uniform and isinstance(bound, (int, float)) else None

    def _compared(self, fake: Tensor) -> bool:
        with self.pause():
            return self._decided(fake, "item")

    def _decided(self, value: Tensor, name: str) -> bool:
        """Return how the code decides on a value of the inputs for the example, and have batches held to it.

        What a model is told of a batch (masks, ids, labels) is alike from batch to batch; what was measured
        is not, so a branch on that is refused here and not in the middle of a training.
        """
        found = evaluation(self, self.node_of(value))
        if found is None:
            raise self._reads(name)
        evaluate, read = found
        told = not any(self._example[i].is_floating_point() for i in read)
        raises = only_raises()
        taken = answer(evaluate, self._example) if raises or told else None
        if taken is None:
            raise self._reads(name)
        place = user_code()
        self.decisions.append(Decision(place, evaluate, taken, raises, self._inside()))
        if not raises:
            self.notes.append(
                f"the forward decides on values of its inputs at {place}; each batch is held to it"
            )
        return taken

    def _call_node(self, func: Any, args: Any, kwargs: Any, near: list[Tensor]) -> fx.Node:
        region = Region.now()
        if region != self.outside:
            self._refuse_inference(region)
            op, target, args = "call_function", InRegion(callable_of(func), region, self.outside), args
        else:
            op, target, args = target_of(func, args)
        return self.emit(op, target, self.argument(tuple(args), near), self.argument(dict(kwargs), near))

    def result(self, node: fx.Node, result: Any, given: list[Tensor]) -> Any:
        """Bind the tensors of a result to nodes, and return it as the user's code gets it."""
        values, structure = flatten(result)
        for i, (path, value) in enumerate(zip(structure.paths(), values, strict=True)):
            if not isinstance(value, Tensor):
                continue
            if any(value is t for t in given):  # `y = x.contiguous()` is no news about x
                value = values[i] = torch.ops.aten.alias(value)
            self.bind(value, access(self.graph, node, path))
            self._nodes[id(value)].meta.update(node.meta)
        return structure.build(values)

    def _hook(self, tensor: Tensor, hook: Callable[[Tensor], Any]) -> Any:
        fake = self.as_fake(tensor)
        self.bind(fake, self.emit("call_function", Hooked(hook), (self.node_of(fake),), {}))
        return RemovableHandle(OrderedDict())

    def _applied(
        self, function: type[torch.autograd.Function], call: Callable[[], Any], args: Any, kwargs: Any
    ) -> Any:
        if self._paused:
            return call()
        if function.__module__ == "torch.utils.checkpoint":  # it would hide the modules that it calls
            self.notes.append(f"activation checkpointing at {user_line()} is not kept")
            return args[0](*args[2:])
        with self.pause():
            args, kwargs = map_plain((args, kwargs), self._real_to_fake)
            given = [v for v in leaves_of((args, kwargs)) if isinstance(v, Tensor)]
            versions = [t._version for t in given]
            result = function.apply(*args, **kwargs)
            changed = any(t._version != v for t, v in zip(given, versions, strict=True))
            node = self._call_node(Applied(function), args, kwargs, given)
            if changed:
                self.writers.add(node)
            return self.result(node, result, given if not changed else [])

    def _transformed(self, function: Callable[..., Any], name: str, args: Any, kwargs: Any) -> Any:
        if self._paused:
            return function(*args, **kwargs)
        with self.pause():
            args, kwargs = map_plain((args, kwargs), self._real_to_fake)
            given = [v for v in leaves_of((args, kwargs)) if isinstance(v, Tensor)]
            collecting = Collecting(lambda t: type(t) is nn.Parameter or id(t) in self._nodes, self.as_fake)
            with collecting:
                result = function(*args, **kwargs)
            free = list(collecting.free.values())
            node = self._call_node(Transformed(function, name, free), (*free, *args), kwargs, given)
            return self.result(node, result, given)

    # --- calls of modules

    def _called(self, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._paused or not self.calls.knows(module):
            return call(module, *args, **kwargs)
        with self.calls.enter(module) as path:
            if not self.calls.is_leaf(module):
                return call(module, *args, **kwargs)
            with self.pause():
                return record(self, module, path, args, kwargs)

    # --- what the forward wrote

    def _written(self, before: dict[int, dict[str, Any]]) -> None:
        for module, name, old in list(rewritten(self.root, before)):
            path = f"{self.calls.paths[id(module)]}.{name}"
            new = module._buffers.get(name)
            if name not in module._buffers:
                self._attribute_written(path)
            elif (
                isinstance(new, FakeTensor)
                and isinstance(old, Tensor)
                and new is not self._fakes.get(id(old))
            ):
                self.emit_assign(path, new)

    def emit_assign(self, path: str, value: Tensor) -> None:
        """Write a buffer that the forward bound to a new tensor."""
        target = self.emit("get_attr", path, (), {})
        node = self.emit("call_function", assign, (target, self.node_of(value)), {})
        parents = [p for p in parents_of(path) if p in self.calls.paths.values()]
        node.meta["stack"] = target.meta["stack"] = tuple((p, 0) for p in parents if p)

    def _attribute_written(self, path: str) -> None:
        self.stashed.append(path)
        self.notes.append(f"the forward sets '{strip(path)}', an attribute; the captured graph does not")

    # --- refusals

    def _reads(self, name: str) -> RefusalError:
        return self._data_dependent(f"the value of a tensor ({name.strip('_')})")

    def _data_dependent(self, what: str) -> RefusalError:
        return RefusalError(
            f"{what} steers the forward between modules that stay closed, at {user_code()}\n"
            f"A graph has no such branch: {self._inside()}, or use torch.where"
        )

    def _inside(self) -> str:
        """Return what would leave the code that runs now inside a closed module."""
        path = self.calls.now()[-1][0]
        if path in ("", "model"):
            if any(node.target == "labels" for node in self.graph.nodes if node.op == "placeholder"):
                return (
                    "where it is part of the loss that the model makes of `labels`, leave these out of the "
                    'inputs and give loss="cross_entropy"'
                )
            return "it is in the model's own forward; move it into one submodule that no split cuts"
        name = strip(path)
        return (
            f"'{name}' can keep it inside if no split lies within '{name}' (a split at '{name}' itself may)"
        )

    def _refuse_setter(self, func: Any) -> None:
        raise CaptureError(f"assignment to a tensor's '{func.__self__.__name__}' at {user_code()}")

    def _refuse_inference(self, region: Region) -> None:
        if region.inference != self.outside.inference:
            raise RefusalError(
                f"torch.inference_mode between closed modules, at {user_code()}; use torch.no_grad"
            )
