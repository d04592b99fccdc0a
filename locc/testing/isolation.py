"""The assertion that each module trains in the program exactly as it would alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from locc.errors import LoccError, nearest
from locc.lower import Backward, Plan
from locc.program import Program
from locc.runtime.untouched import untouched

from .alone import Whole
from .perturb import DISTURBANCES, disturbed, reached_at_once, reached_later
from .trial import State, Trial, batch_of, certificate_of, difference, first_line, objectives_of


def assert_isolated(program: Program, x: Any, y: Any = None, *, owners: Iterable[str] | None = None) -> None:
    """Assert that nothing but what the program declares passes from one module to another.

    Two properties of real training steps in the program's current phase, bit for bit:

    - *Alone.* Each module, trained by its own instructions alone on the values that the whole program
      hands it, gets the same parameters, buffers, optimizer state and objectives; whatever it does not
      use is NaN meanwhile, and what other modules keep in Python comes from another batch.
    - *Undisturbed.* With the gradient of another module's objective scaled, deleted or NaN, a module stays
      the same in one step and in two, unless the certificate's flows and couplings lead from there to it.
      A disturbed run that the model's own code refuses (an exception on NaN) is compared as far as it got.

    The program is bit for bit as it was afterwards; what user code keeps outside of the model (a global,
    a closure) is not put back.

    Example:
        >>> program = locc.compile(model, "dtp", splits=["layer1", "layer2"], example_inputs=x)
        >>> locc.testing.assert_isolated(program, x, y)

    Args:
        program: a compiled program; with `accumulate=n`, a step here is as many steps as make an update.
        x: a batch as `step` takes it.
        y: its target; without one, a few samples of `x` with a made-up target are used.
        owners: the modules (and auxiliaries) to look at; all of them without.

    Raises:
        AssertionError: a module is not isolated; names it, the first tensor that differs, and what it
            probably reads. Also where a program compiled with verify=False turns out not to be local.
        LoccError: `owners` names no module of the program, or no target could be made up.
        RunError: an objective is not finite even in an ordinary step.
    """
    values = batch_of(program, x, y)
    chosen = _chosen(program, owners)
    whole = Whole(program, values)
    for owner in chosen:
        _assert_alone(whole, owner)
    certificate = certificate_of(program)
    clean = _updates(whole, whole.plan)
    for task in objectives_of(whole.plan):
        declared = (
            reached_at_once(certificate, task.owner) | {task.owner},
            reached_later(certificate, task.owner) | {task.owner},
        )
        watched = [[o for o in chosen if o not in known] for known in declared]
        if any(watched):
            _assert_undisturbed(whole, task, clean, watched)


def _chosen(program: Program, owners: Iterable[str] | None) -> list[str]:
    known = list(program.ir.owners)
    chosen = known if owners is None else list(owners)
    for owner in chosen:
        if owner not in known:
            raise LoccError(f"the program has no module '{owner}'; {nearest(owner, known)}")
    return chosen


# ---- alone ----------------------------------------------------------------------------------


def _assert_alone(whole: Whole, owner: str) -> None:
    found = _verdict(whole, owner)
    if found is None:
        return
    raise AssertionError(
        f"module '{owner}' is not isolated: trained alone on what the program hands it, {found}\n"
        f"  probably: {_suspect(whole, owner)}\n"
        "  remedy: pass what it needs through the model's forward, where it becomes a boundary value, or "
        "keep a copy in the module"
    )


def _verdict(
    whole: Whole, owner: str, beside: frozenset[str] = frozenset(), spared: Iterable[int] = ()
) -> str | None:
    """Return how an owner's run alone differs from its part in the whole, or None."""
    try:
        state = whole.alone(owner, beside, spared)
    except Exception as error:  # NaN in its way, a missing attribute: user code may raise anything
        return f"it fails with {first_line(error)}"
    found = difference(whole.states[owner], state)
    return None if found is None else f"{found} comes out different"


def _suspect(whole: Whole, owner: str) -> str:
    """Return what the difference is probably due to, by trying."""
    whole = Whole(whole.program, whole.values, watching=True)
    names, used = whole.holdings.names, whole.holdings.used[owner]
    for i, item in whole.holdings.everything.items():
        if i not in used and _verdict(whole, owner, spared=[i]) is None:
            kind = "parameter" if i in names.parameters else "buffer"
            return f"it reads {kind} '{item.path}', {names.home(item.tensor)}"
    for other in whole.states:
        if other != owner and _verdict(whole, owner, frozenset({other})) is None:
            return (
                f"it reads something that module '{other}' leaves behind in a step (an attribute, a global), "
                f"or '{other}' changes what it owns: beside '{other}' it comes out the same"
            )
    rest = frozenset(whole.states) - {owner}
    if rest and _verdict(whole, owner, rest) is None:
        return "it reads something that several other modules leave behind, or they change what it owns"
    return (
        "it reads something that is left outside of the modules from step to step (a global, a closure, a "
        "file), or its own code does not repeat itself"
    )


# ---- undisturbed ----------------------------------------------------------------------------


def _updates(whole: Whole, plan: Plan) -> list[dict[str, State]]:
    """Return every owner's state after one update and after two, as far as the plan runs."""
    program = whole.program
    found: list[dict[str, State]] = []
    done: list[dict[str, Tensor]] = []
    with untouched(program):
        trial = Trial(program)
        for end in (whole.steps, whole.steps + program.built.executor.accumulate):
            try:
                while len(done) < end:
                    done.append(trial.run(plan, whole.values, len(done)))
            except Exception:
                if plan is whole.plan:
                    raise
                break  # the model's own code refuses what a disturbance makes of its values
            found.append({owner: whole.holdings.state(owner, done) for owner in program.ir.owners})
    return found


def _assert_undisturbed(
    whole: Whole, task: Backward, clean: list[dict[str, State]], watched: list[list[str]]
) -> None:
    """Disturb one objective and compare the owners that it must not reach, after one update and two."""
    for what, change in DISTURBANCES.items():
        found = _updates(whole, disturbed(whole.plan, task, change))
        for number, (before, after) in enumerate(zip(clean, found, strict=False)):
            for owner in watched[number]:
                different = difference(before[owner], after[owner])
                if different is not None:
                    raise AssertionError(_reached(task, owner, what, different, number))


def _reached(task: Backward, owner: str, what: str, different: str, number: int) -> str:
    label, source = task.objectives[0], task.owner
    times = "two updates" if number else "one update"
    way = "flow or coupling" if number else "gradient, error, target or state"
    return (
        f"module '{owner}' is not isolated from objective '{label}' of '{source}': with {what}, {different} "
        f"of '{owner}' comes out different after {times}, and the certificate declares no {way} on the way "
        "from there\n"
        f"  remedy: find what '{owner}' shares with '{source}' (an optimizer, an attribute, a buffer); or "
        "verify the program again, if the certificate is of another graph"
    )
