from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import locc
from locc import LoccError, MethodError
from support import batch, compiled, mlp, same, sgd, snapshot

X, Y = batch()


def compile_(**changes: Any) -> locc.Program:
    arguments: dict[str, Any] = {
        "model": mlp(),
        "method": "bp",
        "splits": ["relu1"],
        "example_inputs": X,
        **changes,
    }
    return locc.compile(arguments.pop("model"), arguments.pop("method"), arguments.pop("splits"), **arguments)


# ---- arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": 3}, "model must be a torch.nn.Module; found int"),
        ({"model": compiled(mlp(), "bp")}, "this is a program already; pass program.model"),
        ({"model": mlp}, "model must be a torch.nn.Module; found function"),
        ({"method": "dglx"}, "there is no method 'dglx'; nearest: 'dgl'"),
        ({"method": 3}, "method must be an id or a Method; found int"),
        ({"sigma": 1.0}, "method 'bp' has no option 'sigma'; it takes no options"),
        ({"method": "dgl", "widht": 1}, "method 'dgl' has no option 'widht'; "),
        (
            {"optimiser": sgd()},
            "compile has no argument 'optimiser', nor has method 'bp'; nearest: 'optimizer'",
        ),
        ({"method": locc.method("bp"), "sigma": 1}, r"configured already; give sigma to locc.method\(...\)"),
        (
            {"loss": "cross_entrpy"},
            "there is no loss 'cross_entrpy'; nearest: 'cross_entropy', or pass a callable",
        ),
        ({"loss": nn.CrossEntropyLoss}, r"loss=CrossEntropyLoss is a class; give .* CrossEntropyLoss\(\)"),
        ({"example_inputs": X.numpy()}, "hold no tensor, but ndarray; give a batch as the model takes it"),
        ({"example_inputs": X[:0]}, "the example inputs have 0 samples"),
        ({"method": "dtp", "sigma": "a"}, "method 'dtp' cannot be made with sigma='a': '>' not supported"),
        ({"loss": 3}, r"loss must be a name or a callable\(output, target\); found int"),
        ({"optimizer": 3}, "optimizer must be a callable that builds one from parameters.*found int"),
        ({"optimizer": torch.optim.SGD(mlp().parameters())}, "optimizer must be a callable.*found SGD"),
        ({"optimizer": lambda ps: 3}, r"optimizer\(params\) returned a int for 'relu1', not an Optimizer"),
        (
            {"optimizer": lambda ps: torch.optim.SGD(mlp().parameters())},
            "does not hold exactly the parameters it was given",
        ),
        (
            {"optimizer": lambda ps: torch.optim.SGD(ps[:1])},
            r"given \(it lacks 'first.bias'\); build it",
        ),
        ({"optimizer": lambda: None}, r"optimizer\(params\) failed for 'relu1': TypeError"),
        ({"optimizer": torch.optim.LBFGS}, r"LBFGS evaluates the loss several times a step \(a closure\)"),
        ({"schedule": "lokstep"}, "schedule='lokstep' is not available; nearest: 'lockstep'"),
        ({"schedule": ["lockstep"]}, "schedule=.* is not available"),
        ({"backend": "inductr"}, "backend='inductr' is not available; "),
        ({"tied": "no"}, "tied='no': choose 'auto', 'owner', 'copy' or 'error'"),
        ({"clip": 0}, "clip=0: give the largest gradient norm of a module, above 0"),
        ({"clip": -1.0}, r"clip=-1.0: give"),
        ({"clip": "1"}, "clip='1': give"),
        ({"clip": float("nan")}, "clip=nan: give"),
        ({"clip": True}, "clip=True: give"),
        ({"accumulate": 0}, "accumulate=0: give the number of steps per update, at least 1"),
        ({"accumulate": 2.0}, "accumulate=2.0: give"),
        ({"accumulate": True}, "accumulate=True: give"),
        ({"autocast": "f16"}, "autocast='f16' is unknown; nearest: '.*float16'"),
        ({"autocast": torch.int8}, "autocast=torch.int8 is unknown"),
        ({"autocast": 16}, "autocast=16 is unknown"),
        ({"seed": "x"}, "seed='x': give a whole number"),
        ({"scheduler": 3}, "scheduler must be a callable.*found int"),
        ({"scheduler": {"relu1": 3}}, "scheduler must be a callable.*found int"),
        (
            {"scheduler": {"relu": torch.optim.lr_scheduler.StepLR}},
            "scheduler for 'relu', which is no module that trains; nearest",
        ),
        (
            {"scheduler": torch.optim.lr_scheduler.StepLR},
            r"scheduler\(optimizer\) failed for 'relu1': TypeError",
        ),
        (
            {"scheduler": lambda _: torch.optim.lr_scheduler.StepLR(torch.optim.SGD([X.clone()]), 1)},
            "scheduler\\(optimizer\\) for 'relu1' schedules another optimizer than the one it was given",
        ),
        ({"splits": ["relu3"]}, "split 'relu3' matches no submodule; nearest: 'relu"),
        (
            {"schedule": "sequential"},
            "schedule='sequential' trains one module after the other, but method 'bp' needs",
        ),
    ],
)
def test_arguments_that_make_no_sense(changes, message):
    with pytest.raises(LoccError, match=message):
        compile_(**changes)


@pytest.mark.parametrize("example", [torch.zeros(5, 7), (), "abc", {"z": X}])
def test_example_inputs_on_which_the_model_fails(example):
    model = mlp()
    before = snapshot(model)
    with pytest.raises(locc.CaptureError, match=r"fails on the example inputs|hold no tensor, but "):
        compile_(model=model, example_inputs=example)
    assert same(before, snapshot(model))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused():
    inner = torch.jit.script(nn.Linear(3, 3))
    model = nn.Sequential(nn.Linear(4, 3), inner, nn.Linear(3, 3))
    for given, what in ((model, "'1' is TorchScript"), (inner, "the model is TorchScript")):
        with pytest.raises(locc.CaptureError, match=what):
            compile_(model=given, splits=["0"])
        assert what in str(locc.examine(given, "bp", ["0"], example_inputs=X))


def test_a_lazy_module_is_refused_until_it_has_run():
    model = torch.nn.Sequential(torch.nn.LazyLinear(4), torch.nn.Linear(4, 3))
    with pytest.raises(locc.CaptureError, match=r"'0\.weight' has no shape yet .*run the model once"):
        compile_(model=model, splits=["0"])
    model(X)
    compile_(model=model, splits=["0"])


def test_everything_that_needs_no_inputs_is_checked_without_them():
    for changes in ({"clip": 0}, {"loss": 3}, {"tied": 1}, {"method": "x"}, {"scheduler": 3}, {"sigma": 2}):
        with pytest.raises(LoccError):
            compile_(example_inputs=None, **changes)


@pytest.mark.parametrize("loss", ["mse", "bce", "l1"])
def test_classes_are_one_hot_rows_for_losses_between_equal_shapes(loss):
    rows = functional.one_hot(Y, 3).float()
    one, other = compile_(loss=loss, splits=[]), compile_(loss=loss, splits=[])
    other.model.load_state_dict(one.model.state_dict())
    assert float(one.step(X, Y).loss) == float(other.step(X, rows).loss)


# ---- the program -------------------------------------------------------------------------------


def test_the_three_lines_are_a_complete_call():
    model = mlp()
    program = locc.compile(model, "dgl", ["relu1", "relu2"])
    before = snapshot(model)
    report = program.step(X, Y)
    assert report.loss.dim() == 0
    assert [name.rpartition(".")[0] for name in report.objectives] == ["relu1", "relu2", "third"]
    assert not same(before, snapshot(model))


def test_the_representation_names_method_and_modules():
    assert "method=dgl, modules=['relu1', 'output']" in repr(compile_(method="dgl"))
    assert "not complete: no example inputs yet" in repr(compile_(example_inputs=None))


def test_calling_a_program_is_calling_the_model():
    model = mlp(dropout=0.5)
    program = compile_(model=model)
    assert program.eval() is program
    assert not model.training
    assert torch.equal(program(X), model(X))
    program.train()
    assert model.training
    torch.manual_seed(0)
    one = program(X)
    torch.manual_seed(0)
    assert torch.equal(one, model(X))
    assert not torch.equal(program(X), program(X))


def test_the_models_own_parameters_are_trained():
    model = mlp()
    before = list(model.parameters())
    program = compile_(model=model)
    assert program.model is model
    assert all(p is q for p, q in zip(before, model.parameters(), strict=True))


def test_two_programs_may_train_one_model_in_turn():
    model = mlp()
    one, two = compile_(model=model), compile_(model=model, method="dgl")
    one.step(X, Y)
    two.step(X, Y)
    one.step(X, Y)


def test_a_seed_makes_a_run_reproducible():
    def run() -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = mlp(dropout=0.5)
        program = compile_(model=model, method="dtp", seed=4)
        torch.rand(3)  # what else the user draws does not matter
        for _ in range(2):
            program.step(X, Y)
        return snapshot(program.root)

    assert same(run(), run())


def test_registered_methods_say_what_they_are():
    found = locc.methods()
    assert {"bp", "dgl", "dtp", "dni", "fa", "dfa", "predsim"} <= set(found)
    for name, info in found.items():
        assert info.name == name
        assert info.family
        assert info.reference
        assert info.summary
        assert info.package == "locc_passes"
        assert all(option.isidentifier() for option in info.options)
    assert found["bp"].options == {}


def test_a_configured_method():
    program = compile_(method=locc.method("dgl"))
    assert program.method == "dgl"
    with pytest.raises(MethodError, match="there is no method 'nope'"):
        locc.method("nope")


def test_the_modularity_of_a_method_is_read_off_its_graph():
    state = torch.get_rng_state()
    found = locc.methods()
    assert found["bp"].modularity == found["fa"].modularity == "not modular"
    assert found["dgl"].modularity == found["al"].modularity == "strictly modular"
    assert found["dni"].modularity == found["dfa"].modularity == "weakly modular"
    assert torch.equal(state, torch.get_rng_state())


def test_what_capturing_did_by_itself_is_said_once_for_each_model(caplog: pytest.LogCaptureFixture) -> None:
    class Remembering(nn.Sequential):
        hidden: Tensor

        def forward(self, x: Tensor) -> Tensor:
            self.hidden = self[0](x)
            return self[1](self.hidden)

    models = [Remembering(nn.Linear(4, 4), nn.Linear(4, 3)) for _ in range(2)]
    said = []
    for model in (*models, *models):
        locc.compile(model, "dgl", ["0"], example_inputs=torch.randn(2, 4), verify=False)
        said.append([r.getMessage() for r in caplog.records if r.name == "locc"])
        caplog.clear()
    text = "locc: Remembering: the forward sets 'hidden', an attribute; the captured graph does not"
    assert said == [[text], [text], [], []]
