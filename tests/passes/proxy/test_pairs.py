"""`pair-proxy`, `kernel-pull`, `gim`, and the methods that train in stages."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import locc
from locc.callbacks import Callback
from locc.errors import MethodError
from locc.ir import BatchDim, TensorSpec
from locc.nn import (
    FEATURES,
    Layout,
    PredictiveCoding,
    build_head,
    gaussian_kernel,
    matrix_loss,
    pair_kernel,
    pair_loss,
    patch_grid,
)
from support import batch, compiled, mlp, sgd, snapshot

F64 = torch.float64
B = BatchDim()


def by_pairs(g: Tensor, y: Tensor, objective: str, feature: str, pull: bool) -> float:
    """The formulas of Duan et al., one pair at a time, in Python numbers.

    The authors' formulation (michaelshiyu/kerNET, 14a4ff1, kernet/layers/loss.py):
    `_srs_upper_tri_alignment`, lines 175 to 208, `_srs_nmse`, 108 to 138, `_srs_log_contrastive`, 243 to 274
    (without pull `_srs_contrastive`, 211 to 240) and `_srs_raw`, 57 to 105, which they maximise. Ours departs
    in "nmse" with pull: theirs is a mean over B^2 entries with the diagonal, (B - 1) / B times ours for ReLU.
    """
    phi, least = FEATURES[feature]
    rows = [phi(r).flatten().tolist() for r in g]
    units = [[v / max(math.sqrt(sum(w * w for w in r)), 1e-12) for v in r] for r in rows]
    pairs = [(i, j) for i in range(len(y)) for j in range(i + 1, len(y)) if pull or y[i] != y[j]]
    k = {(i, j): sum(a * b for a, b in zip(units[i], units[j], strict=True)) for i, j in pairs}
    star = {(i, j): 1.0 if y[i] == y[j] else least for i, j in pairs}
    same = [p for p in pairs if y[p[0]] == y[p[1]]]
    other = [p for p in pairs if y[p[0]] != y[p[1]]]
    if objective == "alignment":
        norm = math.sqrt(sum(v * v for v in k.values()) * sum(v * v for v in star.values()))
        return -sum(k[p] * star[p] for p in pairs) / norm
    if objective == "nmse":
        return sum((k[p] - star[p]) ** 2 for p in pairs) / len(pairs)
    if objective == "raw":
        return (sum(k[p] for p in other) - sum(k[p] for p in same)) / len(pairs)
    if pull:
        return -math.log(sum(math.exp(k[p]) for p in same) / sum(math.exp(v) for v in k.values()))
    return sum(math.exp(k[p]) for p in other) / len(other)


@pytest.mark.parametrize("pull", [True, False])
@pytest.mark.parametrize("feature", ["relu", "tanh"])
@pytest.mark.parametrize("objective", ["alignment", "nmse", "contrastive", "raw"])
def test_pair_losses_equal_the_formulas(objective: str, feature: str, pull: bool) -> None:
    if objective == "alignment" and feature == "relu" and not pull:
        with pytest.raises(MethodError, match="undefined for feature='auto'"):
            locc.compile(
                mlp(), "pair-proxy", ["first"], example_inputs=batch()[0], pull=False, objective=objective
            )
        return
    g, y = torch.randn(7, 5, dtype=F64), torch.tensor([0, 1, 0, 2, 1, 0, 2])
    found = pair_loss(pair_kernel(g, feature, 4), y, objective, FEATURES[feature][1], pull)
    assert float(found) == pytest.approx(by_pairs(g, y, objective, feature, pull), abs=1e-12)


@pytest.mark.parametrize("objective", ["alignment", "nmse", "contrastive", "raw"])
@pytest.mark.parametrize("labels", [[0, 1, 2], [1, 1, 1]])
def test_a_batch_without_pairs_of_a_kind_has_finite_gradients(objective: str, labels: list[int]) -> None:
    g = torch.randn(3, 5, dtype=F64, requires_grad=True)
    for pull, feature in ((True, "relu"), (False, "tanh")):
        loss = pair_loss(
            pair_kernel(g, feature, 4), torch.tensor(labels), objective, FEATURES[feature][1], pull
        )
        (gradient,) = torch.autograd.grad(loss, g, allow_unused=True)
        assert loss.isfinite()
        assert gradient is None or gradient.isfinite().all()


def test_kernel_matrices_equal_the_formula() -> None:
    """In the authors' code (michaelshiyu/kerNET, c642e2e) a stage is `_greedyFeedforward._fit_hidden`.

    That is legacy/kernet/models/feedforward.py, lines 616 to 745, with the losses in lines 741 and 745; the
    kernel is `knPhi`, legacy/kernet/backend/torch_backend.py, lines 109 to 145. Ours departs in the width, a
    share of the rows' spread: under a width that is fixed, rows that all move apart lower the loss.
    """
    g, y = torch.randn(4, 3, dtype=F64), torch.tensor([0, 1, 0, 2])
    square = [[float((a - b).square().sum()) for b in g] for a in g]
    spread = sum(map(sum, square)) / 16
    k = torch.tensor([[math.exp(-d / (2 * 0.5**2 * spread)) for d in row] for row in square], dtype=F64)
    star = torch.tensor([[float(a == b) for b in y] for a in y], dtype=F64)
    torch.testing.assert_close(gaussian_kernel(g, 0.5), k, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda g: gaussian_kernel(g, 0.5), g.clone().requires_grad_())
    torch.testing.assert_close(matrix_loss(k, y, "mse"), (k - star).square().mean(), rtol=0, atol=1e-12)
    cosine = -(k * star).sum() / (k.norm() * star.norm())
    torch.testing.assert_close(matrix_loss(k, y, "cosine"), cosine, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("method", "option"), [("pair-proxy", {"order": "together"}), ("kernel-pull", {})])
def test_a_module_descends_its_own_loss(method: str, option: dict[str, Any]) -> None:
    x, y = batch(dtype=F64)
    model = mlp().double()
    program = compiled(model, method, ["first", "second"], example_inputs=x, optimizer=sgd(0.1), **option)
    layer = model.first
    g = layer(x)
    if method == "pair-proxy":
        loss = pair_loss(pair_kernel(g, "relu", 4), y, "alignment", 0.0, True)
    else:
        loss = matrix_loss(gaussian_kernel(g, 0.5), y, "cosine")
    gradients = torch.autograd.grad(loss, [layer.weight, layer.bias])
    wanted = [p.detach() - 0.1 * d for p, d in zip((layer.weight, layer.bias), gradients, strict=True)]
    if program.phases:
        program.phase = "train_first"
    program.step(x, y)
    for p, w in zip((layer.weight, layer.bias), wanted, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", ["greedy-seq", "cascade", "pair-proxy", "kernel-pull"])
def test_stages_train_one_module_after_the_other(method: str) -> None:
    """The authors' loops: of `greedy-seq` eugenium/layerCNN, f2e6136, imagenet_refactored/imagenet_greedy.py.

    Lines 187 to 258: modules below in eval mode, one SGD for a module and its auxiliary. Of `cascade` it is
    `CascadeTraining` (EnriqueSMarquez/CascadeLearning, 856fe88, usefulMethods.py, lines 394 to 581). Ours
    departs there: theirs cascades convolutions alone, ours any module; and ours pools a large map.
    """
    x, y = batch()
    program = compiled(mlp(), method, ["first", "second"], example_inputs=x)
    moved = []

    class Watch(Callback):
        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            now = snapshot(program.model)
            moved.append({k.partition(".")[0] for k in now if not torch.equal(now[k], self.before[k])})
            self.before = now

        before = snapshot(program.model)

    program.fit([(x, y)] * 2, epochs=1, progress=False, callbacks=[Watch()])
    assert moved == [{"first"}, {"second"}, {"third"}]


def test_the_greedy_auxiliary_is_that_of_the_paper() -> None:
    """Belilovsky et al.: pool to half, k - 1 convolutions without padding, 2 x 2, linear.

    The authors' (eugenium/layerCNN, 7fa68fe): `auxillary_classifier`, imagenet_refactored/models/vgg.py,
    lines 105 to 147. Ours departs on maps too small for it, which it pads.
    """
    head = build_head(TensorSpec((B, 8, 20, 20), F64), TensorSpec((B, 5), F64), "greedy", depth=2)
    kinds = [type(layer).__name__ for layer in head.net]
    assert kinds == ["Conv2d", "BatchNorm2d", "ReLU"] * 2 + ["_To", "BatchNorm2d", "Flatten", "Linear"]
    assert [tuple(head.net[i].weight.shape) for i in (0, 3)] == [(16, 8, 3, 3), (16, 16, 3, 3)]
    assert [head.net[i].padding for i in (0, 3)] == [(0, 0), (0, 0)]
    seen = []
    head.net[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[2:]))
    for side in (20, 27):  # half of the map that comes
        head(torch.randn(2, 8, side, side, dtype=F64))
    assert seen == [(10, 10), (14, 14)]
    assert head.net[-1].in_features == 64


@pytest.mark.parametrize(
    ("shape", "rows", "steps"), [((4, 6, 6), 6, 3), ((4, 6), 6, 3), ((6, 4), 6, 3), ((6, 4), 3, 1)]
)
def test_predictive_coding_equals_the_formula(shape: tuple[int, ...], rows: int, steps: int) -> None:
    """On a map, a map of one dimension, a sequence and a shorter one; with the negatives as drawn.

    The authors' formulation (loeweX/Greedy_InfoMax, 5710507): `InfoNCE_Loss.forward`,
    GreedyInfoMax/vision/models/InfoNCE_Loss.py, lines 40 to 114; modules are parted in
    `FullVisionModel.forward` (3b27f18, FullModel.py, line 112). Ours departs where there are too few rows for
    a step: it is left out.
    """
    sequence = shape == (6, 4)
    layout = Layout.sequence() if sequence else Layout.image(len(shape) - 1)
    network = PredictiveCoding(TensorSpec((B, *shape), F64), steps=3, negatives=5, layout=layout)
    h = torch.randn(3, *shape, dtype=F64)[:, :rows] if sequence else torch.randn(3, *shape, dtype=F64)
    z = (h.unsqueeze(2) if sequence else h.movedim(1, -1).reshape(3, 6, -1, 4)).tolist()
    columns = len(z[0][0])
    torch.manual_seed(1)
    found = float(network(h).detach())
    torch.manual_seed(1)
    total = []
    for j, mapped in enumerate(network.maps[:steps], start=1):
        w, ahead = mapped.weight.tolist(), j + 1
        below = [z[b][r][c] for b in range(3) for r in range(ahead, rows) for c in range(columns)]
        drawn = torch.randint(len(below), (3, rows - ahead, columns, 5)).tolist()

        def score(a: list[float], b: list[float], w: list[list[float]] = w) -> float:
            return sum(w[m][n] * a[n] * b[m] for m in range(4) for n in range(4))

        logs = []
        for b in range(3):
            for r in range(rows - ahead):
                for c in range(columns):
                    right = math.exp(score(z[b][r + ahead][c], z[b][r][c]))
                    others = [math.exp(score(below[i], z[b][r][c])) for i in drawn[b][r][c]]
                    logs.append(-math.log(right / (right + sum(others)) + 1e-11))
        total.append(sum(logs) / len(logs))
    assert len(total) == steps
    assert found == pytest.approx(sum(total) / steps, abs=1e-10)
    if sequence:
        assert float(network(h[:, :2])) == 0


class Views(nn.Module):
    """Two views of each sample in one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.probe = nn.Linear(100, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        views = torch.cat([x, x.flip(3)]).flatten(1)
        return sum(self.probe(self.encoder(views).relu()).chunk(2))


@pytest.mark.parametrize(("patches", "grid"), [(1, (1, 1)), (3, (1, 3)), (8, (2, 4)), (49, (7, 7))])
def test_patches_are_a_grid_that_holds_them_all(patches: int, grid: tuple[int, int]) -> None:
    assert patch_grid(patches) == grid


def test_gim_reads_no_label_before_the_last_module() -> None:
    """Patches of an image folded into the batch, as published; labels change the last module alone."""

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.probe = nn.Conv2d(1, 6, 3), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            cut = x.unfold(2, 4, 2).unfold(3, 4, 2).movedim(1, 3).flatten(0, 2)
            return self.probe(self.encoder(cut).relu().mean((2, 3)).unflatten(0, (-1, 16)).mean(1))

    x, results = torch.randn(4, 1, 10, 10), []
    for labels in ([0, 1, 2, 0], [2, 2, 1, 0]):
        torch.manual_seed(0)
        program = compiled(Patches(), "gim", ["encoder"], example_inputs=x, seed=0)
        assert next(m for m in program.root.aux.children()).rows == (4, 4)
        program.step(x, torch.tensor(labels))
        results.append(snapshot(program.model))
    assert torch.equal(results[0]["encoder.weight"], results[1]["encoder.weight"])
    assert not torch.equal(results[0]["probe.weight"], results[1]["probe.weight"])
    with pytest.raises(MethodError, match="has 2 rows a sample in the batch"):
        compiled(Views(), "gim", ["encoder"], example_inputs=x)
    with pytest.raises(MethodError, match="no positions"):
        compiled(mlp(), "gim", ["first"], example_inputs=batch()[0])
