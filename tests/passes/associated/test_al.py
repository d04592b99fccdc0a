"""`al`: the training graphs, the formulas folded and with dense decoders, labels of all kinds, refusals.

The authors' formulation (SamYWK/Associated_Learning, ecd05d8, MNIST/models.py): `autoencoders`, lines 6 to
41, `al_loss`, 43 to 70, and `MLP_AL`, 103 to 130, which is decoders="dense". Ours departs in three places: by
default the upper modules of the network decode; the codes of the classes begin equally far apart; and the
label autoencoders may train ahead.
"""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import locc
import locc.testing
from examples.digits import digits, loaders
from locc.errors import MethodError
from support import Ids, Pair, Skip

D = torch.float64


def mlp(inputs=12, d=10, classes=4):
    """The paper's MLP for MNIST, smaller: f_1 | f_2 | top bridge d -> 5d -> d | h_2 | h_1."""
    return nn.Sequential(
        nn.Linear(inputs, d),
        nn.ELU(),
        nn.Linear(d, d),
        nn.ELU(),
        nn.Linear(d, 5 * d),
        nn.Sigmoid(),
        nn.Linear(5 * d, d),
        nn.Sigmoid(),
        nn.Linear(d, d),
        nn.Sigmoid(),
        nn.Linear(d, classes),
    )


SPLITS = ["1", "3", "7", "9"]


def four():
    """Four modules: the fold needs a bridge of its own."""
    return nn.Sequential(
        nn.Linear(12, 10),
        nn.ELU(),
        nn.Linear(10, 8),
        nn.ReLU(inplace=True),
        nn.Linear(8, 7),
        nn.Sigmoid(),
        nn.Linear(7, 4),
        nn.Sigmoid(),
    )


def batch(size=6):
    return torch.randn(size, 12, dtype=D), torch.randint(0, 4, (size,))


def adam(lr=0.01):
    return lambda params: torch.optim.Adam(params, lr=lr)


AFTER = """\
# 4 modules: 1, 3, 9, 10
# phase 'labels', 300 step(s) without data before the first epoch, trains: 10, 9 at a learning rate of 0.08
# phase 'train', 1 pass(es) in each epoch, trains: 1, 3, 9, 10
def step(self, input_1, target):
    # ---- module 0: 1
    layer_0 = self[0](input_1)  # f32[B,10]
    layer_1 = self[1](layer_0)  # f32[B,10]
    aux_bridge_1 = self.aux.bridge_1(layer_1)  # f32[B,10]
    # ---- module 1: 3
    layer_1_at_3 = stop_gradient(layer_1)  # f32[B,10]
    layer_2 = self[2](layer_1_at_3)  # f32[B,10]
    layer_3 = self[3](layer_2)  # f32[B,10]
    layer_4 = self[4](layer_3)  # f32[B,50]
    layer_5 = self[5](layer_4)  # f32[B,50]
    layer_6 = self[6](layer_5)  # f32[B,10]
    layer_7 = self[7](layer_6)  # f32[B,10]
    # ---- module 4: 10, learning rate x2
    t_0 = class_rows(target, 4, 1, 2, torch.float32)  # f32[5,4]
    aux_encoder_10 = self.aux.encoder_10(t_0)  # f32[5,10]
    label = by_label(aux_encoder_10, target, 4, 1, 2)  # f32[B,10]
    layer_10 = self[10](label)  # f32[B,4]
    output_1 = sigmoid(layer_10)  # f32[B,4]
    label_1 = by_label(t_0, target, 4, 1, 2)  # f32[B,4]
    autoencoder = mse_loss(output_1, label_1)  # f32[]
    objective(autoencoder)  # 10.autoencoder
    # ---- module 0: 1
    aux_encoder_10_at_1 = stop_gradient(aux_encoder_10)  # f32[5,10]
    label_4 = by_label(aux_encoder_10_at_1, target, 4, 1, 2)  # f32[B,10]
    associate = mse_loss(aux_bridge_1, label_4)  # f32[]
    objective(associate)  # 1.associated
    # ---- module 3: 9, learning rate x2
    aux_encoder_10_at_9 = stop_gradient(aux_encoder_10)  # f32[5,10]
    aux_encoder_9 = self.aux.encoder_9(aux_encoder_10_at_9)  # f32[5,10]
    label_2 = by_label(aux_encoder_9, target, 4, 1, 2)  # f32[B,10]
    layer_8 = self[8](label_2)  # f32[B,10]
    layer_9 = self[9](layer_8)  # f32[B,10]
    label_3 = by_label(aux_encoder_10_at_9, target, 4, 1, 2)  # f32[B,10]
    autoencoder_1 = mse_loss(layer_9, label_3)  # f32[]
    objective(autoencoder_1)  # 9.autoencoder
    # ---- module 1: 3
    aux_encoder_9_at_3 = stop_gradient(aux_encoder_9)  # f32[5,10]
    label_5 = by_label(aux_encoder_9_at_3, target, 4, 1, 2)  # f32[B,10]
    associate_1 = mse_loss(layer_7, label_5)  # f32[]
    objective(associate_1)  # 3.associated
    return layer_10
"""

DENSE = """\
# 2 modules: 2, output
def step(self, input_1, target):
    # ---- module 0: 2
    layer_0 = self[0](input_1)  # f32[B,10]
    layer_1 = self[1](layer_0)  # f32[B,10]
    layer_2 = self[2](layer_1)  # f32[B,8]
    aux_bridge_2 = self.aux.bridge_2(layer_2)  # f32[B,6]
    # ---- auxiliary: 2.label, learning rate x2
    t_0 = class_rows(target, 4, 1, 2, torch.float32)  # f32[5,4]
    aux_encoder_2 = self.aux.encoder_2(t_0)  # f32[5,6]
    aux_decoder_2 = self.aux.decoder_2(aux_encoder_2)  # f32[5,4]
    output_1 = sigmoid(aux_decoder_2)  # f32[5,4]
    autoencoder = mean_by_label(output_1, t_0, target, 4, 1, 2)  # f32[]
    objective(autoencoder)  # 2.label.autoencoder
    # ---- module 0: 2
    aux_encoder_2_at_2 = stop_gradient(aux_encoder_2)  # f32[5,6]
    label = by_label(aux_encoder_2_at_2, target, 4, 1, 2)  # f32[B,6]
    associate = mse_loss(aux_bridge_2, label)  # f32[]
    objective(associate)  # 2.associated
    # ---- module 1: output
    layer_2_at_output = stop_gradient(layer_2)  # f32[B,8]
    layer_2_at_output_copy = clone(layer_2_at_output)  # f32[B,8]
    layer_3 = self[3](layer_2_at_output_copy)  # f32[B,8]
    layer_4 = self[4](layer_3)  # f32[B,7]
    layer_5 = self[5](layer_4)  # f32[B,7]
    layer_6 = self[6](layer_5)  # f32[B,4]
    layer_7 = self[7](layer_6)  # f32[B,4]
    aux_bridge_output = self.aux.bridge_output(layer_7)  # f32[B,6]
    # ---- auxiliary: output.label, learning rate x2
    aux_encoder_2_at_output_label = stop_gradient(aux_encoder_2)  # f32[5,6]
    aux_encoder_output = self.aux.encoder_output(aux_encoder_2_at_output_label)  # f32[5,6]
    aux_decoder_output = self.aux.decoder_output(aux_encoder_output)  # f32[5,6]
    autoencoder_1 = mean_by_label(aux_decoder_output, aux_encoder_2_at_output_label, target, 4, 1, 2)  # f32[]
    objective(autoencoder_1)  # output.label.autoencoder
    # ---- module 1: output
    aux_encoder_output_at_output = stop_gradient(aux_encoder_output)  # f32[5,6]
    label_1 = by_label(aux_encoder_output_at_output, target, 4, 1, 2)  # f32[B,6]
    associate_1 = mse_loss(aux_bridge_output, label_1)  # f32[]
    objective(associate_1)  # output.associated
    return layer_7
"""


def test_the_training_graph():
    x = batch()[0].float()
    assert str(locc.compile(mlp(), "al", SPLITS, example_inputs=x).ir) == AFTER
    options = {"decoders": "dense", "width": 6, "warmup": 0, "example_inputs": x}
    assert str(locc.compile(four(), "al", ["2"], **options).ir) == DENSE


class Oracle:
    """The formulas, part by part, with one Adam for (f, b) and one at twice the rate for (g, h)."""

    def __init__(self, f, b, g, h, last_sigmoid=True, lr=0.01, label_lr=2.0):
        self.f, self.b, self.g, self.h, self.last_sigmoid = f, b, g, h, last_sigmoid
        both = [(*x.parameters(), *y.parameters()) for x, y in zip((*f, *g), (*b, *h), strict=True)]
        rates = [lr] * len(f) + [label_lr * lr] * len(g)
        self.optimizers = [torch.optim.Adam(p, lr=r) for p, r in zip(both, rates, strict=True)]

    def step(self, x, y):
        s, t = x, F.one_hot(y, 4).to(D)
        losses = {}
        for i, (f, b, g, h) in enumerate(zip(self.f, self.b, self.g, self.h, strict=True)):
            above = t
            encoded = g(above.detach())
            decoded = h(encoded)
            if i == 0 and self.last_sigmoid:
                decoded = torch.sigmoid(decoded)
            losses["ae", i] = (decoded - above.detach()).pow(2).mean()
            activation = f(s.detach())
            losses["a", i] = (b(activation) - encoded.detach()).pow(2).mean()
            s, t = activation, encoded
        for loss in losses.values():
            loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return {k: v.detach() for k, v in losses.items()}

    def predict(self, x):
        for f in self.f:
            x = f(x)
        x = self.b[-1](x)
        for h in reversed(self.h):
            x = h(x)
        return x


def aux(program, name):
    return copy.deepcopy(program.root.get_submodule(f"aux.{name}"))


def check(program, oracle, names, parts):
    for _ in range(3):
        x, y = batch()
        report = program.step(x, y)
        losses = oracle.step(x, y)
        assert set(report.objectives) == set(names.values())
        for key, value in losses.items():
            torch.testing.assert_close(report.objectives[names[key]], value, atol=1e-10, rtol=0)
        torch.testing.assert_close(report.loss, sum(losses.values()).float(), atol=1e-5, rtol=0)
        for path, part in parts.items():
            for (n, p), q in zip(
                program.root.get_submodule(path).named_parameters(), part.parameters(), strict=True
            ):
                torch.testing.assert_close(p, q, atol=1e-10, rtol=0, msg=f"{path}.{n}")
    program.eval()
    with torch.no_grad():
        torch.testing.assert_close(program(x), oracle.predict(x), atol=1e-10, rtol=0)


def test_the_papers_mlp_against_the_formulas():
    model = mlp().to(D)
    program = locc.compile(model, "al", SPLITS, example_inputs=batch()[0], optimizer=adam())
    w = copy.deepcopy(model)
    b1, g1, g2 = aux(program, "bridge_1"), aux(program, "encoder_10"), aux(program, "encoder_9")
    assert [tuple(p.shape) for p in b1.parameters() if p.dim() == 2] == [(50, 10), (10, 50)]
    oracle = Oracle([w[:2], w[2:4]], [b1, w[4:8]], [g1, g2], [w[10:], w[8:10]])
    names = {
        ("ae", 0): "10.autoencoder",
        ("ae", 1): "9.autoencoder",
        ("a", 0): "1.associated",
        ("a", 1): "3.associated",
    }
    check(program, oracle, names, {"model": w, "aux.bridge_1": b1, "aux.encoder_10": g1, "aux.encoder_9": g2})
    # With an odd number of modules the folded network is the model itself, and no bridge is left over.
    x = batch()[0]
    assert torch.equal(program(x), model(x))
    assert not any("aux" in str(n.target) for n in program.ir.inference.nodes)


class CloneFirst(nn.Module):
    """Keeps a first in-place layer from changing its input."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return self.part(x.clone())


def test_an_even_network_gets_a_bridge_that_inference_keeps():
    model = four().to(D)
    program = locc.compile(
        model, "al", ["1", "2", "5"], example_inputs=batch()[0], optimizer=adam(), label_lr=3.0, expansion=2
    )
    w = copy.deepcopy(model)
    b1, b2 = aux(program, "bridge_1"), aux(program, "bridge_2")
    g1, g2 = aux(program, "encoder_6"), aux(program, "encoder_5")
    oracle = Oracle(
        [w[:2], w[2:3]], [b1, b2], [g1, g2], [w[6:], CloneFirst(w[3:6])], last_sigmoid=False, label_lr=3.0
    )
    names = {
        ("ae", 0): "6.autoencoder",
        ("ae", 1): "5.autoencoder",
        ("a", 0): "1.associated",
        ("a", 1): "2.associated",
    }
    check(program, oracle, names, {"model": w, "aux.bridge_1": b1, "aux.bridge_2": b2, "aux.encoder_5": g2})
    x = batch()[0]
    assert not torch.allclose(program(x), model(x))
    kept = [str(n.target) for n in program.ir.inference.nodes if "aux" in str(n.target)]
    assert kept == ["aux.bridge_2"]
    assert not any("target" in n.name for n in program.ir.inference.nodes)


def three():
    return nn.Sequential(nn.Linear(12, 10), nn.ELU(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 4)).to(D)


def test_dense_decoders_against_the_formulas():
    """The authors' form: every module encodes, and what decodes is added and kept."""
    model = three()
    program = locc.compile(
        model, "al", ["1", "3"], example_inputs=batch()[0], optimizer=adam(), decoders="dense", width=6
    )
    w, modules = copy.deepcopy(model), ("1", "3", "4")
    b, g, h = ([aux(program, f"{kind}_{m}") for m in modules] for kind in ("bridge", "encoder", "decoder"))
    assert [tuple(p.shape) for p in b[0].parameters() if p.dim() == 2] == [(30, 10), (6, 30)]
    oracle = Oracle([w[:2], w[2:4], w[4:]], b, g, h)
    names = {("a", i): f"{m}.associated" for i, m in enumerate(modules)}
    names |= {("ae", i): f"{m}.label.autoencoder" for i, m in enumerate(modules)}
    parts = {f"aux.{kind}_{m}": part for kind, found in (("bridge", b), ("encoder", g), ("decoder", h))
             for m, part in zip(modules, found, strict=True)}  # fmt: skip
    check(program, oracle, names, {"model": w, **parts})
    rates = {name: o.param_groups[0]["lr"] for name, o in program.optimizers.items()}
    assert rates == dict.fromkeys(modules, 0.01) | {f"{m}.label": 0.02 for m in modules}


def tokens():
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).to(D)


class Pixels(nn.Module):
    """Scores [B,4,3,3] of the pixels of an image."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 6, 3, padding=1, dtype=D), nn.Conv2d(6, 4, 1, dtype=D)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


LABELLED = {
    "samples": (three, ["1", "3"], (7, 12), (7,)),
    "tokens": (tokens, ["1", "3"], (3, 5, 3), (3, 5)),
    "pixels": (Pixels, ["a"], (3, 2, 3, 3), (3, 3, 3)),
}


@pytest.mark.parametrize("decoders", ["own", "dense"])
@pytest.mark.parametrize("what", LABELLED)
def test_codes_of_classes_train_as_those_of_a_batch(what, decoders):
    """A target that is vectors has its rows encoded one by one; class ids, once for each class."""
    make, splits, shape, of = LABELLED[what]
    x, y = torch.randn(shape, dtype=D), torch.randint(0, 4, of)
    y.view(-1)[0] = -100  # no label
    vectors = torch.where((y >= 0)[..., None], F.one_hot(y.clamp(min=0), 4).to(D), 0.0)
    vectors = vectors.movedim(-1, 1) if what == "pixels" else vectors
    first = make()
    programs = [
        locc.compile(
            model, "al", splits, example_inputs=x, optimizer=adam(), seed=0, decoders=decoders, width=6
        )
        for model in (first, copy.deepcopy(first))
    ]
    for _ in range(3):
        reports = [p.step(x, t) for p, t in zip(programs, (y, vectors), strict=True)]
        for name, value in reports[0].objectives.items():
            torch.testing.assert_close(value, reports[1].objectives[name], atol=1e-10, rtol=0)
    for p, q in zip(*(program.root.parameters() for program in programs), strict=True):
        torch.testing.assert_close(p, q, atol=1e-10, rtol=0)
    assert programs[0](x).shape == first(x).shape
    crossing = [f.spec for f in programs[0].certificate.flows if f.kind == "target"]
    classes = what != "pixels" or decoders == "dense"
    assert crossing
    assert all(spec.startswith("f64[5,") == classes for spec in crossing)


@pytest.mark.parametrize("model", ["residual", "recurrent"])
def test_dense_decoders_stand_beside_any_network(model, tmp_path):
    """Also where several values cross, and the form keeps what a program has to."""
    locc.testing.assert_conforms(
        locc.method("al", decoders="dense", width=8),
        {model: locc.testing.CONFORMANCE_MODELS[model]},
        ["the plan computes what the graph means", "a pipeline trains the same", "inference is the model"],
    )


@pytest.mark.parametrize("decoders", ["own", "dense"])
def test_backpropagation_trains_the_network_that_inference_keeps(decoders):
    """The baseline with as many parameters."""
    model, (x, y) = three(), batch()
    program = locc.compile(model, "al", ["1"], example_inputs=x, decoders=decoders, width=6, verify=False)
    network, plain = copy.deepcopy(program.network), copy.deepcopy(program.network)
    assert torch.equal(network(x), program(x))
    kept = {str(n.target).partition(".")[2] for n in program.ir.inference.nodes if "aux" in str(n.target)}
    assert {n for n, _ in network.graph.aux.named_children()} == kept
    matched = locc.compile(
        network, "bp", example_inputs=x, optimizer=lambda ps: torch.optim.SGD(ps, 0.1), verify=False
    )
    matched.step(x, y)
    F.cross_entropy(plain(x), y).backward()
    for p, q in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q - 0.1 * q.grad, atol=1e-12, rtol=0)
    with torch.no_grad():
        assert not torch.equal(network(x), program(x))  # a copy: the program's own stay


def test_batch_norm_learns_its_statistics_on_the_label_stream():
    model = nn.Sequential(
        nn.Linear(12, 8), nn.Sigmoid(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)
    ).to(D)
    program = locc.compile(model, "al", ["1"], example_inputs=batch()[0])
    x, y = batch()
    w = copy.deepcopy(model)
    encoder = aux(program, "encoder_output")
    program.step(x, y)
    w[2:](encoder(F.one_hot(y, 4).to(D)))
    torch.testing.assert_close(model[3].running_mean, w[3].running_mean, atol=1e-12, rtol=0)
    assert int(model[3].num_batches_tracked) == 1


class Structured(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, x):
        return {"logits": self.b(torch.relu(self.a(x)))}


def test_the_users_structure_comes_back():
    program = locc.compile(Structured(), "al", ["a"], example_inputs=torch.randn(5, 12))
    found = program(torch.randn(3, 12))
    assert list(found) == ["logits"]
    assert found["logits"].shape == (3, 4)


def test_factories_and_their_shapes_are_checked():
    def linear(source, target):
        return nn.Linear(source.features[-1], target.features[-1])

    program = locc.compile(
        Structured(), "al", ["a"], example_inputs=torch.randn(5, 12), bridge=linear, encoder=linear
    )
    assert isinstance(program.root.get_submodule("aux.bridge_a"), nn.Linear)
    program.step(torch.randn(5, 12), torch.randint(0, 4, (5,)))
    with pytest.raises(MethodError, match="bridge of module 'a'"):
        locc.compile(
            Structured(), "al", ["a"], example_inputs=torch.randn(5, 12), bridge=lambda s, t: nn.Linear(8, 5)
        )


class Peeks(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(12, 5), nn.Linear(17, 4)

    def forward(self, x):
        return self.out(torch.cat([self.a(x), x], 1))


class Number(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(12, 5), nn.Linear(5, 4)

    def forward(self, x):
        return self.out(self.a(x)).sum(1)


REFUSED = {
    "one module": (mlp, (), "at least 2 modules"),
    "a skip": (lambda: Skip(12, 4), ("a", "b"), "skips from module 'a' to 'out'"),
    "two values": (lambda: Pair(12), ("cell",), "2 values pass from module 'cell' to 'out'"),
    "a late input": (Peeks, ("a",), "module 'out' of the upper half reads the input"),
    "integers": (lambda: Ids(12), (), "which is no activation"),
    "no class scores": (Number, ("a",), r"it must be class scores \[B,C\] or \[B,T,C\]"),
    "a softmax": (
        lambda: nn.Sequential(nn.Linear(12, 5), nn.Linear(5, 4), nn.Softmax(1)),
        ("0",),
        "in a softmax",
    ),
}


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.second(torch.tanh(self.first(x)))


def residual():
    return nn.Sequential(nn.Linear(12, 8), Residual(), Residual(), nn.Linear(8, 4))


@pytest.mark.parametrize("splits", [["1.first"], ["1.first", "1.second", "2.first"]])
def test_a_refusal_names_cuts_that_would_do(splits):
    x = torch.randn(5, 12)
    with pytest.raises(MethodError, match="a single value crosses after '0', '1', '2'"):
        locc.compile(residual(), "al", splits, example_inputs=x)
    for offered in (["0", "1", "2"], ["0"], ["1"], ["2"]):
        locc.compile(residual(), "al", offered, example_inputs=x, verify=False)


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    make, splits, message = REFUSED[name]
    with pytest.raises(MethodError, match="undefined on this model.*" + message):
        locc.compile(make(), "al", splits, example_inputs=torch.randn(5, 12))


@pytest.mark.parametrize(
    ("model", "splits", "what"),
    [
        (mlp, SPLITS, None),
        (lambda: nn.Sequential(nn.Linear(12, 8), nn.ELU(), *mlp(8, 8)[:3], nn.ReLU(), nn.Linear(8, 4)),
         ["1", "3", "5"], "module '5' has to decode a code of the label by a ReLU"),
        (lambda: nn.Sequential(nn.Unflatten(1, (1, 3, 4)), nn.Conv2d(1, 2, 1), nn.Flatten(),
                               nn.Linear(24, 4)), ["1"], None),
        (lambda: nn.Sequential(nn.Unflatten(1, (3, 4)), nn.Linear(4, 2), nn.Linear(2, 5)),
         ["1"], r"module '2' decodes codes of labels at each position, f32\[B,3,2\]"),
    ],
)  # fmt: skip
def test_it_says_where_the_upper_modules_are_bad_decoders(model, splits, what):
    found = {
        decoders: locc.compile(
            model(), "al", splits, example_inputs=torch.randn(5, 12), decoders=decoders, verify=False
        ).built.advice
        for decoders in ("own", "dense")
    }
    assert found["dense"] == ()
    assert len(found["own"]) == (what is not None)
    if what is not None:
        assert re.match(what, found["own"][0])


def test_it_says_where_the_loss_reads_scores_as_numbers():
    def advice(model, loss):
        program = locc.compile(model, "al", SPLITS, loss=loss, example_inputs=torch.randn(5, 12))
        return program.built.advice

    bounded = nn.Sequential(*mlp(), nn.Sigmoid())
    assert not any("sigmoid" in text for text in (*advice(mlp(), "bce"), *advice(bounded, "mse")))
    assert any("end the model in nn.Sigmoid" in text for text in advice(mlp(), "mse"))


def test_options_are_checked():
    wrong = {"label_lr": 0, "warmup": -1, "width": 0, "decoders": "sparse"}
    for name, value in wrong.items():
        with pytest.raises(MethodError, match=f"{name}={value!r}"):
            locc.compile(mlp(), "al", SPLITS, **{name: value})


class Block(nn.Module):
    def __init__(self, inner, outer, stride):
        super().__init__()
        self.conv = nn.Conv2d(inner, outer, 3, stride, 1)
        self.norm, self.skip = nn.BatchNorm2d(outer), nn.Conv2d(inner, outer, 1, stride)

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x)) + self.skip(x))


@pytest.mark.parametrize("splits", [("1",), ("0", "1")])
def test_a_residual_network_folds_on_maps(splits):
    torch.manual_seed(0)
    blocks = (Block(1, 8, 2), Block(8, 8, 1), Block(8, 16, 1))
    model = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(256, 10))
    train, validation = loaders(batch_size=32)
    program = locc.compile(
        model, "al", splits, example_inputs=digits().train_x[:4], optimizer=adam(0.005), seed=0, expansion=1
    )
    assert program.certificate.verdict == "strictly modular"
    program.fit(train, epochs=5, progress=False)
    assert program.evaluate(validation).accuracy > 0.8


def test_labels_of_tokens_are_encoded_token_by_token():
    model = nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6), nn.Linear(6, 7))
    x = torch.randint(0, 7, (16, 5))
    program = locc.compile(model, "al", ["0", "2", "3"], example_inputs=x, optimizer=adam(0.02), seed=0)
    for _ in range(150):
        program.step(x, (x + 1) % 7)
    program.eval()
    assert (program(x).argmax(-1) == (x + 1) % 7).double().mean() > 0.6  # 0.14 is chance


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, 8), nn.Linear(8, 4)
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x):
        return self.b(torch.relu(self.a(x))) * self.scale


def test_the_folded_path_reads_the_buffers_of_a_moved_program():
    program = locc.compile(Scaled(), "al", ["a"], example_inputs=torch.randn(5, 12))
    x = torch.randn(3, 12)
    assert program(x).abs().max() > 0
    program._apply(torch.clone)  # as a move to another device does
    program.model.scale.zero_()
    assert program(x).abs().max() == 0
