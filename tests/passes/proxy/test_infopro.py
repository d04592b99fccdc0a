"""`infopro`: its auxiliaries against the authors' numbers, a step against the formulas, its weights.

The authors' formulation (blackfeather-wang/InfoPro-Pytorch, f4e91f0, Experiments on
CIFAR-SVHN-STL10/networks): the step and the weights are `InfoProResNet.forward` (resnet.py, lines 197 to
245), R is `Decoder` (auxiliary_nets.py, lines 7 to 36) and the contrast `SupConLoss.forward` (losses.py,
lines 21 to 99). Ours departs where nobody says how the input was normalised: R is then the mean square
distance to it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import locc
from locc.errors import MethodError
from locc.ir import BatchDim, TensorSpec
from locc.nn import build_decoder, build_head, supervised_contrast
from locc_passes.proxy.infopro import ImageLoss
from locc_passes.proxy.terms import between
from support import compiled, drawn, sgd

GOLDEN = Path(__file__).parents[4] / "shared" / "golden" / "infopro.npz"
B = BatchDim()


def spec(*features: int) -> TensorSpec:
    return TensorSpec((B, *features), torch.float64)


@pytest.mark.skipif(not GOLDEN.exists(), reason="needs the authors' numbers")
@pytest.mark.parametrize("part", ["decoder", "contrast", "softmax"])
def test_the_auxiliaries_equal_the_authors(part: str) -> None:
    """`blackfeather-wang/InfoPro-Pytorch`, networks/{auxiliary_nets,losses}.py: loss and every gradient."""
    data = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN).items()}
    h = data["h"].clone().requires_grad_()
    if part == "decoder":
        network = build_decoder(spec(16, 6, 6), spec(3, 12, 12), width=6)
        names = {f"net.{i}": f"decoder.{i}" for i in (0, 1, 3)}
    else:
        out = spec(16) if part == "contrast" else spec(10)
        network = build_head(spec(16, 6, 6), out, "infopro", hidden=4, channels=8, stride=2)
        names = {f"net.{i}": f"head.{j}" for i, j in ((0, 0), (1, 1), (5, 5), (7, 7))}
    pairs = {
        f"{name}.{kind}": f"{part}.{theirs}.{kind}"
        for name, theirs in names.items()
        for kind in ("weight", "bias")
        if f"{part}.{theirs}.{kind}" in data
    }
    assert set(dict(network.named_parameters())) == set(pairs)
    network.load_state_dict({ours: data[theirs] for ours, theirs in pairs.items()}, strict=False)
    result = network(h)
    if part == "decoder":
        loss = ImageLoss(0.0, 1.0)(result, data["image"])
    elif part == "contrast":
        loss = supervised_contrast(result, data["labels"])
    else:
        loss = F.cross_entropy(result, data["labels"])
    loss.backward()
    exact = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(loss.detach(), data[f"{part}.loss"], **exact)
    assert h.grad is not None
    torch.testing.assert_close(h.grad, data[f"{part}.grad.h"], **exact)
    for name, parameter in network.named_parameters():
        wanted = data[pairs[name].replace(f"{part}.", f"{part}.grad.", 1)]
        torch.testing.assert_close(parameter.grad, wanted, **exact)


def images() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.Sequential(nn.Flatten(), nn.Linear(54, 3)),
    ]
    return (
        nn.Sequential(*layers).double(),
        torch.randn(5, 3, 8, 8, dtype=torch.float64),
        torch.randint(3, (5,)),
    )


def sequences() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)]
    x = torch.randn(5, 8, 4, dtype=torch.float64)
    return nn.Sequential(*layers).double(), x, torch.randint(3, (5, 8))


@pytest.mark.parametrize(
    "options", [{"task": "softmax"}, {"task": "contrast"}, {"positions": 0.5}, {"positions": 0.5, "rank": 2}]
)
def test_a_step_equals_the_formulas(options: dict[str, Any]) -> None:
    """Module k descends lambda1 BCE(decoder(h_k), x std + mean) + lambda2 T; the last the loss alone.

    T reads h_k, or a part of its positions.
    """
    share, task = options.get("positions"), options.get("task", "softmax")
    model, x, y = sequences() if share else images()
    mean, std = (0.5, 0.2) if share else ((0.5, 0.4, 0.6), (0.2, 0.25, 0.3))
    shift, scale = (torch.tensor(v, dtype=x.dtype).view(-1, 1, 1) for v in (mean, std))
    x = (torch.rand_like(x) - shift) / scale
    program = locc.compile(
        model,
        "infopro",
        ["0", "1"],
        example_inputs=x,
        optimizer=sgd(0.1),
        seed=0,
        mean=mean,
        std=std,
        reconstruction=(3.0, 1.0),
        weight=(0.5, 2.0),
        **options,
    )
    before = {k: v.clone() for k, v in program.root.state_dict().items()}
    aux, h, expected = dict(program.root.aux.named_children()), x, {}
    kind = "head" if task == "softmax" else "contrast"
    program.train()
    for k, layer in enumerate(model):
        h = layer(h.detach())
        loss = F.cross_entropy(h.flatten(0, -2), y.flatten()) if k == 2 else h.new_zeros(())
        parts = [layer]
        if k < 2:
            networks = [
                next(m for n, m in aux.items() if n.startswith(f"{k}_{what}"))
                for what in ("reconstruction", kind)
            ]
            read, labels = h, y
            if share:
                at = drawn(0, program.ir.nodes(str(k), "positions")[0].name, share, y)
                read, labels = h[:, at], y[:, at]
            if rank := options.get("rank"):
                assert [layer.out_features for layer in networks[1].net[-1]] == [rank, 3]
            image = x * scale + shift
            decoded, result = networks[0](h), networks[1](read)
            task_loss = F.cross_entropy(result.flatten(0, -2), labels.flatten())
            if task == "contrast":
                task_loss = contrast_by_hand(result, y)
            loss = (3.0, 1.0)[k] * -(image * decoded.log() + (1 - image) * (1 - decoded).log()).mean()
            loss = loss + (0.5, 2.0)[k] * task_loss
            parts += networks
        for part in parts:
            for p, g in zip(
                part.parameters(),
                torch.autograd.grad(loss, list(part.parameters()), retain_graph=True),
                strict=True,
            ):
                expected[id(p)] = p.detach() - 0.1 * g
    program.root.load_state_dict(before)  # BatchNorm has seen the batch
    program.step(x, y)
    for name, p in program.root.named_parameters():
        torch.testing.assert_close(p.detach(), expected[id(p)], rtol=0, atol=1e-10, msg=name)


def contrast_by_hand(z: Tensor, y: Tensor) -> Tensor:
    """Khosla et al. 2020, one anchor at a time."""
    z = z / z.norm(dim=1, keepdim=True)
    total = torch.zeros((), dtype=z.dtype)
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        scores = torch.stack([z[i] @ z[j] / 0.07 for j in others])
        positive = [n for n, j in enumerate(others) if y[j] == y[i]]
        if positive:
            total = total - torch.stack([scores[n] - scores.logsumexp(0) for n in positive]).mean()
    return total / len(z)


def test_the_weights_are_linear_in_the_module() -> None:
    """For two modules the first counts; a term without weight has no network."""
    assert [between((6.0, 0.0), k, 3) for k in range(3)] == [6.0, 3.0, 0.0]
    assert between((5.0, 1.0), 0, 1) == 5.0
    model, x, _ = images()
    program = compiled(model, "infopro", ["0", "1"], example_inputs=x, reconstruction=(1.0, 0.0))
    names = [name for name, _ in program.root.aux.named_children()]
    assert names == ["0_reconstruction_layer_0", "0_head_layer_0", "1_head_layer_1"]


def test_what_cannot_be_is_refused() -> None:
    model, x, _ = images()
    for options, message in (
        ({"mean": 0.5}, "both mean and std"),
        ({"task": "soft"}, "softmax"),
        ({"task": "contrast", "rank": 2}, "of task='softmax'"),
        ({"positions": 0.5}, "a head on a part of the positions needs a sequence"),
        ({"reconstruction": (0.0, 1.0), "weight": (0.0, 1.0)}, "nothing would train"),
        ({"weight": (1.0, -1.0)}, "two weights of 0 or more"),
    ):
        with pytest.raises(MethodError, match=message):
            locc.compile(model, "infopro", ["0", "1"], example_inputs=x, **options)
    tokens = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7))
    with pytest.raises(MethodError, match="no floating-point input to reconstruct"):
        locc.compile(tokens, "infopro", ["1"], example_inputs=torch.randint(7, (2, 5)))
    with pytest.raises(MethodError, match="one class each"):
        locc.compile(tokens[1:], "infopro", ["1"], example_inputs=torch.randn(2, 5, 4), task="contrast")


def test_an_image_is_reconstructed_from_vectors_as_well() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Linear(6, 3))
    x, y = torch.rand(5, 1, 8, 8), torch.randint(3, (5,))
    program = locc.compile(model, "infopro", ["1"], example_inputs=x, width=4)
    assert program.step(x, y).objectives["1.reconstruction"].isfinite()
