"""Tries the three mechanisms in order and hands on the first result that passes the admission test."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from contextlib import suppress
from itertools import islice

from locc.capture import cached, concrete, export, symbolic
from locc.capture.admission import Seen, admit, admit_in_eval, admit_known, compare
from locc.capture.batch import Call
from locc.capture.calls import Calls
from locc.capture.dynamic import Choice, Dynamic, FixedError
from locc.capture.eager import Eager, eager_run
from locc.capture.graphs import RefusalError, Trace, rebuild_of
from locc.capture.modes import alike, modes_watched, switch_dropouts
from locc.capture.tree import spell
from locc.errors import CaptureError
from locc.ir.captured import Captured, Decision, Inputs, Root, Signature, SizeGuard
from locc.ir.spec import Point

_log = logging.getLogger("locc")

Mechanism = Callable[[bool, list[Point]], Trace]


def capture(
    root: Root, inputs: Inputs, opened: frozenset[str], dynamic: Dynamic = None, cache: bool = False
) -> Captured:
    """Turn the model's forward into two flat graphs that compute what it computes.

    Args:
        root: holds the user's model; it is left bit for bit as it was.
        inputs: one example batch.
        opened: paths under `root` of the modules to look into; any other module that an opened one calls
            stays closed, as one `call_module` node.
        dynamic: dimensions that may vary beside the batch, as for `locc.compile`.
        cache: whether to use, and to keep, what is learnt on disk (`locc.capture.cached`).

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
            key = cached.key_of(root, call, opened) if cache else None
            captured = _recalled(root, inputs, eager, key) or _captured(root, inputs, eager, key)
        except FixedError as error:
            choice.fix(error.names, error.text)
        else:
            captured.notes += choice.notes
            return captured


def _captured(root: Root, inputs: Inputs, eager: Eager, key: str | None) -> Captured:
    points = _points(eager)
    rebuild_of(eager_run(eager, True, points[0]))
    _require_constants(eager, points)
    rebuild_of(eager_run(eager, False, points[0]))
    refusals: dict[str, CaptureError] = {}
    for origin, mechanism in _mechanisms(root, eager).items():
        try:
            training, inference = _both(root, mechanism, eager, points, origin)
        except RefusalError as error:
            raise CaptureError(f"the model could not be captured: {error}") from error
        except FixedError:
            raise
        except CaptureError as error:
            refusals[origin] = error
            continue
        lifted = _takes_one(training, inference, root, eager)
        shared = inference.guards is training.guards
        record = cached.record_of(origin, training, inference, shared, lifted) if key is not None else None
        if key is not None and record is not None:
            cached.write(key, record)
        return _result(root, inputs, eager, training, inference, origin, lifted)
    raise _all_refused(refusals)


def _recalled(root: Root, inputs: Inputs, eager: Eager, key: str | None) -> Captured | None:
    """Capture by what is kept under a key; None where nothing is, or where the model has changed."""
    record = cached.read(key) if key is not None else None
    if record is None:
        return None
    known = Eager(root, eager.call, eager.opened)  # its runs have no gradients
    try:
        mechanism = _mechanisms(root, known)[record.origin]
        training = mechanism(True, record.training.points)
        inference = _twin(training)
        if not record.shared:
            inference = mechanism(False, record.inference.points)
        modes = ((True, training, record.training), (False, inference, record.inference))
        for mode, trace, kept in modes:
            if mode or not record.shared:
                _pin(trace, kept.points)
            if cached.digest_of(trace) != kept.digest:
                raise CaptureError("the traced graph is another one")
            admit_known(root, trace, known, mode, kept.looks, record.origin)
        return _result(root, inputs, known, training, inference, record.origin, record.lifted)
    except Exception as error:  # whatever a file that fits by its key alone leads to
        _log.warning("locc: the kept capture is not used and made anew: %s", error)
        return None


def _mechanisms(root: Root, eager: Eager) -> dict[str, Mechanism]:
    call, opened = eager.call, eager.opened
    return {
        "fx": lambda training, points: symbolic.trace(
            root, call, opened, training, eager.run(training, points[0], backward=False)
        ),
        "concrete": lambda training, points: concrete.trace(root, call, opened, training, eager, points),
        "export": lambda training, points: export.trace(root, call, training, eager, points),
    }


def _result(
    root: Root, inputs: Inputs, eager: Eager, training: Trace, inference: Trace, origin: str, lifted: bool
) -> Captured:
    call, first = eager.call, training.points[0]
    guards = _guards(training, inference)
    if lifted:
        guards = tuple(_but_one(guard) if "B" in guard.names else guard for guard in guards)
    switch_dropouts(training.graph, inference.graph)
    return Captured(
        root=root,
        training=training.graph,
        inference=inference.graph,
        signature=Signature(call.names, call.specs, call.flatten, guards, _decisions(training, inference)),
        output=rebuild_of(eager.run(True, first, backward=False)),
        inference_output=rebuild_of(eager.run(False, first)),
        origin=origin,
        opened=eager.opened,
        example=inputs,
        notes=list(dict.fromkeys(call.notes + training.notes + inference.notes)),
    )


def _both(
    root: Root, mechanism: Mechanism, eager: Eager, points: list[Point], origin: str
) -> tuple[Trace, Trace]:
    """Trace for training and for inference; one trace serves both where the opened code sees no mode."""
    if origin == "export":  # its graphs hold what is inside the closed modules as well
        training = mechanism(True, points)
        _admit(root, training, eager, True, points, origin)
        return training, _inference(root, mechanism, eager, points, origin)
    with modes_watched(root.model) as reads:
        training = mechanism(True, points)
    spare = _twin(training)
    seen = _admit(root, training, eager, True, points, origin)
    first = points[0]
    if not (reads.any or training.notes) and alike(eager.run(True, first), eager.run(False, first)):
        with suppress(CaptureError):  # then inference has a trace of its own
            admit_in_eval(root, spare, eager, seen, origin)
            return training, spare
    return training, _inference(root, mechanism, eager, points, origin)


def _inference(root: Root, mechanism: Mechanism, eager: Eager, points: list[Point], origin: str) -> Trace:
    points = [point for point in points if point == points[0] or _runs(eager, False, point)]
    inference = mechanism(False, points)
    _admit(root, inference, eager, False, points, origin)
    return inference


def _twin(trace: Trace) -> Trace:
    graph = copy.deepcopy(trace.graph)
    return Trace(graph, trace.guards, trace.notes, trace.decisions)


def _pin(trace: Trace, points: list[Point]) -> None:
    """Note where a trace was taken, and hold it to the only batch size that the model takes."""
    trace.points = points
    only = points[0].batch
    if only is not None and all(point.batch == only for point in points):
        text = f"B == {only}: the model fails at other batch sizes"
        trace.guards.append(SizeGuard(text, lambda sizes: sizes["B"] == only))


def _admit(
    root: Root, trace: Trace, eager: Eager, training: bool, points: list[Point], origin: str
) -> dict[Point, Seen]:
    _pin(trace, points)
    for guard in trace.guards:
        if not guard.holds(_sizes(eager, points[0])):  # torch.export may generalise past its own example
            raise CaptureError(
                f"it does not cover {eager.call.text(points[0])}, where it was taken: {guard.text}"
            )
        free = guard.names - {"B"}
        if free and not guard.holds(_sizes(eager, Point(points[0].batch, 1))):
            raise FixedError(free, guard.text)
    return admit(root, trace, eager, training, _admitted(eager, training, points, trace.guards), origin)


def _guards(training: Trace, inference: Trace) -> tuple[SizeGuard, ...]:
    return tuple({g.text: g for trace in (training, inference) for g in trace.guards}.values())


def _decisions(training: Trace, inference: Trace) -> tuple[Decision, ...]:
    return tuple(dict.fromkeys([*training.decisions, *inference.decisions]))


def _takes_one(training: Trace, inference: Trace, root: Root, eager: Eager) -> bool:
    """Whether the graphs pass at a batch of one though a guard excludes it."""
    one = Point(1)
    if all(guard.holds(_sizes(eager, one)) for guard in _guards(training, inference)):
        return False
    try:
        compare(root, training, eager, True, one, training.whole)
        if inference.guards is not training.guards:  # a trace of its own
            compare(root, inference, eager, False, one)
    except Exception:
        return False
    return True


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
    if first != example and not all(
        _runs(eager, mode, Point(first), backward=True) for mode in (True, False)
    ):
        first = example
    other = [Point(first, 1)] if other else []
    for batch in [first - 1, first + 1] if first > 2 else [first + 1]:
        eager_run(eager, True, Point(first))
        if _runs(eager, True, Point(batch)):
            return [Point(first), Point(batch), *other]
    return [Point(first), *other]


def _runs(eager: Eager, training: bool, point: Point, backward: bool = False) -> bool:
    try:
        eager.run(training, point, backward)
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
    runs = (p for p in candidates if allowed(p) and _runs(eager, training, p))
    found = [first, *islice(runs, 1)]
    example = Point(eager.call.batch)
    if example not in found and allowed(example) and _runs(eager, training, example):
        found.append(example)  # BatchNorm refuses a batch of one
    return found + others


def _require_constants(eager: Eager, points: list[Point]) -> None:
    one = eager.run(True, points[0])
    for point in points[1:]:
        other, differs = (
            eager.run(True, point, backward=False),
            f"{eager.call.text(points[0])} and {eager.call.text(point)}",
        )
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
