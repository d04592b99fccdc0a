"""Where two real steps would cost much, the sentinel trains on shapes alone, and still sees the leaks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import locc
from locc.proof import sentinel
from locc.proof.experiment.batch import small_batch
from locc.proof.experiment.dispatch import Kernels
from locc.proof.experiment.shapes import RealTensorError, Shapes
from locc.proof.experiment.worlds import Meta
from testing.planted import but_for_the_proof

from .leaks import LEAKS, Chain, plain
from .shapes import SHAPES

pytestmark = pytest.mark.filterwarnings("ignore")


def _planted(act: Any) -> locc.Program:
    torch.manual_seed(0)
    model = Chain(act)
    model.b.active = False
    program = locc.compile(model, "dgl", ["a", "b", "c"], example_inputs=torch.randn(4, 4), verify=False)
    model.b.active = True
    return program


@pytest.mark.parametrize("name", LEAKS)
def test_the_sentinel_on_shapes_sees_every_leak(name: str) -> None:
    program = _planted(LEAKS[name].act)
    ir = program.ir
    before = {k: v.clone() for k, v in program.root.state_dict().items()}
    found = sentinel.check(ir, program.optimizers, small_batch(ir, ir.captured.example), real=False)
    assert found.findings
    assert all(torch.equal(v, before[k]) for k, v in program.root.state_dict().items())


def test_it_runs_on_shapes_and_not_by_falling_back() -> None:
    """Whatever PyTorch can infer shapes for, checkpoints and aliases included."""
    ran = {
        name: sentinel.check(p.ir, p.optimizers, small_batch(p.ir, p.ir.captured.example), real=False).how
        for name in ("checkpoint_reentrant", "forward_write", "data_alias_parameter", "foreign_buffer")
        for p in [_planted(LEAKS[name].act)]
    }
    assert set(ran.values()) == {Meta.title}


def test_a_held_reference_to_a_real_parameter_is_not_written_to() -> None:
    """The walk and the estimate come before anything is copied: they must not change the model."""

    def held(m: Any, x: Tensor) -> Tensor:
        m.kept_weights[0].data.mul_(0.5)
        return plain(m, x)

    program = _planted(held)
    weight = program.model.a.linear.weight
    program.model.b.kept_weights = (weight,)
    before = weight.detach().clone()
    with pytest.raises(locc.LocalityError, match=r"changes parameter 'a\.linear\.weight', which module 'a'"):
        locc.verify(program, real=False)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("method", ["dgl", "dni", "dtp", "altmin", "fa"])
def test_both_worlds_prove_the_same(method: str) -> None:
    case = SHAPES["chain"]
    program = locc.compile(case.build(), method, list(case.splits), example_inputs=case.x(), verify=False)
    before = but_for_the_proof(program)
    shapes, real = locc.verify(program, real=False), locc.verify(program, real=True)
    assert but_for_the_proof(program) == before
    assert "fake tensors (meta), 2 steps" in shapes.checks[-1].detail
    assert "real tensors, 2 steps" in real.checks[-1].detail
    assert (shapes.owners, shapes.flows, shapes.couplings) == (real.owners, real.flows, real.couplings)
    assert shapes.complete
    assert real.complete


def test_a_large_program_is_verified_on_shapes() -> None:
    wide = nn.Linear(3000, 3000), nn.Linear(3000, 3000)
    model = nn.Sequential(nn.Linear(8, 3000), *wide, nn.Linear(3000, 3))
    program = locc.compile(model, "bp", ["0", "1", "2"], example_inputs=torch.randn(4, 8))
    assert "fake tensors (meta)" in program.certificate.checks[-1].detail
    assert "real tensors" in locc.verify(program, real=True).checks[-1].detail


# ---- quick shape inference ---------------------------------------------------------------------


def _layout(value: Any) -> Any:
    return [(t.shape, t.stride(), t.dtype, t.is_meta) for t in torch.utils._pytree.tree_leaves(value)]


@pytest.mark.parametrize(
    "run",
    [
        lambda x: nn.functional.conv2d(x, x[:2, :, :3, :3].clone(), stride=2),
        lambda x: nn.functional.max_pool2d(x, 2, return_indices=True),
        lambda x: (x.sum(1), x.sum((0, 2)), x.argmax(1), x > 0, x.to(torch.float64)),
        lambda x: (x.add(1), x.to(torch.int64).add(1), x.to(torch.int64).add(1.5)),
        lambda x: (x.permute(1, 0, 2, 3), x.permute(1, 0, 2, 3) * 2, x.flatten(1)[:, ::2]),
        lambda x: (x.clone().add_(1).relu_(), x.clone().unsqueeze_(0), x.clone().t_() if x.dim() == 2 else x),
        lambda x: nn.functional.batch_norm(x, *x[:2, :, 0, 0].clone(), training=True),
        lambda x: torch.split(x, 1),
        lambda x: torch.var_mean(x, (0, 2, 3)),
    ],
)
def test_a_remembered_layout_is_the_one_that_pytorch_infers(run: Any) -> None:
    x = torch.empty(4, 2, 8, 8, device="meta")
    expected = _layout(run(x))
    with Kernels(Shapes()):
        assert _layout(run(x)) == expected
        assert _layout(run(x)) == expected  # the second time from memory


def test_views_of_shapes_share_memory_and_results_do_not() -> None:
    x = torch.empty(4, 4, device="meta")
    with Kernels(Shapes()):
        for _ in range(2):
            for view in (x.view(16), torch.ops.aten._unsafe_view(x, [16])):  # one says so in its schema
                assert view.untyped_storage()._cdata == x.untyped_storage()._cdata
            assert (x + 1).untyped_storage()._cdata != x.untyped_storage()._cdata
            assert x.add_(1) is x


def test_protected_memory_is_not_written_to() -> None:
    world, parameter = Meta(), nn.Parameter(torch.ones(3))
    world.of(parameter)
    with Kernels(world.kernel):
        torch.ones(3).add_(1)  # not the program's
        with pytest.raises(RealTensorError):
            parameter.data.mul_(0)
    assert parameter.tolist() == [1, 1, 1]
