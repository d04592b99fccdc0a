"""Tries the three mechanisms in order and hands on the first result that passes the admission test."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

from locc.capture import concrete, export, symbolic
from locc.capture.admission import admit, compare
from locc.capture.batch import Call
from locc.capture.calls import Calls
from locc.capture.eager import Eager, eager_run
from locc.capture.graphs import RefusalError, Trace, rebuild_of
from locc.capture.tree import spell
from locc.errors import CaptureError
from locc.ir.captured import BatchGuard, Captured, Inputs, Root, Signature

Batches = tuple[int | None, int | None]
Mechanism = Callable[[bool], Trace]


def capture(root: Root, inputs: Inputs, opened: frozenset[str]) -> Captured:
    """Turn the model's forward into two flat graphs that compute what it computes.

    Args:
        root: holds the user's model; it is left bit for bit as it was.
        inputs: one example batch.
        opened: paths under `root` of the modules to look into; any other module that an opened one calls
            stays closed, as one `call_module` node.

    Raises:
        CaptureError: the model fails by itself, or no mechanism gives a graph that equals it.
    """
    Calls(root, opened)  # refuses an unknown path
    call = Call(root.model, inputs)
    eager = Eager(root, call, opened)
    batches = _batches(eager)
    real = eager_run(eager, True, batches[0])
    _require_constants(eager, batches)
    output = rebuild_of(real)
    inference_output = rebuild_of(eager_run(eager, False, batches[0]))
    mechanisms: dict[str, Mechanism] = {
        "fx": lambda training: symbolic.trace(root, call, opened, training, eager.run(training, batches[0])),
        "concrete": lambda training: concrete.trace(root, call, opened, training, eager, batches),
        "export": lambda training: export.trace(root, call, training, eager, batches),
    }
    refusals: dict[str, CaptureError] = {}
    for origin, mechanism in mechanisms.items():
        try:
            training, inference = (
                _candidate(root, mechanism, eager, mode, batches, origin) for mode in (True, False)
            )
        except RefusalError as error:
            raise CaptureError(f"the model could not be captured: {error}") from error
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
    root: Root, mechanism: Mechanism, eager: Eager, training: bool, batches: Batches, origin: str
) -> Trace:
    trace = mechanism(training)
    if batches[0] is not None and batches[1] is None:
        only = batches[0]
        trace.guards.append(
            BatchGuard(f"B == {only}: the model fails at other batch sizes", lambda b: b == only)
        )
    admit(
        root, trace, eager, training, _admitted(eager, training, batches, trace.guards), pure=origin == "fx"
    )
    return trace


def _lifted(traces: tuple[Trace, Trace], root: Root, eager: Eager) -> tuple[BatchGuard, ...]:
    """Return the guards of both graphs; a batch of one is let in where the graphs pass at one."""
    guards = tuple({g.text: g for trace in traces for g in trace.guards}.values())
    if all(guard.holds(1) for guard in guards):
        return guards
    try:
        for trace, training in zip(traces, (True, False), strict=True):
            eager.run(training, 1)
            compare(root, trace, eager, training, 1)
    except Exception:
        return guards
    return tuple(_but_one(guard) for guard in guards)


def _but_one(guard: BatchGuard) -> BatchGuard:
    return BatchGuard(
        f"{guard.text} (or B == 1, which was tested)", lambda batch: batch == 1 or guard.holds(batch)
    )


def _batches(eager: Eager) -> Batches:
    """Return the two batch sizes that capture runs at; the second is None where the model allows no other."""
    example = eager.call.batch
    if example is None:
        return None, None
    first = max(example, 2)  # a symbolic batch of one would be taken for a broadcast dimension
    if first != example and not _runs(eager, first):
        first = example
    others = [first - 1, first + 1] if first > 2 else [first + 1]
    for other in others:
        eager_run(eager, True, first)
        if _runs(eager, other):
            return first, other
    return first, None


def _runs(eager: Eager, batch: int) -> bool:
    try:
        eager.run(True, batch)
        eager.run(False, batch)
    except Exception:
        return False
    return True


def _admitted(eager: Eager, training: bool, batches: Batches, guards: list[BatchGuard]) -> list[int | None]:
    """Return the batch sizes that the admission test uses: two that the guards allow, and the example's."""
    first, second = batches
    if first is None or second is None:
        return [first]
    candidates = [second, first + 1, first - 1, first + 2, 2 * first]
    allowed = [
        b for b in dict.fromkeys(candidates) if b > 1 and b != first and all(g.holds(b) for g in guards)
    ]
    runs = (b for b in allowed if b == second or _runs(eager, b))
    found: list[int | None] = [first, *islice(runs, 1)]
    example = eager.call.batch
    if example not in found and example is not None and all(g.holds(example) for g in guards):
        try:
            eager.run(training, example)
            found.append(example)
        except Exception:  # BatchNorm refuses a batch of one
            pass
    return found


def _require_constants(eager: Eager, batches: Batches) -> None:
    if batches[1] is None:
        return
    one, other = eager.run(True, batches[0]), eager.run(True, batches[1])
    if one.structure != other.structure:
        raise CaptureError(
            "the structure of the output depends on the batch size: it differs between batches of "
            f"{batches[0]} and {batches[1]}"
        )
    for path, a, b in zip(one.structure.paths(), one.outputs, other.outputs, strict=True):
        if isinstance(a, (int, float)) and a != b:
            raise CaptureError(
                f"output '{spell(path)}' is the number {a} for a batch of {batches[0]} and {b} for one of "
                f"{batches[1]}; return a tensor"
            )


def _all_refused(refusals: dict[str, CaptureError]) -> CaptureError:
    names = {"concrete": "a trace on fake tensors", "fx": "torch.fx", "export": "torch.export"}
    lead = refusals["concrete"]
    rest = [f"  {names[o]}: {_first_line(e)}" for o, e in refusals.items() if o != "concrete"]
    return CaptureError("\n".join([f"the model could not be captured: {lead}", "Also tried:", *rest]))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
