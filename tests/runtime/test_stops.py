"""What a step that stops in its midst says and leaves."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from locc import Program, RunError
from support import batch, compiled, mlp, same, sgd, snapshot


class Told(nn.Module):
    """The last of three modules raises when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 8)
        self.c = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3))
        self.error: BaseException | None = None
        self.c.register_forward_pre_hook(self.tell)

    def tell(self, *_: Any) -> None:
        if self.error is not None:
            raise self.error

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def told(method: str = "dgl", **options: Any) -> Program:
    return compiled(Told(), method, ["a", "b"], verify=False, optimizer=sgd(), **options)


def changed(program: Program, before: dict[str, Tensor]) -> set[str]:
    after = snapshot(program.model)
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    return {n.split(".")[0] for n in moved if n.endswith(("weight", "bias"))}


@pytest.mark.parametrize(
    ("options", "sentence", "moved"),
    [
        ({}, "Updated before that: 'a', 'b'; compile with atomic=True", {"a", "b"}),
        ({"atomic": True}, r"The whole step is undone \(atomic=True\)", set()),
        ({"accumulate": 2}, "No module has been updated", set()),
        ({"method": "bp"}, "No module has been updated", set()),
    ],
    ids=["dgl", "atomic", "accumulating", "bp"],
)
def test_an_error_of_pytorch_names_module_and_objective_and_what_had_moved(options, sentence, moved):
    program = told(**options)
    before = snapshot(program.model)
    x, y = batch(1)
    with pytest.raises(RunError, match=r"module 'c', objective 'loss': ValueError: Expected more") as e:
        program.step(x, y)
    assert isinstance(e.value.__cause__, ValueError)
    assert e.match(sentence)
    assert changed(program, before) == moved
    assert all(p.grad is None for p in program.parameters())
    program.step(*batch())


@pytest.mark.parametrize(
    ("target", "cause"), [(torch.full((5,), 3), IndexError), (torch.zeros(5), RuntimeError)]
)
@pytest.mark.parametrize("method", ["bp", "dgl"])
def test_labels_that_a_callable_loss_refuses(method, target, cause):
    program = told(method, loss=F.cross_entropy)
    before = snapshot(program.model)
    with pytest.raises(RunError, match=r"objective 'loss'.*No module has been updated") as e:
        program.step(batch()[0], target)
    assert isinstance(e.value.__cause__, cause)
    assert changed(program, before) == set()


class Mine(Exception):
    """Somebody's own exception."""


@pytest.mark.parametrize(
    "error", [Mine("stop"), OSError(), KeyboardInterrupt(), torch.OutOfMemoryError("smaller")]
)
def test_what_somebody_waits_for_arrives_as_it_is_with_a_note(error):
    program = told()
    program.model.error = error
    with pytest.raises(type(error)) as e:
        program.step(*batch())
    assert e.value is error
    assert error.__notes__ == [
        "locc: the step stopped. Updated before that: 'a', 'b'; compile with atomic=True to undo them as well"
    ]
    assert all(p.grad is None for p in program.parameters())


def test_of_many_modules_that_moved_a_few_are_named():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(7)), nn.BatchNorm1d(4), nn.Linear(4, 3))
    program = compiled(model, "dgl", [str(i) for i in range(7)], verify=False)
    with pytest.raises(RunError, match="Updated before that: '0', '1', '2', '3' and 3 more; compile"):
        program.step(*batch(1))


@pytest.mark.parametrize("how", ["step", "fit"])
def test_an_objective_that_is_not_finite_says_what_had_moved(how):
    program = told()
    x, y = batch()
    nn.init.constant_(program.model.c[1].weight, float("inf"))
    message = (
        r"of module 'c' is nan; the step stopped before.*Updated before that: 'a', 'b'; compile with atomic"
    )
    with pytest.raises(RunError, match=message):
        program.step(x, y) if how == "step" else program.fit([(x, y)], progress=False)


@pytest.mark.parametrize("known", [True, False], ids=["example inputs", "first step"])
@pytest.mark.parametrize("how", ["step", "fit", "evaluate"])
def test_an_empty_batch_is_called_empty(how, known):
    program = compiled(mlp(), "dgl", ["relu1"], verify=False, **({} if known else {"example_inputs": None}))
    if not known and how == "evaluate":
        program.step(*batch())
    before = snapshot(program.model)
    with pytest.raises(RunError, match="the batch is empty: the inputs have 0 samples; leave such"):
        program.step(*batch(0)) if how == "step" else getattr(program, how)([batch(0)])
    assert same(before, snapshot(program.model))


def test_steps_of_two_threads_do_not_mix():
    model = mlp()
    program = compiled(model, "dgl", ["relu1"], verify=False)
    alone = compiled(copy.deepcopy(model), "dgl", ["relu1"], verify=False)
    inside, go = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        inside.set()
        assert go.wait(10)

    handle = model.get_submodule("second").register_forward_pre_hook(wait)
    thread = threading.Thread(target=program.step, args=batch())
    thread.start()
    assert inside.wait(10)
    with pytest.raises(RunError, match="a step of this program is under way, in another thread or around"):
        program.step(*batch())
    go.set()
    thread.join()
    handle.remove()
    alone.step(*batch())
    assert same(snapshot(model), snapshot(alone.model))
    program.step(*batch())


def test_a_step_inside_of_a_step_is_refused():
    program: Program = compiled(mlp(), "dgl", ["relu1"], verify=False)
    program.model.second.register_forward_pre_hook(lambda *_: program.step(*batch()) and None)
    with pytest.raises(RunError, match="around this call"):
        program.step(*batch())
