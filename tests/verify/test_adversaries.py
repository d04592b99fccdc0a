"""What a search for leaks that compile has found: each is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.nn.utils import parametrize
from torch.optim.optimizer import register_optimizer_step_post_hook

import locc

from .adversaries import ACTS, FORWARD, REACHES, WRITES, new_data, new_storage, numpy_view, replaces_parameter
from .leaks import Act, Chain, Leaf, chain, compiled, data_alias_parameter, foreign_weight, plain

pytestmark = pytest.mark.filterwarnings("ignore")
MOVES = "the optimizer step of 'b' changes parameter 'a.linear.weight', which module 'a' owns"
Build = Callable[[], locc.Program]


def _refused(text: str, build: Build) -> None:
    with pytest.raises(locc.LocalityError) as caught:
        build()
    assert text in str(caught.value)


@pytest.mark.parametrize("act", ACTS)
def test_an_act_is_refused_by_name_and_leaves_the_model_alone(act: Act) -> None:
    model = chain(act)
    before = {k: (v, v.clone()) for k, v in model.state_dict(keep_vars=True).items()}
    _refused(ACTS[act], lambda: compiled(model))
    after = model.state_dict(keep_vars=True)
    assert all(after[k] is v and torch.equal(v, saved) for k, (v, saved) in before.items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model.a.training


LARGE: dict[Act, str] = {
    data_alias_parameter: "changes parameter",
    numpy_view: "changes parameter",
    new_data: "changes parameter",
    new_storage: "changes parameter",
    replaces_parameter: "replaces parameter",
}


@pytest.mark.parametrize("act", LARGE)
def test_large_tensors_are_watched_as_well(act: Act) -> None:
    model = chain(act, width=160)
    _refused(FORWARD.format(f"{LARGE[act]} 'a.linear.weight'"), lambda: compiled(model))


# ---- what needs more than an act ----------------------------------------------------------------


def in_a_list(write: bool) -> Build:
    def act(m: Any, x: Tensor) -> Tensor:
        if write:
            m.held[0].data.mul_(0.99)
            return plain(m, x)
        return plain(m, x) + x @ m.held[0]

    model = chain(act)
    model.b.held = [model.a.linear.weight]
    return lambda: compiled(model)


def live_view_from_the_start() -> locc.Program:
    model = chain()
    del model.b.linear._parameters["weight"]
    model.b.linear.weight = model.a.linear.weight.t()
    return compiled(model)


class _Borrowing(nn.Module):
    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.others = (other,)

    def forward(self, w: Tensor) -> Tensor:
        return w + self.others[0].linear.weight


def parametrization() -> locc.Program:
    model = chain()
    parametrize.register_parametrization(model.b.linear, "weight", _Borrowing(model.a))
    return compiled(model)


def forward_hook() -> locc.Program:
    model = chain()
    model.b.register_forward_hook(lambda module, args, h: h + model.a.linear.weight.mean())
    return compiled(model)


def global_forward_hook() -> locc.Program:
    model = chain()

    def hook(module: nn.Module, args: Any, h: Tensor) -> Tensor | None:
        return h + model.a.last if module is model.b else None

    with _Removed(hooks.register_module_forward_hook(hook)):
        return compiled(model)


def global_backward_hook() -> locc.Program:
    model = chain()

    def hook(module: nn.Module, *_: Any) -> None:
        if module is model.b:
            model.a.linear.weight.grad = torch.ones(4, 4)

    with _Removed(hooks.register_module_full_backward_hook(hook)):
        return compiled(model)


class _Removed(AbstractContextManager[None]):
    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def __exit__(self, *_: Any) -> None:
        self.handle.remove()


class _Sticky(Tensor):
    """Does not let go of its tape."""

    def detach(self) -> Tensor:
        return self


class _ReturnsSticky(Leaf):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).as_subclass(_Sticky)


class _Reassigning(Leaf):
    """Puts a new tensor into its buffer in each step."""

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x) + self.shared
        self.shared = 0.9 * self.shared + h.detach().mean(0)
        return h


def _adds_to_buffer(m: Any, x: Tensor) -> Tensor:
    m.other.shared.add_(1.0)
    return plain(m, x)


class _Inner(Leaf):
    def forward(self, x: Tensor) -> Tensor:
        self.inner = torch.tanh(self.linear(x))
        return torch.tanh(2 * self.inner)


def _spoils_inner(m: Any, x: Tensor) -> Tensor:
    """What the module before needs for its backward pass, changed before that."""
    m.other.inner.data.mul_(2.0)
    return plain(m, x)


def regularised_loss() -> locc.Program:
    model = chain()
    cross_entropy = nn.functional.cross_entropy

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(output, target) + 1e-3 * sum(p.pow(2).sum() for p in model.parameters())

    return compiled(model, loss=loss)


def loss_that_changes_a_target() -> locc.Program:
    def loss(output: Tensor, target: Any) -> Tensor:
        if isinstance(target, dict):
            target["weight"].mul_(0.5)
            return (
                nn.functional.cross_entropy(output, target["y"], reduction="none") * target["weight"]
            ).sum()
        return nn.functional.cross_entropy(output, target)

    program = compiled(chain(), loss=loss)
    locc.verify(program, torch.randn(4, 4), {"y": torch.zeros(4).long(), "weight": torch.ones(4)})
    return program


def optimizer_hook() -> locc.Program:
    model = chain()

    def make(params: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(params, lr=0.1)
        if len(calls) == 1:
            optimizer.register_step_post_hook(_decay(model))
        calls.append(optimizer)
        return optimizer

    calls: list[Any] = []
    return compiled(model, optimizer=make)


def global_optimizer_hook() -> locc.Program:
    model = chain()
    with _Removed(register_optimizer_step_post_hook(_decay(model))):
        return compiled(model)


def _decay(model: Chain) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        model.a.linear.weight.data.mul_(0.9)

    return hook


class _Meddling(torch.optim.Adam):
    """After its own step, `meddle` with every optimizer of the program."""

    every: list[torch.optim.Optimizer]
    meddle: Callable[[torch.optim.Optimizer], None]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        super().step(closure)
        for optimizer in self.every:
            type(self).meddle(optimizer)


def meddling(meddle: Callable[[torch.optim.Optimizer], None]) -> Build:
    kind = type("Meddling", (_Meddling,), {"every": [], "meddle": staticmethod(meddle)})

    def make(params: Any) -> torch.optim.Optimizer:
        kind.every.append(kind(params))
        return kind.every[-1]

    return lambda: compiled(chain(), optimizer=make)


def _halve(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] *= 0.5


def _forget(optimizer: torch.optim.Optimizer) -> None:
    for entry in optimizer.state.values():
        entry["exp_avg"].zero_()


def alias_in_buffer() -> locc.Program:
    model = chain(lambda m, x: plain(m, x) + x @ m.alias)
    model.b.register_buffer("alias", model.a.linear.weight.data)
    return compiled(model)


OUTSIDE = "the settings or state of the optimizer of '{}' change outside its own step"
BUILDS: dict[str, tuple[Build, str]] = {
    "a parameter read through a list": (in_a_list(write=False), "'b.loss' of 'b'"),
    "a parameter changed through a list": (
        in_a_list(write=True),
        FORWARD.format("changes parameter 'a.linear.weight'"),
    ),
    "a live view made before": (live_view_from_the_start, REACHES),
    "a parametrization": (parametrization, REACHES),
    "a forward hook": (forward_hook, REACHES),
    "a global forward hook": (global_forward_hook, REACHES),
    "a global backward hook": (global_backward_hook, WRITES),
    "a tensor that does not detach": (lambda: compiled(chain(first=_ReturnsSticky())), REACHES),
    "a buffer that its module replaces": (
        lambda: compiled(chain(_adds_to_buffer, _Reassigning())),
        FORWARD.format("changes buffer 'a.shared'"),
    ),
    "what a later backward pass needs": (
        lambda: compiled(chain(_spoils_inner, _Inner()), "bp"),
        FORWARD.format("changes tensor 'a.inner'"),
    ),
    "an input that requires a gradient": (
        lambda: compiled(chain(lambda m, x: foreign_weight(m, x) if x.requires_grad else plain(m, x)), "bp"),
        "objective 'b.chain' of 'b' reaches parameter 'a.linear.weight', which module 'a' owns",
    ),
    "a loss over all parameters": (regularised_loss, "objective 'a.loss' of 'a' reaches parameter 'head."),
    "a loss that changes the target": (loss_that_changes_a_target, "changes 'target', a value of 'data'"),
    "a hook on an optimizer": (optimizer_hook, MOVES),
    "a hook on all optimizers": (global_optimizer_hook, MOVES),
    "a foreign learning rate": (meddling(_halve), OUTSIDE.format("b")),
    "a foreign momentum": (meddling(_forget), OUTSIDE.format("a")),
    "a buffer on a foreign weight": (
        alias_in_buffer,
        "the optimizer step of 'a' changes buffer 'b.alias', which module 'b' owns",
    ),
}


@pytest.mark.parametrize("name", BUILDS)
def test_a_planted_program_is_refused_by_name(name: str) -> None:
    build, text = BUILDS[name]
    _refused(text, build)


def test_a_parameter_changed_through_a_list_is_put_back() -> None:
    """The checks on shapes do not reach it, but they must not let it be changed either."""
    model = chain(lambda m, x: (m.held[0].data.mul_(0.99), plain(m, x))[1])
    model.b.held = [model.a.linear.weight]
    before = model.a.linear.weight.clone()
    _refused("changes parameter 'a.linear.weight'", lambda: compiled(model))
    assert torch.equal(before, model.a.linear.weight)
