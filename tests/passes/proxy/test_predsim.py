"""`predsim`, `sim` and `pred`: the printed program, the formulas, dropout, and targets of all kinds.

The authors' formulation (anokland/local-loss, 7b3b40b, train.py): a block's losses and its step are
`LocalLossBlockLinear.forward`, lines 552 to 646, and `LocalLossBlockConv.forward`, lines 761 to 882; S is
`similarity_matrix`, lines 1409 to 1420; the pooling of pred is in lines 682 to 700. Ours departs in places: S
divides by the norm itself, not by norm + 1e-8; a last window that is not whole is averaged over what it
covers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import locc
from support import batch, close, mlp, sgd
from zoo import find

AFTER = """\
# 2 modules: drop, output
def step(self, input_1, target):
    # ---- module 0: drop
    first = self.first(input_1)  # f32[B,8]
    relu1 = self.relu1(first)  # f32[B,8]
    drop = self.drop(relu1)  # f32[B,8]
    aux_drop_sim_relu1 = self.aux.drop_sim_relu1(relu1)  # f32[B,8]
    aux_drop_head_relu1 = self.aux.drop_head_relu1(relu1)  # f32[B,3]
    sim_loss = similarity_loss(aux_drop_sim_relu1, target)  # f32[]
    head_loss = cross_entropy(aux_drop_head_relu1, target)  # f32[]
    weighted = sim_loss * 0.99  # f32[]
    weighted_1 = head_loss * 0.01  # f32[]
    chain = weighted + weighted_1  # f32[]
    objective(chain)  # drop.predsim
    # ---- module 1: output
    drop_at_output = stop_gradient(drop)  # f32[B,8]
    second = self.second(drop_at_output)  # f32[B,8]
    relu2 = self.relu2(second)  # f32[B,8]
    third = self.third(relu2)  # f32[B,3]
    loss = cross_entropy(third, target)  # f32[]
    weighted_2 = loss * 0.01  # f32[]
    objective(weighted_2)  # output.loss
    return third
"""


def test_the_printed_graph() -> None:
    assert str(locc.compile(mlp(0.5), "predsim", ["drop"], example_inputs=batch()[0]).ir) == AFTER


class Block(nn.Module):
    """Convolution, batch norm, activation, dropout; the form of the published networks."""

    def __init__(self, n: int, m: int, p: float) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(n, m, 3, padding=1), nn.BatchNorm2d(m), nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(F.leaky_relu(self.norm(self.conv(x)), 0.01))


def published(p: float, classes: int = 3, width: int = 5) -> nn.Sequential:
    out = nn.Sequential(nn.Flatten(), nn.Linear(width * 64, classes))
    return nn.Sequential(Block(1, width, p), Block(width, width, p), out)


def spread(v: Tensor) -> Tensor:
    """S(v), written from the paper: channel std over space, centre each sample, normalise, Gram, clamp."""
    if v.dim() == 4:
        v = v.flatten(2).std(dim=2)
    v = v - v.mean(dim=1, keepdim=True)
    v = v / v.norm(dim=1, keepdim=True).clamp_min(1e-8)
    return (v @ v.T).clamp(-1, 1)


def local_errors(program: locc.Program, index: int, h: Tensor, y: Tensor, c: int) -> tuple[Tensor, Tensor]:
    sim = [m for n, m in program.root.aux.items() if "_sim_" in n]
    pred = [m for n, m in program.root.aux.items() if "_head_" in n]
    zero = torch.zeros((), dtype=h.dtype)
    s = zero
    if sim:
        z = F.conv2d(h, sim[index].map.weight, padding=1)
        s = ((spread(z) - spread(F.one_hot(y, c).to(h))) ** 2).mean()
    if not pred:
        return s, zero
    layer, kernel = pred[index].linear, pred[index].pool.pool.kernel_size
    return s, F.cross_entropy(F.linear(F.avg_pool2d(h, kernel).flatten(1), layer.weight, layer.bias), y)


def mine(program: locc.Program, k: int, kind: str) -> nn.Module:
    (found,) = (m for n, m in program.root.aux.items() if n.startswith(f"{k}_{kind}"))
    return found


def variant(program: locc.Program, k: int, x: Tensor, h: Tensor, y: Tensor, options: Any) -> list[Tensor]:
    """The two losses, and a last scalar that holds what feedback alignment adds to their gradient."""
    hot, beta, alpha = F.one_hot(y, 3).to(h), options.get("beta", 0.99), options.get("alpha", 0.0)
    if not options.get("bio"):
        z = F.conv2d(h, mine(program, k, "sim").map.weight, padding=1)
        sim, pred = local_errors(program, k, h, y, 3)
        read = x if k else x.flatten(1)  # an image of one channel is compared as a vector
        unsup = ((spread(z) - spread(read)) ** 2).mean()
        if options["loss_unsup"] == "recon":
            unsup = torch.zeros(())
            if k:
                decoder = mine(program, k, "unsupervised").map
                unsup = F.mse_loss(F.relu(decoder(h)), x)
        return [alpha * unsup, (1 - alpha) * (beta * sim + (1 - beta) * pred), torch.zeros(())]
    projected, head = hot @ mine(program, k, "projection").weight.T, mine(program, k, "signs")
    assert projected.shape == (8, options.get("target_proj_size", 128))
    beta = options.get("beta", 0.01)
    pooled = F.avg_pool2d(h, head.pool.pool.kernel_size).flatten(1)
    scores = F.linear(pooled.detach(), head.linear.weight, head.linear.bias)
    signs = (projected > 0).double()
    pred = (1 - beta) * F.binary_cross_entropy_with_logits(scores, signs)
    error = (1 - beta) * (scores.sigmoid() - signs).detach() / scores.numel()
    through = (pooled * (error @ head.feedback)).sum()
    averaged = F.avg_pool2d(h, head.pool.pool.kernel_size)
    return [beta * ((spread(averaged) - spread(projected)) ** 2).mean(), pred, through - through.detach()]


def by_the_formulas(
    program: locc.Program, model: nn.Module, x: Tensor, y: Tensor, loss_of: Callable[..., Tensor]
) -> None:
    """Every block in three steps: its loss on h, its own step, the old output passed on."""
    oracle, twin = copy.deepcopy(program), copy.deepcopy(model)
    for _ in range(3):
        report, h = program.step(x, y), x
        for k, part in enumerate(twin):
            out = part(h.detach())
            loss = loss_of(oracle, k, h.detach(), out)
            found = sum(v for name, v in report.objectives.items() if name.startswith(f"{k}."))
            torch.testing.assert_close(found, loss, atol=1e-10, rtol=0)
            heads = [m for n, m in oracle.root.aux.items() if n.startswith(f"{k}_")]
            parameters = [p for m in (part, *heads) for p in m.parameters()]
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for p, g in zip(parameters, gradients, strict=True):
                    p -= 0.5 * g
            h = out
    close(model, twin)
    close(program.root.aux, oracle.root.aux)


@pytest.mark.parametrize(
    "options",
    [
        {"bio": True, "dim_in_decoder": 90},
        {"bio": True, "beta": 0.5, "target_proj_size": 16, "dim_in_decoder": 90},
        {"loss_unsup": "sim", "alpha": 0.3},
        {"loss_unsup": "recon", "alpha": 0.3},
    ],
    ids=lambda options: "-".join(map(str, options)),
)
def test_three_steps_of_the_variants_equal_the_formulas(options: dict[str, Any]) -> None:
    model = published(0.0).double()
    x, y = torch.randn(8, 1, 8, 8, dtype=torch.float64), torch.randint(3, (8,))
    program = locc.compile(model, "predsim", ["0", "1"], example_inputs=x, optimizer=sgd(0.5), **options)
    weight = 1 - options.get("beta", 0.01 if "bio" in options else 0.99)

    def loss_of(oracle: locc.Program, k: int, h: Tensor, out: Tensor) -> Any:
        if k == 2:
            return weight * F.cross_entropy(out, y)
        return sum(variant(oracle, k, h, out, y, options))

    by_the_formulas(program, model, x, y, loss_of)


@pytest.mark.parametrize("method", ["predsim", "sim", "pred"])
def test_three_steps_equal_the_formulas(method: str) -> None:
    """The output's CE x0.01 in predsim."""
    beta, weight = {"predsim": (0.99, 0.01), "sim": (1.0, 1.0), "pred": (0.0, 1.0)}[method]
    model = published(0.0).double()
    x, y = torch.randn(8, 1, 8, 8, dtype=torch.float64), torch.randint(3, (8,))
    options: dict[str, Any] = {} if method == "sim" else {"dim_in_decoder": 90}  # pooled to 5 x 4 x 4
    program = locc.compile(model, method, ["0", "1"], example_inputs=x, optimizer=sgd(0.5), **options)

    def loss_of(oracle: locc.Program, k: int, h: Tensor, out: Tensor) -> Tensor:
        if k == 2:
            return weight * F.cross_entropy(out, y)
        sim, pred = local_errors(oracle, k, out, y, 3)
        return beta * sim + (1 - beta) * pred

    by_the_formulas(program, model, x, y, loss_of)


# ---- dropout ---------------------------------------------------------------------------------


class Functional(nn.Module):
    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.a, self.b, self.inplace = nn.Linear(4, 6), nn.Linear(6, 3), inplace

    def forward(self, x: Tensor) -> Tensor:
        return self.b(locc.split(F.dropout(self.a(x), 0.5, self.training, self.inplace), "cut"))


def leaf(inplace: bool) -> nn.Sequential:
    return nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5, inplace=inplace)), nn.Linear(6, 3))


def nested() -> nn.Sequential:
    inside = nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.Identity(), nn.AlphaDropout(0.5)))
    return nn.Sequential(inside, nn.Linear(6, 3))


def visible() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3))


ENDINGS: dict[str, tuple[Any, str]] = {
    "leaf": (lambda: leaf(False), "0"),
    "leaf in place": (lambda: leaf(True), "0"),
    "nested": (nested, "0"),
    "functional": (lambda: Functional(False), "cut"),
    "functional in place": (lambda: Functional(True), "cut"),
    "visible": (visible, "1"),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_losses_read_h_before_dropout_and_the_next_module_after_it(name: str) -> None:
    build, split = ENDINGS[name]
    x, y = batch(8)
    program = locc.compile(build(), "predsim", [split], example_inputs=x, optimizer=sgd(), seed=3)
    linear = next(m for m in program.model.modules() if isinstance(m, nn.Linear))
    heads: list[Tensor] = []
    passed: list[Tensor] = []
    for head in program.root.aux.values():
        head.register_forward_pre_hook(lambda _, args: heads.append(args[0].detach().clone()))
    last = [m for m in program.model.modules() if isinstance(m, nn.Linear)][-1]
    last.register_forward_pre_hook(lambda _, args: passed.append(args[0].detach().clone()))
    wanted = linear(x).detach()
    program.step(x, y)
    assert heads
    for h in heads:
        assert torch.equal(h, wanted)
    assert not torch.equal(passed[0], wanted)
    kept = passed[0] / wanted
    if name != "nested":  # alpha dropout is affine
        assert torch.isclose(kept, torch.full_like(kept, 2.0)).logical_or(kept == 0).all()


def test_dropout_that_does_not_end_the_module_stays_in_h() -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.drop, self.b = nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.drop(self.a(x)))

    program = locc.compile(nn.Sequential(Inside(), nn.Linear(6, 3)), "sim", ["0"], example_inputs=batch()[0])
    (head,) = program.ir.nodes("0", "sim_head")
    (read,) = head.all_input_nodes
    assert read.target == "model.0.b"


def test_undropped_false_reads_what_is_sent_and_opens_nothing() -> None:
    program = locc.compile(leaf(False), "sim", ["0"], example_inputs=batch()[0], undropped=False)
    called = [n.target for n in program.ir.nodes("0") if n.op == "call_module"]
    assert called[0] == "model.0"


def test_k1_is_not_weighted_and_other_weights_are_an_option() -> None:
    x, y = batch()
    report = locc.compile(mlp(), "predsim", example_inputs=x).step(x, y)
    assert list(report.objectives.values()) == [report.loss]
    for options, factor in (({}, 0.01), ({"output_weight": 0.5}, 0.5), ({"beta": 0.5}, 0.5)):
        report = locc.compile(mlp(), "predsim", ["first"], example_inputs=x, **options).step(x, y)
        torch.testing.assert_close(report.objectives["output.loss"], factor * report.loss)


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 1.5},
        {"output_weight": 0},
        {"dim_in_decoder": 0},
        {"loss_unsup": "simm"},
        {"alpha": 1.0},
        {"bio": True, "local_loss": "mse"},
    ],
)
def test_unusable_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(locc.MethodError, match=rf"method .predsim.: {next(iter(options))}="):
        locc.compile(mlp(), "predsim", ["first"], **options)


def test_options_of_the_presets() -> None:
    known = {name: set(info.options) for name, info in locc.methods().items()}
    shared = {"output_weight", "undropped", "layout", "zero_output", "loss_unsup", "alpha"}
    heads = {"dim_in_decoder", "local_loss", "pred_head", "positions", "rank"}
    bio = {"bio", "target_proj_size"}
    own = {"beta", "sim_head"} | heads
    assert known["predsim"] == shared | bio | own
    assert known["sim"] == shared | bio | {"sim_head"}
    assert known["pred"] == shared | heads


def test_averaged_maps_may_vary_in_size() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 600, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(600, 3)
    )
    x = torch.randn(4, 1, 10, 9)
    program = locc.compile(net, "sim", ["1"], example_inputs=x, dynamic="auto", bio=True)
    (sent,) = program.ir.nodes("1", "sim_head")
    for probe, (height, width) in enumerate(((10, 9), (5, 4))):  # the second as capture tries them
        x = torch.randn(4, 1, height, width)
        found = next(iter(program.root.aux.values()))(net[1](net[0](x)))
        assert tuple(found.shape) == sent.meta["spec"].concrete(4, probe)
    assert program.step(torch.randn(4, 1, 6, 13), torch.tensor([0, 1, 2, 0])).objectives["1.sim"] > 0


# ---- targets and outputs ---------------------------------------------------------------------


def sims(program: locc.Program, x: Any, y: Any) -> Tensor:
    return next(iter(program.step(x, y).objectives.values()))


def test_vectors_as_targets_are_compared_as_they_are() -> None:
    x, y = batch(6, torch.float64)[0], torch.randn(6, 3, dtype=torch.float64)
    program = locc.compile(mlp().double(), "sim", ["first"], loss="mse", example_inputs=x)
    head = copy.deepcopy(next(iter(program.root.aux.values())))
    z = F.linear(program.model.first(x), head.map.weight)
    wanted = ((spread(z) - spread(y)) ** 2).mean()
    torch.testing.assert_close(sims(program, x, y), wanted, atol=1e-12, rtol=0)


def test_many_hot_integers_are_vectors() -> None:
    x = batch(6)[0]
    y = torch.randint(2, (6, 3))
    programs = [locc.compile(mlp(), "sim", ["first"], loss="bce", example_inputs=x, seed=1) for _ in range(2)]
    programs[1].root.load_state_dict(programs[0].root.state_dict())
    assert sims(programs[0], x, y) == sims(programs[1], x, y.float())


@pytest.mark.parametrize("y", [torch.randn(5), torch.randn(5, 2), torch.zeros(5, 1, 1, dtype=torch.long)])
def test_a_target_without_classes_is_an_error(y: Tensor) -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return output.square().mean() + 0 * target.sum()

    program = locc.compile(mlp(), "sim", ["first"], loss=loss, example_inputs=batch()[0])
    with pytest.raises(locc.RunError, match=r"'sim' needs class ids \[B\] or numbers \[B,3\] as target"):
        program.step(batch()[0], y)
    with pytest.raises(locc.RunError, match="found dict"):
        locc.compile(mlp(), "sim", ["first"], loss=lambda o, t: o.mean(), example_inputs=batch()[0]).step(
            batch()[0], {"y": y}
        )


def test_a_single_output_has_no_similarities() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    for method in ("sim", "predsim"):
        with pytest.raises(
            locc.MethodError, match=r"module '0': the output f32\[B,1\] has a single value a sample"
        ):
            locc.compile(model, method, ["0"], loss="mse", example_inputs=batch()[0])
    program = locc.compile(model, "pred", ["0"], loss="mse", example_inputs=batch()[0])
    assert sims(program, batch()[0], torch.randn(5, 1)).isfinite()


def test_pixels_have_no_similarities_and_pred_takes_them() -> None:
    case = find("unet")
    x, splits = case.inputs(), list(case.splits[0])
    with pytest.raises(locc.MethodError, match=r"label.* per position is defined for sequences"):
        locc.compile(case.build(), "predsim", splits, loss=case.loss, example_inputs=x)
    program = locc.compile(case.build(), "pred", splits, loss=case.loss, example_inputs=x)
    assert sims(program, x, case.target(4)).isfinite()


class Tokens(nn.Module):
    """A token-level model whose output comes in one of four forms; its boundary is [B,T,D] or [T,B,D]."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.embed, self.mid, self.head, self.form = (
            nn.Embedding(9, 6),
            nn.Linear(6, 6),
            nn.Linear(6, 4),
            form,
        )

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens.t() if self.form == "tbc" else tokens)
        out = self.head(torch.tanh(self.mid(h)))
        if self.form == "folded":
            return out.flatten(0, 1)
        return out.transpose(1, 2) if self.form == "bct" else out


@pytest.mark.parametrize("form", ["btc", "bct", "tbc", "folded"])
@pytest.mark.parametrize("vectors", [False, True])
def test_each_token_is_a_sample(form: str, vectors: bool) -> None:
    tokens, ids = torch.randint(9, (5, 7)), torch.randint(4, (5, 7))
    ids[0, 2] = ids[3, 3] = -100
    if vectors:
        ids.clamp_min_(0)
    model = Tokens(form).double()
    y = {"tbc": ids.t(), "folded": ids.flatten()}.get(form, ids)
    if vectors:
        y = F.one_hot(y, 4).double()
        y = y.transpose(1, 2) if form == "bct" else y

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return output.square().mean()

    program = locc.compile(model, "sim", ["embed"], loss=loss, example_inputs=tokens)
    weight = copy.deepcopy(next(iter(program.root.aux.values()))).map.weight
    keep = (ids >= 0).flatten()
    z = F.linear(model.embed(tokens), weight).flatten(0, 1)[keep]
    wanted = ((spread(z) - spread(F.one_hot(ids.flatten()[keep], 4).double())) ** 2).mean()
    torch.testing.assert_close(sims(program, tokens, y), wanted, atol=1e-10, rtol=0)


def test_several_samples_rows_in_a_flat_boundary() -> None:
    """A boundary [T*B,D] under an output [B,C]: the std over the rows of a sample, as for any sequence."""

    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.a(x.flatten(0, 1)))
            return self.b(h).unflatten(0, (-1, 5)).mean(1)

    x, y = torch.randn(6, 5, 4, dtype=torch.float64), torch.randint(3, (6,))
    model = Folded().double()
    program = locc.compile(model, "sim", ["a"], example_inputs=x)
    weight = copy.deepcopy(next(iter(program.root.aux.values()))).map.weight
    h = model.a(x.flatten(0, 1))
    h = torch.relu(h) if "relu" in str(program.ir).split("sim_loss")[0] else h
    z = F.linear(h, weight).unflatten(0, (6, 5)).movedim(-1, 1)[..., None]
    wanted = ((spread(z) - spread(F.one_hot(y, 3).double())) ** 2).mean()
    torch.testing.assert_close(sims(program, x, y), wanted, atol=1e-10, rtol=0)


def test_factories_replace_the_heads() -> None:
    asked: list[str] = []

    def factory(kind: str, boundary: Any, output: Any) -> nn.Module:
        asked.append(f"{kind} {boundary} {output}")
        return nn.Linear(8, 12 if kind == "sim" else 3)

    program = locc.compile(
        mlp(), "predsim", ["first"], example_inputs=batch()[0],
        sim_head=partial(factory, "sim"), pred_head=partial(factory, "pred"),
    )  # fmt: skip
    assert asked == ["sim f32[B,8] f32[B,3]", "pred f32[B,8] f32[B,3]"]
    program.step(*batch())
