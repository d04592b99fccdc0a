"""Heads that cost less where positions have many classes: some positions, two factors, the model's own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import locc
from locc.losses import cross_entropy
from support import batch, close, drawn, everything, mlp, same, sgd, snapshot

WORDS, LENGTH = 11, 12


class LM(nn.Module):
    def __init__(self, *, axis: int = 2, folded: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed: nn.Module = nn.Embedding(WORDS, 8)
        self.a, self.b = (nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, WORDS)
        self.axis, self.folded = axis, folded

    def forward(self, x: Tensor) -> Tensor:
        y = self.out(self.norm(self.b(self.a(self.embed(x)))))
        return y.flatten(0, 1) if self.folded else y if self.axis == 2 else y.movedim(2, self.axis)


def tokens(seed: int, samples: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randint(WORDS, (2, samples, LENGTH), generator=generator)
    return x, y


def numbers(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def test_the_printed_graph() -> None:
    program = locc.compile(LM(), "dgl", ["a"], head="sr", example_inputs=X)
    lines = [line.strip() for line in str(program.ir).splitlines()]
    start = lines.index("a = self.a(embed)  # f32[B,12,8]") + 1
    assert lines[start : start + 7] == [
        "positions = keys_of(a, 1)  # f32[12]",
        "positions_1 = pick_positions(positions, target)  # i64[3]",
        "part = at_positions(a, positions_1, 1)  # f32[B,3,8]",
        "aux_a_head_a = self.aux.a_head_a(part)  # f32[B,3,11]",
        "label = target_at(target, positions_1)",
        "head_loss = cross_entropy(aux_a_head_a, label)  # f32[]",
        "objective(head_loss)  # a.loss",
    ]


@pytest.mark.parametrize(
    ("method", "options", "share", "axis"),
    [
        ("dgl", {"head": "sr"}, 0.25, 2),
        ("dgl", {"head": "bottleneck"}, 1, 2),
        ("dgl", {"head": "unembedding"}, 1, 2),
        ("dgl", {"head": "unembedding", "positions": 0.5}, 0.5, 2),
        ("dgl", {"head": "linear", "positions": 0.5, "rank": 3, "loss": numbers}, 0.5, 1),
        ("pred", {"positions": 0.3, "rank": 3}, 0.3, 1),
        ("fixed-aux", {"positions": 0.3, "dynamic": {"x": {1: "T"}}}, 0.3, 2),
        ("greedy-seq", {"positions": 0.3, "rank": 2, "depth": 0, "schedule": "lockstep"}, 0.3, 2),
    ],
)
def test_three_steps_equal_the_formulas(method: str, options: Any, share: float, axis: int) -> None:
    """The oracle: module after module, the loss of its head at the positions of the step, SGD."""
    model = LM(axis=axis).double()
    program = locc.compile(
        model, method, ["a", "b"], example_inputs=tokens(0)[0], optimizer=sgd(), seed=0, **options
    )
    mine = copy.deepcopy(model)
    parts = [nn.Sequential(mine.embed, mine.a), mine.b, nn.Sequential(mine.norm, mine.out)]
    aux = [copy.deepcopy(head) for head in program.root.aux.values()]
    loss = options.get("loss", cross_entropy)
    for step in range(3):
        x, y = tokens(step)
        y[:, ::3] = -100
        ignored = y
        if loss is numbers:
            ignored, y = torch.zeros_like(y), torch.randn(3, WORDS, LENGTH).double()
        program.step(x, y)
        h, ends = x, copy.deepcopy(parts[-1])
        for k, part in enumerate(parts):
            out, at = part(h), torch.arange(LENGTH)
            if share < 1 and k < 2:
                name = program.ir.nodes(program.ir.modules[k].name, "positions")[0].name
                at = drawn(step, name, share, ignored)
            head = nn.Identity() if k == 2 else layers(aux[k]) if aux else ends
            own = [*part.parameters(), *(head.parameters() if head is not ends else ())]
            scores, target = head(out[:, at]), y.index_select(y.dim() - 1, at)
            value = loss(scores.movedim(2, axis), target)
            grads = torch.autograd.grad(value, own)
            h = out.detach()
            with torch.no_grad():
                for p, g in zip(own, grads, strict=True):
                    p.sub_(0.1 * g)
    close(model, mine)


def layers(head: Any) -> nn.Module:
    """The layers of a head that reads every position by itself."""
    if hasattr(head, "weight"):
        return Fixed(head.weight)
    found: nn.Module = head.net if hasattr(head, "net") else head.linear
    return found


class Fixed(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, h: Tensor) -> Tensor:
        return h @ self.weight.T


@pytest.mark.parametrize(("method", "share"), [("dgl", {"head": "sr"}), ("infopro", {"positions": 0.25})])
def test_positions_are_drawn_anew_and_resume_and_every_schedule_have_them(
    method: str, share: dict[str, Any], tmp_path: Path
) -> None:
    def data(step: int) -> tuple[Tensor, Tensor]:
        x, y = tokens(step)
        return (x if method == "dgl" else F.one_hot(x, WORDS).float()), y

    def program(**options: Any) -> locc.Program:
        model = LM()
        if method == "infopro":  # it reconstructs numbers
            model.embed = nn.Linear(WORDS, 8)
        example = data(0)[0]
        return locc.compile(model, method, ["a", "b"], example_inputs=example, seed=0, **share, **options)

    whole = program()
    for step in range(4):
        whole.step(*data(step))
        if step == 1:
            whole.save(tmp_path / "half.safetensors")
    resumed = program()
    resumed.load(tmp_path / "half.safetensors")
    for step in (2, 3):
        resumed.step(*data(step))
    assert same(everything(whole), everything(resumed))
    wave = program(schedule="wave", batches=4)
    wave.fit([data(step) for step in range(4)], epochs=1, progress=False)
    assert same(snapshot(whole.model), snapshot(wave.model))
    node = whole.ir.nodes("a", "positions")[0].name
    assert len({tuple(drawn(step, node, 0.25, tokens(step)[1]).tolist()) for step in range(4)}) > 1


X, Y = tokens(0)


def test_classes_to_ignore_are_drawn_only_where_there_are_too_few_others() -> None:
    """A loss of ignored positions alone has no value."""
    program = locc.compile(LM(), "dgl", ["a"], head="sr", example_inputs=X, seed=0)
    for step in range(8):
        y = torch.full((3, LENGTH), -100)
        y[1, step] = 4  # one position of twelve, and three are drawn
        assert program.step(X, y).objectives["a.loss"].isfinite()


def test_the_last_module_alone_trains_its_layer() -> None:
    program = locc.compile(LM(), "dgl", ["a", "b"], head="unembedding", example_inputs=X, seed=0)
    assert not list(program.root.aux.parameters())
    assert not program.certificate.pipeline_exact
    locc.verify(program)
    with pytest.raises(locc.MethodError, match="pipeline-exact"):
        locc.compile(LM(), "dgl", ["a"], head="unembedding", example_inputs=X, schedule="wave")


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (mlp(), {"head": "sr"}, r"module 'first': a head on a part .* f32\[B,8\] and the output f32\[B,3\]"),
        (LM(folded=True), {"positions": 0.5}, r"module 'a': a head on a part of the positions needs"),
        (LM(), {"positions": 1.5}, r"positions=1.5: give a share"),
        (LM(), {"rank": 0}, r"rank=0: give a width"),
        (LM(), {"rank": 2, "head": "unembedding"}, r"rank=2 is of heads that locc builds"),
        (LM(axis=1), {"head": "unembedding"}, r"head='unembedding' needs .* ends in 'movedim'"),
        (LM(), {"hidden": 0}, r"hidden=0: give at least 1"),
    ],
)
def test_what_cannot_be_is_refused(model: nn.Module, options: Any, message: str) -> None:
    cut, x = ("first", batch()[0]) if isinstance(model, nn.Sequential) else ("a", X)
    before = snapshot(model)
    with pytest.raises(locc.MethodError, match=message):
        locc.compile(model, "dgl", [cut], example_inputs=x, **options)
    assert same(before, snapshot(model))


def last(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output[:, -1], target)


def test_a_target_without_an_entry_for_each_position_is_refused() -> None:
    program = locc.compile(LM(), "dgl", ["a"], head="sr", loss=last, example_inputs=X)
    before = snapshot(program)
    with pytest.raises(locc.LoccError, match=r"on a part of 12 positions needs .* shape \[3\]"):
        program.step(X, Y[:, 0])
    assert same(before, snapshot(program))


class Owning(LM):
    """Computes its loss itself, as Hugging Face's language models do."""

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        logits = super().forward(x)
        return {
            "loss": F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()),
            "logits": logits,
        }


def test_a_loss_of_the_models_own_is_refused() -> None:
    inputs = {"x": X, "labels": X}
    with pytest.raises(
        locc.MethodError, match="the loss that the model computes itself reads labels in its own"
    ):
        locc.compile(Owning(), "dgl", ["a"], head="sr", loss="model", example_inputs=inputs)
