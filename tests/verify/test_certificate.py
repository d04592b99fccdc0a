"""What a certificate states follows from the graph, never from the method's name."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import locc
from locc.proof import Certificate, Flow
from locc.rewrite import Method
from support import Tied


def _program(method: str | Method, depth: int = 4, **options: object) -> locc.Program:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(depth - 1)]
    splits = [str(i) for i in range(depth - 1)]
    model = nn.Sequential(*layers, nn.Linear(6, 3))
    return locc.compile(model, method, splits, example_inputs=torch.randn(4, 6), **options)  # type: ignore[arg-type]


def _kinds(flows: Sequence[Flow]) -> set[tuple[str, str]]:
    return {(f.kind, f.direction) for f in flows}


VERDICTS = {
    "bp": "not modular",
    "fa": "not modular",
    "dfa": "weakly modular",
    "dni": "weakly modular",
    "cdni": "weakly modular",
    "tp": "weakly modular",
    "dtp": "weakly modular",
    "altmin": "weakly modular",
    "dgl": "strictly modular",
    "predsim": "strictly modular",
    "pred": "strictly modular",
    "sim": "strictly modular",
    "al": "strictly modular",
}


@pytest.mark.parametrize("method", VERDICTS)
def test_the_verdict_on_the_methods_of_the_literature(method: str) -> None:
    certificate = _program(method).certificate
    assert certificate.verdict == VERDICTS[method]
    assert certificate.pipeline_exact == (VERDICTS[method] == "strictly modular")
    assert certificate.complete
    assert len(certificate.checks) == 4
    for owner in certificate.owners:
        for objective in owner.objectives:
            assert len(objective.proved_by) == 3
            assert set(objective.reaches) <= set(owner.parameters)


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_backpropagation_is_not_modular_and_fully_locked(depth: int) -> None:
    certificate = _program("bp", depth).certificate
    names = [o.name for o in certificate.owners]
    assert certificate.table.backward_pass == "end to end"
    assert certificate.table.forward_pass
    assert not certificate.table.auxiliary_model
    for i, owner in enumerate(certificate.owners):
        assert owner.update_waits_for == owner.backward_waits_for == tuple(names[i + 1 :])
        assert owner.gradient_hops == owner.backward_depth == depth - 1 - i
        assert owner.forward_locked == (i > 0)
    assert len(certificate.critical_path) == 2 * depth
    assert all("by their trained weights" in how for _, how in certificate.gradients)


def test_one_module_is_end_to_end() -> None:
    model = nn.Linear(4, 3)
    certificate = locc.compile(model, "bp", example_inputs=torch.randn(2, 4)).certificate
    assert certificate.verdict == "not modular"


def test_feedback_alignment_is_locked_but_transports_no_weights() -> None:
    certificate = _program("fa").certificate
    assert certificate.owner("0").gradient_hops == 3
    assert all("by fixed matrices, not their trained weights" in how for _, how in certificate.gradients)


class Scaled(nn.Module):
    """A block whose convolution's result is scaled by one number a channel, and shifted by position."""

    def __init__(self, scale: nn.Module) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv2d(2, 2, 3, padding=1), scale
        self.shift = nn.Parameter(torch.zeros(1, 2, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale(torch.tanh(self.conv(x)) + self.shift)


class Gamma(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full(shape, 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * x


@pytest.mark.parametrize(("method", "by"), [("fa", "by fixed matrices"), ("bp", "by their trained weights")])
def test_a_scale_for_each_channel_is_no_matrix(method: str, by: str) -> None:
    model = nn.Sequential(Scaled(Gamma(2, 1, 1)), Scaled(Gamma(1, 2, 1, 1)), nn.Flatten(), nn.Linear(32, 3))
    program = locc.compile(model, method, ["0"], example_inputs=torch.randn(4, 2, 4, 4))
    ((_, how),) = program.certificate.gradients
    assert by in how


def test_direct_feedback_alignment_waits_for_the_output_but_for_no_backward_pass() -> None:
    certificate = _program("dfa").certificate
    for owner in certificate.owners[:-1]:
        assert owner.update_locked
        assert not owner.backward_locked
        assert owner.trains_on_gradient is None
        assert ("error", "down") in _kinds(certificate.entering(owner.name))
    assert certificate.table.backward_pass == "none"


def test_decoupled_interfaces_name_their_one_hop_gradient() -> None:
    certificate = _program("dni").certificate
    assert certificate.table.backward_pass == "1 hop"
    assert any(
        "'0.synthesiser' depends on a gradient through the layers of '1' (one hop)" in r
        for r in certificate.reasons
    )
    (gradient,) = [f for f in certificate.entering("0.synthesiser") if f.kind == "gradient"]
    assert (gradient.producer, gradient.direction, gradient.hops) == ("1", "down", 1)
    assert ("synthetic gradient", "within") in _kinds(certificate.entering("0"))
    module = certificate.owner("0")
    assert not module.update_locked
    assert not module.backward_locked


def test_greedy_learning_is_unlocked_and_pipeline_exact() -> None:
    certificate = _program("dgl").certificate
    assert all(not o.update_locked and not o.backward_locked for o in certificate.owners)
    assert _kinds(certificate.flows) == {("input", "up"), ("label", "up"), ("activation", "up")}
    assert certificate.table.backward_pass == "none"
    assert certificate.table.auxiliary_model
    assert not certificate.table.forward_pass
    assert len(certificate.critical_path) == 5  # the forward of four modules, then one backward


def test_associated_learning_sends_targets_up() -> None:
    certificate = _program("al").certificate
    assert ("target", "up") in _kinds(certificate.flows)
    assert all(f.direction != "down" for f in certificate.flows)
    assert (
        "in the order '3', '0', '2', '1'" in certificate.reasons[0]
    )  # the label side of the folded network first


def test_target_propagation_sends_targets_down() -> None:
    certificate = _program("dtp").certificate
    assert ("target", "down") in _kinds(certificate.flows)
    assert certificate.owner("0").backward_waits_for == ("3",)


# ---- couplings and warnings -------------------------------------------------------------------


def _tied(policy: str) -> Certificate:
    torch.manual_seed(0)
    tokens = torch.randint(0, 7, (3, 4))
    return locc.compile(Tied(), "dgl", ["embed", "mid"], tied=policy, example_inputs=tokens).certificate


def test_a_tied_parameter_that_one_module_trains_is_a_coupling() -> None:
    certificate = _tied("owner")
    (coupling,) = certificate.couplings
    assert str(coupling) == "'head' uses parameter 'head.weight', which 'embed' owns and trains"
    assert coupling.live
    assert str(coupling) in str(certificate)
    assert ("state", "up") in _kinds(certificate.flows)
    assert not certificate.pipeline_exact
    assert "embed.weight" in certificate.owner("embed").parameters
    assert certificate.owner("head").parameters == ()


def test_a_tied_parameter_that_was_copied_is_listed_and_couples_nothing() -> None:
    certificate = _tied("copy")
    (coupling,) = certificate.couplings
    assert str(coupling) == "'head' trains a copy of parameter 'head.weight', which it shared with 'embed'"
    assert not coupling.live
    assert str(coupling) in str(certificate)
    assert ("state", "up") not in _kinds(certificate.flows)
    assert certificate.pipeline_exact
    assert "embed.weight" in certificate.owner("embed").parameters
    assert certificate.owner("head").parameters == ("head.weight",)


class _Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.clone()


class _Centring(nn.Module):
    """Puts a new tensor into its buffer each time."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


class _Shared(nn.Module):
    """Runs one stateful layer twice."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.layer(self.two(self.layer(self.one(x)))))


STATEFUL: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "BatchNorm statistics": (
        lambda: nn.BatchNorm1d(4, affine=False),
        (
            "BatchNorm statistics 'layer.running_mean'",
            "BatchNorm statistics 'layer.running_var'",
            "buffer 'layer.num_batches_tracked'",
        ),
    ),
    "a buffer changed in place": (_Counting, ("buffer 'layer.calls'",)),
    "a buffer that is replaced": (_Centring, ("buffer 'layer.mean'",)),
}


@pytest.mark.parametrize("method", ["bp", "dgl"])
@pytest.mark.parametrize("kind", STATEFUL)
def test_state_that_two_modules_share_and_change_is_a_coupling(kind: str, method: str) -> None:
    make, named = STATEFUL[kind]
    x = torch.randn(5, 4)
    shared = locc.compile(_Shared(make()), method, ["one", "two"], example_inputs=x).certificate
    assert tuple(map(str, shared.couplings)) == tuple(
        f"{name} is used by 'two', 'three', and changes in a step" for name in named
    )
    assert not shared.pipeline_exact
    kept_together = locc.compile(_Shared(make()), method, ["one"], example_inputs=x).certificate
    assert kept_together.couplings == ()


def test_a_constant_buffer_that_modules_share_is_none() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 3)
            self.register_buffer("scale", torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x * self.scale) * self.scale)

    assert locc.compile(Shared(), "bp", ["one"], example_inputs=torch.randn(5, 4)).certificate.couplings == ()


def test_parameters_that_no_objective_reaches_are_named() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.unused = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(2, 2)
            self.silent = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                shift = self.silent * 2
            return self.two(self.one(x) + shift)

    (warning,) = locc.compile(Partly(), "bp", ["one"], example_inputs=torch.randn(5, 4)).certificate.warnings
    assert "3 trainable parameter(s)" in warning
    for name in ("'silent'", "'unused.weight'", "'unused.bias'"):
        assert name in warning


# ---- the certificate as an object -------------------------------------------------------------


def test_it_saves_as_versioned_json_and_reads_back(tmp_path: Path) -> None:
    certificate = _program("dni").certificate
    path = certificate.save(tmp_path / "certificate.json")
    data = json.loads(path.read_text())
    assert data["version"] == 6
    assert len(data["graph_hash"]) == 64
    assert Certificate.from_json(path.read_text()) == certificate


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 99}'])
def test_a_foreign_text_is_no_certificate(text: str) -> None:
    with pytest.raises(locc.LoccError, match="certificate"):
        Certificate.from_json(text)


def test_the_hash_tells_programs_apart_and_is_reproducible() -> None:
    hashes = [_program(m, d).certificate.graph_hash for m, d in (("bp", 3), ("bp", 3), ("bp", 4), ("dgl", 3))]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_the_page_says_what_the_data_says() -> None:
    page = _program("bp", 3).certificate.text(verbose=True)
    for line in (
        "Certificate of locality: bp, 3 modules",
        "  not modular",
        "  backward pass needed      end to end",
        "module 0: 0",
        "  owns      2 parameter tensors, 42 elements: 0.0.weight, 0.0.bias",
        "  objective 0.chain reaches 2 parameter tensors of its own, none else",
        "            by reachability on the graph, autograd walk, sentinel run",
        "  locking   forward: no; update: yes, waits for 1, 2; backward: yes, waits for 1, 2 (a chain of 2)",
    ):
        assert line in page.splitlines(), page


def test_a_program_that_was_not_verified_has_no_certificate_until_it_is() -> None:
    program = _program("dgl", verify=False)
    with pytest.raises(locc.RunError, match=r"call locc\.verify"):
        _ = program.certificate
    assert locc.verify(program) is program.certificate
