"""Hypothesis strategies: random models, splits, methods and batches, together or one by one.

    from hypothesis import given
    from locc.testing import assert_local, cases, programs

    @given(cases(method="mine"))                      # small models of the kit, your method
    def test_my_method_is_local(case):
        assert_local(case.compile(), *case.batch())

    @given(programs(MyModel, torch.randn(4, 8)))      # your model, every registered method
    def test_my_model_trains_locally(program):
        assert_local(program)

What they draw shrinks towards a chain of two modules and a batch of two samples.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from hypothesis import reject
from hypothesis import strategies as st
from torch import Tensor, nn

from locc.catalogue import methods as registered
from locc.compiler import compile
from locc.errors import LoccError, MethodError, SplitError, nearest
from locc.ir import Inputs
from locc.program import Program
from locc.testing.case import OPTIMIZERS, Case, undefined
from locc.testing.families import FAMILIES, ModelSpec, family_of

SEEDS = st.integers(0, 2**16)
WIDTHS = (4, 2, 3, 8)
TRIES = 10
"""Models that are drawn for one example: a method may be undefined on nine of ten."""

T = TypeVar("T")


def methods(exclude: Collection[str] = ()) -> st.SearchStrategy[str]:
    """Draw ids of registered methods, those of other packages included.

    Args:
        exclude: ids to leave out.

    Raises:
        LoccError: an id to leave out is not registered.
    """
    known = registered()
    for name in exclude:
        if name not in known:
            raise LoccError(
                f"methods(exclude=...) names '{name}', which is no method; {nearest(name, known)}"
            )
    plain_first = sorted(known, key=lambda name: (len(known[name].options), name))
    return st.sampled_from([name for name in plain_first if name not in exclude])


@st.composite
def models(draw: st.DrawFn, families: Sequence[str] = tuple(FAMILIES), max_blocks: int = 3) -> ModelSpec:
    """Draw descriptions of small models.

    Args:
        draw: given by Hypothesis.
        families: keys of `FAMILIES` to choose from.
        max_blocks: largest number of blocks between the first layer and the last.
    """
    family = draw(st.sampled_from(list(families)))
    kinds = st.sampled_from(list(family_of(family).blocks))
    spec = ModelSpec(
        family,
        tuple(draw(st.lists(kinds, min_size=1, max_size=max_blocks))),
        draw(st.sampled_from(WIDTHS)),
        draw(st.sampled_from(["cross_entropy", "mse"])),
        draw(SEEDS),
    )
    frozen = draw(st.lists(st.sampled_from(spec.freezable), max_size=2, unique=True))
    shared = len(set(spec.blocks)) < len(spec.blocks) and draw(st.booleans())
    return replace(spec, frozen=tuple(sorted(frozen, key=spec.freezable.index)), shared=shared)


def splits(model: ModelSpec | nn.Module, example_inputs: Any = None) -> st.SearchStrategy[tuple[str, ...]]:
    """Draw names of submodules after which to cut, at least one, in forward order.

    Args:
        model: a description, on which every draw is valid; or any module. Of a module they are
            submodules with parameters to train, none inside another; `locc.compile` may still refuse them
            with a SplitError.
        example_inputs: a batch for a module, which is run on it once to see the order of its
            submodules; without one, it is the order of their definition.

    Raises:
        LoccError: there is nothing to cut after.
    """
    names = list(model.splits if isinstance(model, ModelSpec) else _parts(model, example_inputs))
    if not names:
        raise LoccError(
            f"no split can be drawn for {type(model).__name__}: it has no submodule with parameters to train "
            "that others with parameters follow"
        )
    chosen = st.lists(st.sampled_from(names), min_size=1, unique=True)
    if not isinstance(model, ModelSpec):
        chosen = chosen.map(_apart)
    return chosen.map(lambda found: tuple(sorted(found, key=names.index)))


def _parts(model: nn.Module, example_inputs: Any) -> list[str]:
    """Return the submodules that hold parameters to train and are not the last to do so."""
    # What has no forward of its own, such as a ModuleList, cannot be cut after.
    names = [name for name, m in model.named_modules() if name and type(m).forward is not nn.Module.forward]
    if example_inputs is not None:
        names = _as_called(model, Inputs.of(model, example_inputs))
    training = [n for n in names if any(p.requires_grad for p in model.get_submodule(n).parameters())]
    leaves = [n for n in training if not any(m.startswith(f"{n}.") for m in training)]
    return [n for n in training if not f"{leaves[-1]}.".startswith(f"{n}.")]


def _as_called(model: nn.Module, inputs: Inputs) -> list[str]:
    """Return the names of the submodules in the order in which their calls end."""
    model = copy.deepcopy(model)
    ended: dict[str, None] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ended.update({name: None}))
    with torch.random.fork_rng(), torch.no_grad():
        model(*inputs.args, **inputs.kwargs)
    return [name for name in ended if name]


def _apart(names: list[str]) -> list[str]:
    """Leave out what lies inside another choice, or around it."""
    kept: list[str] = []
    for name in names:
        if not any(f"{a}.".startswith(f"{b}.") for other in kept for a, b in ((name, other), (other, name))):
            kept.append(name)
    return kept


def batches(model: ModelSpec, max_size: int = 5) -> st.SearchStrategy[tuple[Any, Tensor]]:
    """Draw batches (x, y) of a model of 2 to `max_size` samples."""
    return st.builds(model.batch, st.integers(2, max_size), st.integers(0, 99))


@st.composite
def cases(
    draw: st.DrawFn,
    model: st.SearchStrategy[ModelSpec] | ModelSpec | None = None,
    method: st.SearchStrategy[str] | str | None = None,
    schedules: Sequence[str] = ("lockstep", "sequential"),
) -> Case:
    """Draw model, method, splits, batch size, optimizer, schedule and what may vary together.

    Where a method is undefined on a model, another model is drawn; a schedule that the method does not
    admit gives way to "lockstep", and dimensions that vary to fixed ones.

    Args:
        draw: given by Hypothesis.
        model: descriptions of models, or one; all families by default.
        method: ids of methods, or one; all registered methods by default.
        schedules: schedules to choose from.
    """
    name = draw(_strategy(method, methods))
    tries = (draw(_cases_of(name, _strategy(model, models), tuple(schedules))) for _ in range(TRIES))
    return next((case for case in tries if case is not None), None) or reject()


@st.composite
def _cases_of(
    draw: st.DrawFn, method: str, model: st.SearchStrategy[ModelSpec], schedules: tuple[str, ...]
) -> Case | None:
    """Draw the rest of a case; None where the method is undefined on the model."""
    spec = draw(model)
    case = Case(
        spec,
        method,
        draw(_options(method)),
        draw(splits(spec) | st.integers(2, spec.parts) if spec.parts > 1 else splits(spec)),
        draw(st.integers(2, 5)),
        draw(st.sampled_from(list(OPTIMIZERS))),
        draw(st.sampled_from(schedules)),
        draw(SEEDS),
        draw(st.sampled_from(["owner", "copy"])),
        family_of(spec.family).grows and draw(st.booleans()),
    )
    if case.refusal() is None:
        return case
    other = replace(case, schedule="lockstep", dynamic=False)
    if other == case or other.schedule not in schedules or other.refusal() is not None:
        return None
    return other


def programs(
    model: Callable[[], nn.Module] | None = None,
    example_inputs: Any = None,
    method: st.SearchStrategy[str] | str | None = None,
    **settings: Any,
) -> st.SearchStrategy[Program]:
    """Draw compiled programs: of the kit's models, or of your own cut in many ways.

    Args:
        model: builds your model; the kit's models without it.
        example_inputs: a batch of your model, as `step` takes it.
        method: ids of methods, or one; all registered methods by default.
        **settings: further arguments of `locc.compile`.

    Raises:
        LoccError: a model comes without example inputs.
    """
    if model is None:
        return cases(method=method).map(lambda case: case.compile(**settings))
    if example_inputs is None:
        raise LoccError("programs(model) needs example_inputs: a batch of the model, as step takes it")
    return _programs_of(model, example_inputs, _strategy(method, methods), settings)


@st.composite
def _programs_of(
    draw: st.DrawFn,
    model: Callable[[], nn.Module],
    example_inputs: Any,
    method: st.SearchStrategy[str],
    settings: dict[str, Any],
) -> Program:
    built = model()
    chosen = list(draw(splits(built, example_inputs)))
    try:
        return compile(built, draw(method), chosen, example_inputs=example_inputs, **settings)
    except SplitError:
        reject()
    except MethodError as error:
        if not undefined(error):
            raise
        reject()


def _options(method: str) -> st.SearchStrategy[dict[str, Any]]:
    """Draw the method's switches: the options that are on or off."""
    known = registered()[method].options.values()
    switches = {option.name: option.default for option in known if isinstance(option.default, bool)}
    return st.fixed_dictionaries({}, optional={key: st.just(not on) for key, on in switches.items()})


def _strategy(
    given: st.SearchStrategy[T] | T | None, default: Callable[[], st.SearchStrategy[T]]
) -> st.SearchStrategy[T]:
    if given is None:
        return default()
    return given if isinstance(given, st.SearchStrategy) else st.just(given)
