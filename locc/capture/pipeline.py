"""Tries the three mechanisms in order and hands on the first result that passes the admission test."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

from locc.capture import concrete, export, symbolic
from locc.capture.admission import admit, compare
from locc.capture.batch import Call
from locc.capture.calls import Calls
from locc.capture.dynamic import Choice, Dynamic, FixedError
from locc.capture.eager import Eager, eager_run
from locc.capture.graphs import RefusalError, Trace, rebuild_of
from locc.capture.tree import spell
from locc.errors import CaptureError
from locc.ir.captured import Captured, Inputs, Root, Signature, SizeGuard
from locc.ir.spec import Point

Mechanism = Callable[[bool], Trace]


def capture(root: Root, inputs: Inputs, opened: frozenset[str], dynamic: Dynamic = None) -> Captured:
    """Turn the model's forward into two flat graphs that compute what it computes.

    Args:
        root: holds the user's model; it is left bit for bit as it was.
        inputs: one example batch.
        opened: paths under `root` of the modules to look into; any other module that an opened one calls
            stays closed, as one `call_module` node.
        dynamic: dimensions that may vary beside the batch, as for `locc.compile`.

    Raises:
        CaptureError: the model fails by itself, a dimension in `dynamic` cannot vary, or no mechanism gives a
            graph that equals the model.
    """
    Calls(root, opened)  # refuses an unknown path
    call = Call(root.model, inputs)
    choice = Choice(call, dynamic)
    while True:
        eager = Eager(root, call, opened)
        choice.settle(eager)
        try:
            captured = _captured(root, inputs, call, eager)
        except FixedError as error:
            choice.fix(error.names, error.text)
        else:
            captured.notes += choice.notes
            return captured


def _captured(root: Root, inputs: Inputs, call: Call, eager: Eager) -> Captured:
    points = _points(eager)
    real = eager_run(eager, True, points[0])
    _require_constants(eager, points)
    output = rebuild_of(real)
    inference_output = rebuild_of(eager_run(eager, False, points[0]))
    opened = eager.opened
    mechanisms: dict[str, Mechanism] = {
        "fx": lambda training: symbolic.trace(root, call, opened, training, eager.run(training, points[0])),
        "concrete": lambda training: concrete.trace(root, call, opened, training, eager, points),
        "export": lambda training: export.trace(root, call, training, eager, points),
    }
    refusals: dict[str, CaptureError] = {}
    for origin, mechanism in mechanisms.items():
        try:
            training, inference = (
                _candidate(root, mechanism, eager, mode, points, origin) for mode in (True, False)
            )
        except RefusalError as error:
            raise CaptureError(f"the model could not be captured: {error}") from error
        except FixedError:
            raise
        except CaptureError as error:
            refusals[origin] = error
            continue
        guards = _lifted((training, inference), root, eager)
        return Captured(
            root=root,
            training=training.graph,
            inference=inference.graph,
            signature=Signature(call.names, call.specs, call.flatten, guards),
            output=output,
            inference_output=inference_output,
            origin=origin,
            opened=opened,
            example=inputs,
            notes=list(dict.fromkeys(call.notes + training.notes + inference.notes)),
        )
    raise _all_refused(refusals)


def _candidate(
    root: Root, mechanism: Mechanism, eager: Eager, training: bool, points: list[Point], origin: str
) -> Trace:
    trace = mechanism(training)
    for guard in trace.guards:
        if not guard.holds(_sizes(eager, points[0])):  # torch.export may generalise past its own example
            raise CaptureError(
                f"it does not cover {eager.call.text(points[0])}, where it was taken: {guard.text}"
            )
    only = points[0].batch
    if only is not None and all(point.batch == only for point in points):
        text = f"B == {only}: the model fails at other batch sizes"
        trace.guards.append(SizeGuard(text, lambda sizes: sizes["B"] == only))
    for guard in trace.guards:
        free = guard.names - {"B"}
        if free and not guard.holds(_sizes(eager, Point(only, 1))):
            raise FixedError(free, guard.text)
    admit(root, trace, eager, training, _admitted(eager, training, points, trace.guards), pure=origin == "fx")
    return trace


def _lifted(traces: tuple[Trace, Trace], root: Root, eager: Eager) -> tuple[SizeGuard, ...]:
    """Return the guards of both graphs; a batch of one is let in where the graphs pass at one."""
    guards = tuple({g.text: g for trace in traces for g in trace.guards}.values())
    one = Point(1)
    if all(guard.holds(_sizes(eager, one)) for guard in guards):
        return guards
    try:
        for trace, training in zip(traces, (True, False), strict=True):
            eager.run(training, one)
            compare(root, trace, eager, training, one)
    except Exception:
        return guards
    return tuple(_but_one(guard) if "B" in guard.names else guard for guard in guards)


def _but_one(guard: SizeGuard) -> SizeGuard:
    return SizeGuard(
        f"{guard.text} (or B == 1, which was tested)",
        lambda sizes: sizes["B"] == 1 or guard.holds(sizes),
        guard.names,
    )


def _points(eager: Eager) -> list[Point]:
    """Return where capture runs: at the example, at another batch size, and at other free dimensions."""
    example = eager.call.batch
    other = [Point(example, 1)] if eager.call.dims else []
    if example is None:
        return [Point(None), *other]
    first = max(example, 2)  # a symbolic batch of one would be taken for a broadcast dimension
    if first != example and not _runs(eager, Point(first)):
        first = example
    other = [Point(first, 1)] if other else []
    for batch in [first - 1, first + 1] if first > 2 else [first + 1]:
        eager_run(eager, True, Point(first))
        if _runs(eager, Point(batch)):
            return [Point(first), Point(batch), *other]
    return [Point(first), *other]


def _runs(eager: Eager, point: Point) -> bool:
    try:
        eager.run(True, point)
        eager.run(False, point)
    except Exception:
        return False
    return True


def _sizes(eager: Eager, point: Point) -> dict[str, int]:
    sizes = {dim.name: dim.at(point.probe) for dim in eager.call.dims}
    return sizes | ({} if point.batch is None else {"B": point.batch})


def _admitted(eager: Eager, training: bool, points: list[Point], guards: list[SizeGuard]) -> list[Point]:
    """Return where the admission test runs: at sizes that the guards allow, the example's among them."""
    first, *rest = points
    others = [point for point in rest if point.probe]
    second = next((point.batch for point in rest if not point.probe), None)
    if first.batch is None or second is None:
        return points

    def allowed(point: Point) -> bool:
        return all(guard.holds(_sizes(eager, point)) for guard in guards)

    batches = [second, first.batch + 1, first.batch - 1, first.batch + 2, 2 * first.batch]
    candidates = [Point(b) for b in dict.fromkeys(batches) if b > 1 and b != first.batch]
    runs = (p for p in candidates if allowed(p) and (p.batch == second or _runs(eager, p)))
    found = [first, *islice(runs, 1)]
    example = Point(eager.call.batch)
    if example not in found and allowed(example):
        try:
            eager.run(training, example)
            found.append(example)
        except Exception:  # BatchNorm refuses a batch of one
            pass
    return found + others


def _require_constants(eager: Eager, points: list[Point]) -> None:
    one = eager.run(True, points[0])
    for point in points[1:]:
        other, differs = eager.run(True, point), f"{eager.call.text(points[0])} and {eager.call.text(point)}"
        if one.structure != other.structure:
            raise CaptureError(
                "the structure of the output depends on the sizes of the inputs: it differs between "
                f"{differs}"
            )
        for path, a, b in zip(one.structure.paths(), one.outputs, other.outputs, strict=True):
            if isinstance(a, (int, float)) and a != b:
                raise CaptureError(
                    f"output '{spell(path)}' is the number {a} in one and {b} in the other of {differs}; "
                    "return a tensor"
                )


def _all_refused(refusals: dict[str, CaptureError]) -> CaptureError:
    names = {"concrete": "a trace on fake tensors", "fx": "torch.fx", "export": "torch.export"}
    lead = refusals["concrete"]
    rest = [f"  {names[o]}: {_first_line(e)}" for o, e in refusals.items() if o != "concrete"]
    return CaptureError("\n".join([f"the model could not be captured: {lead}", "Also tried:", *rest]))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
