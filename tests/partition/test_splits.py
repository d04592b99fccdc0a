from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import locc
import zoo
from locc import SplitError
from support import Residual, batch, compiled, gap, mlp, same, sgd, snapshot


def modules(model: nn.Module, splits: Any, **options: Any) -> list[str]:
    return [owner.name for owner in compiled(model, "bp", splits, **options).ir.modules]


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(4, 6)
        self.stage = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self.out = nn.Linear(6, 3)
        self.spare = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.stage(self.inp(x))))


class Marked(nn.Module):
    """Markers in the outer forward and in a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = MarkedInside()
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = locc.split(torch.tanh(self.inner(x)), "body")
        return self.out(x)


class MarkedInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(locc.split(torch.tanh(self.one(x)), "deep"))


class Block(nn.Module):
    """Twice the network: its shortcut is written before the main branch, or after it."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.shortcut, self.norm = (
            nn.Conv2d(4, 4, 3, padding=1),
            nn.Conv2d(3, 4, 1),
            nn.BatchNorm2d(4),
        )
        self.out, self.first = nn.Linear(4, 3), first

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        if self.first:
            r = self.norm(self.shortcut(x))
            h = self.conv2(functional.relu(self.bn1(self.conv1(x))))
        else:
            h = self.conv2(functional.relu(self.bn1(self.conv1(x)), inplace=True))
            r = self.norm(self.shortcut(x))
        h += r
        return self.out(functional.relu(h).mean((2, 3)))


@pytest.mark.parametrize("splits", [["conv1"], ["bn1"], ["stem", "conv1", "conv2"]])
@pytest.mark.parametrize("method", ["dgl", "predsim"])
def test_a_shortcut_belongs_to_whom_it_joins_wherever_it_is_written(method: str, splits: list[str]) -> None:
    torch.manual_seed(0)
    models = [Block(True).double(), Block(False).double()]
    models[1].load_state_dict(models[0].state_dict())
    x, y = torch.randn(4, 1, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    found: list[Any] = []
    for model in models:
        program = locc.compile(model, method, splits, example_inputs=x, optimizer=sgd(), seed=0)
        owners = {o.name: sorted(program.ir.parameters(o.name)) for o in program.ir.modules}
        values = [program.step(x, y).objectives for _ in range(3)]
        found.append((owners, [{k: float(v) for k, v in step.items()} for step in values]))
    assert found[0][0] == found[1][0]
    assert "model.shortcut.weight" in found[0][0]["output"]
    assert found[0][1] == found[1][1]
    assert same(models[0].state_dict(), models[1].state_dict())


class Exits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.early, self.two, self.out = (
            nn.Linear(4, 6),
            nn.Linear(6, 3),
            nn.Linear(6, 6),
            nn.Linear(6, 3),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.one(x))
        early = self.early(h)
        return self.out(torch.tanh(self.two(h))), early


def test_what_only_the_output_reads_trains_on_the_loss() -> None:
    program = locc.compile(
        Exits(),
        "dgl",
        ["one", "two"],
        loss=lambda o, y: functional.cross_entropy(o[0], y) + functional.cross_entropy(o[1], y),
        example_inputs=torch.randn(4, 4),
    )
    assert "model.early.weight" in program.ir.parameters("output")


# ---- names, globs, markers ---------------------------------------------------------------------


def test_modules_are_named_after_their_splits_in_forward_order():
    assert modules(mlp(), ["relu1", "relu2"]) == ["relu1", "relu2", "third"]
    assert modules(mlp(), ["relu2", "relu1"]) == ["relu1", "relu2", "third"]
    assert modules(mlp(), "relu1") == ["relu1", "output"]
    assert modules(mlp(), ("relu1",)) == ["relu1", "output"]


def test_the_order_of_the_list_changes_nothing():
    one, other = (
        compiled(Residual(), "bp", ["blocks.1", "inp"]),
        compiled(Residual(), "bp", ["inp", "blocks.1"]),
    )
    assert str(one.ir) == str(other.ir)


def test_a_glob_matches_one_level():
    assert modules(Residual(), "blocks.*") == ["blocks.0", "blocks.1", "blocks.2", "out"]
    assert modules(Residual(), ["blocks.[01]"]) == ["blocks.0", "blocks.1", "output"]


def test_no_splits_make_one_module():
    assert len(modules(mlp(), [])) == len(modules(mlp(), 1)) == len(modules(Residual(), ())) == 1


def test_nested_splits_cut_inside_and_after():
    assert modules(Nested(), ["stage", "stage.0"]) == ["stage.0", "stage", "out"]


def test_markers_are_found_in_the_forward_and_in_submodules():
    assert modules(Marked(), []) == ["deep", "body", "out"]
    with pytest.raises(SplitError, match=r"between splits 'inner.one' and 'deep' has no parameters"):
        modules(Marked(), ["inner.one"])


def test_a_marker_by_name_is_the_same_marker():
    assert modules(Marked(), ["body"]) == ["deep", "body", "out"]


def test_a_marker_does_nothing_outside_of_locc():
    x = torch.randn(2)
    assert locc.split(x, "name") is x


def test_names_that_the_graph_uses_itself():
    class Awkward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("data", "target", "output", "loss"):
                self.add_module(name, nn.Linear(4, 4))

        def forward(self, target: Tensor) -> Tensor:
            for name in ("data", "target", "output", "loss"):
                target = torch.tanh(getattr(self, name)(target))
            return target

    splits = ["data", "target", "output"]
    # "data" is the owner of the batch itself
    assert modules(Awkward(), splits) == ["data_", "target", "output", "loss"]
    assert gap(Awkward(), splits) < 1e-12


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (["relu9"], "split 'relu9' matches no submodule; nearest: 'relu"),
        (["blocks.*"], r"split 'blocks.\*' matches no submodule"),
        ([""], "split '' matches no submodule"),
        ([3], "splits must be names, globs or a number; found 3"),
        (["first", "first"], "split 'first' is given twice"),
        (["first", "f*"], "split 'first' is given twice"),
        (["third"], "split 'third' lies after the output: nothing follows it"),
        (["second", "third"], "split 'third' lies after the output"),
        (["first", "relu1"], "between splits 'first' and 'relu1' has no parameters"),
        (0, "splits=0: give names, or the number of modules, at least 1"),
        (True, "splits=True: give names"),
        (2.5, "splits=2.5: give names"),
        (None, "splits=None: give names"),
        (4, "splits=4: the model has only 3 submodules"),
    ],
)
def test_splits_that_make_no_sense(splits, message):
    model = mlp()
    before = snapshot(model)
    with pytest.raises(SplitError, match=message):
        compiled(model, "bp", splits)
    assert same(before, snapshot(model))


def test_a_submodule_that_the_forward_does_not_call():
    with pytest.raises(
        SplitError, match="split 'spare' is a submodule that the forward does not call; nearest:"
    ):
        compiled(Nested(), "bp", ["spare"])


def test_a_container_that_is_not_called_ends_with_its_last_child():
    """In the order of the forward, the addition of the residual block included."""
    one, other = (compiled(Stream(), "bp", splits).ir for splits in (["blocks"], ["blocks.2"]))
    assert [module.name for module in one.modules] == ["blocks", "out"]
    pairs = zip(one.modules, other.modules, strict=True)
    assert all(list(one.parameters(a.name)) == list(other.parameters(b.name)) for a, b in pairs)
    assert [b.value.name for b in one.boundaries()] == [b.value.name for b in other.boundaries()] == ["add_2"]


def test_a_container_without_a_called_child():
    model = Stream()
    model.unused = nn.ModuleList([nn.Linear(4, 4)])
    with pytest.raises(SplitError, match="split 'unused' is a submodule that the forward does not call"):
        compiled(model, "bp", ["unused"])


def test_a_split_inside_a_leaf_names_the_leaf():
    model = nn.Sequential(nn.Linear(4, 8), nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0), nn.Linear(8, 3))
    with pytest.raises(locc.LoccError, match=r"1\.self_attn|'1'"):
        compiled(model, "bp", ["1.self_attn.out_proj"])


def test_two_splits_at_the_same_place():
    with pytest.raises(SplitError, match=r"between splits .* is empty: both cuts fall on the same place"):
        compiled(Nested(), "bp", ["stage.2", "stage"])


def test_models_with_nothing_to_train():
    class Doubles(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    for model in (Doubles(), mlp().requires_grad_(False)):
        with pytest.raises(SplitError, match="the model has no parameters to train"):
            locc.compile(model, "bp", example_inputs=batch()[0])


def test_a_number_beside_markers():
    with pytest.raises(
        SplitError, match=r"splits=2 asks for balanced modules, but the forward marks its own splits"
    ):
        compiled(Marked(), "bp", 2)


def test_a_number_without_example_inputs_waits_for_the_first_step():
    program = locc.compile(mlp(), "bp", 3)
    program.step(*batch())
    assert len(program.ir.modules) == 3


# ---- balance -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 4])
def test_balanced_modules_have_about_the_same_cost(count):
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(12)))
    program = locc.compile(model, "bp", count, example_inputs=torch.randn(3, 8), loss="mse")
    sizes = [sum(p.numel() for p in program.ir.parameters(o.name).values()) for o in program.ir.modules]
    assert sizes == [12 // count * 72] * count


def test_balance_follows_the_work_and_is_deterministic():
    def build() -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(4, 64), nn.Linear(64, 64), nn.Linear(64, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        )

    found = [modules(build(), 2, example_inputs=torch.randn(3, 4)) for _ in range(3)]
    assert found[0] == found[1] == found[2]
    # 64x64 weighs more than all others together: it stands with as little else as possible
    assert found[0][0] in ("0", "1")


class Token(nn.Module):
    """Calls one layer on a view of a parameter, as class attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 4))
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.late, self.head = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        told: Tensor = self.head(self.late(self.body(x) + self.body[0](self.token.expand(len(x), -1))))
        return told


def test_balancing_counts_where_parameters_are_called_upon():
    program = locc.compile(Token(), "bp", 2, example_inputs=torch.randn(4, 4))
    # a cut after `body` would part the two uses of its first layer
    assert [module.name for module in program.ir.modules] == ["late", "head"]


class Folded(nn.Sequential):
    """Folds four rows into the batch around its second layer, as MobileViT does with patches."""

    def forward(self, x: Tensor) -> Tensor:
        x = self[0](x)
        x = self[2](self[1](x.reshape(4 * len(x), 2))).reshape(x.shape)
        told: Tensor = self[4](self[3](x))
        return told


@pytest.mark.parametrize("tie", [False, True])
def test_balancing_cuts_where_there_is_one_row_for_each_sample(tie):
    model = Folded(nn.Linear(8, 8), nn.Linear(2, 16), nn.Linear(16, 2), nn.Linear(8, 8), nn.Linear(8, 8))
    if tie:
        model[3].weight = model[0].weight
    found = modules(model, 2 if tie else 3, example_inputs=torch.randn(3, 8), loss="mse")
    assert found == (["3", "4"] if tie else ["0", "3", "4"])


def test_a_glob_leaves_out_what_parts_nothing():
    model = nn.Sequential(nn.ReLU(), *(part for _ in range(3) for part in (nn.Linear(8, 8), nn.ReLU())))
    assert modules(model, "*", example_inputs=torch.randn(3, 8), loss="mse") == ["2", "4", "5"]
    with pytest.raises(SplitError, match="has no parameters; leave one of the splits out"):
        compiled(model, "bp", [str(k) for k in range(6)], example_inputs=torch.randn(3, 8), loss="mse")


def test_balancing_leaves_buffers_hooks_and_the_random_state_alone():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    seen: list[int] = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    before, state = snapshot(model), torch.get_rng_state()
    compiled(model, "bp", 2, verify=False)
    assert same(before, snapshot(model))
    assert torch.equal(state, torch.get_rng_state())
    assert len(model[0]._forward_hooks) == 1


# ---- where a cut falls, and what crosses it -----------------------------------------------------


class Stream(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(4, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


def test_a_cut_slides_past_the_residual_addition():
    ir = compiled(Stream(), "bp", ["blocks.0", "blocks.1"]).ir
    assert [len(ir.boundaries(consumer=o.name)) for o in ir.modules] == [0, 1, 1]
    assert {b.value.name for b in ir.boundaries()} == {"add", "add_1"}


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.mid = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 5)
        self.up2, self.up1 = nn.Linear(10, 6), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        one = torch.tanh(self.down1(x))
        two = torch.tanh(self.down2(one))
        mid = torch.tanh(self.mid(two))
        up = torch.tanh(self.up2(torch.cat([mid, two], 1)))
        return self.up1(torch.cat([up, one], 1))


def test_a_skip_goes_straight_to_its_consumer():
    ir = compiled(UNet(), "bp", ["down1", "down2", "mid", "up2"]).ir
    pairs = sorted((b.producer, b.consumer) for b in ir.boundaries())
    # the concatenations belong to the modules before the cuts: one value crosses instead of two
    assert pairs == [("down1", "down2"), ("down2", "mid"), ("down2", "up2"), ("mid", "up2"), ("up2", "up1")]
    assert all(str(b.spec).startswith("f32[B,") for b in ir.boundaries())


class Masked(nn.Module):
    """A mask and positions made from the input alone: every reader makes its own."""

    def __init__(self, noisy: bool = False) -> None:
        super().__init__()
        self.register_buffer("table", torch.linspace(0, 1, 4))
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.noisy = noisy

    def forward(self, x: Tensor) -> Tensor:
        mask = (x > 0).to(x.dtype) + self.table * torch.arange(4)
        if self.noisy:
            mask = mask + torch.rand_like(mask)
        h = torch.tanh(self.a(x) * mask)
        h = torch.tanh(self.b(h) * mask)
        return self.c(h) * mask


def test_parameter_free_values_are_recomputed_by_each_reader():
    ir = compiled(Masked(), "bp", ["a", "b"]).ir
    assert [len(ir.boundaries(consumer=o.name)) for o in ir.modules] == [0, 1, 1]
    made = [[n for n in ir.nodes(o.name) if ir.inputs[0] in n.all_input_nodes] for o in ir.modules]
    assert all(any("gt" in n.name for n in found) for found in made[1:])
    assert not any("gt" in n.name for n in made[0])


def test_random_values_are_drawn_once_and_cross():
    ir = compiled(Masked(noisy=True), "bp", ["a", "b"]).ir
    assert sum(bool(n.meta.get("random")) for n in ir.graph.nodes) == 1
    assert [len(ir.boundaries(consumer=o.name)) for o in ir.modules] == [
        0,
        1,
        2,
    ]  # drawn where it is read first


# ---- modules that take turns --------------------------------------------------------------------


class Stack(nn.Module):
    """Two recurrent cells that take turns in a loop over time."""

    def __init__(self, feedback: bool = False) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.GRUCell(4, 5), nn.GRUCell(5, 5), nn.Linear(5, 3)
        self.feedback = feedback

    def forward(self, x: Tensor) -> Tensor:
        h = g = x.new_zeros(x.shape[0], 5)
        for _ in range(3):
            h = self.one(x, g if self.feedback else h)
            g = self.two(h, g)
        return self.out(g)


def test_recurrent_cells_that_take_turns_are_modules_of_their_own():
    ir = compiled(Stack(), "bp", ["one", "two"]).ir
    assert [o.name for o in ir.modules] == ["one", "two", "out"]
    assert {str(n.target) for n in ir.nodes("one") if n.op == "call_module"} == {"model.one"}
    assert gap(Stack(), ["one", "two"]) < 1e-12


def test_feedback_between_cells_is_refused():
    with pytest.raises(SplitError, match="information flows back between these splits"):
        compiled(Stack(feedback=True), "bp", ["one", "two"])


def test_one_cell_of_a_loop_can_be_split_from_the_other():
    case = zoo.find("gru_cells")
    program = locc.compile(case.build(), "bp", ["cell1"], loss=case.loss, example_inputs=case.inputs())
    owned = {name: set(program.ir.parameters(name)) for name in program.ir.owners}
    assert {path.split(".")[1] for path in owned["cell1"]} == {"embed", "cell1"}
    assert {path.split(".")[1] for path in owned["output"]} == {"cell2", "head"}


class Seen(nn.Module):
    """Binds a buffer to a new tensor in its own forward, before its first submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.Buffer(torch.zeros(1))
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + 1
        told: Tensor = self.second(torch.tanh(self.first(x + 0.1 * self.seen)))
        return told


def test_a_buffer_is_set_by_the_module_that_computes_it():
    program = compiled(Seen(), "bp", "first", example_inputs=torch.randn(3, 4), loss="mse")
    program.step(torch.randn(3, 4), torch.randn(3, 3))
    assert program.model.seen == 1
    assert "seen" not in str(program.module_programs["second"])
