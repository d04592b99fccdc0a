"""Dimensions beside the batch that may vary: what may, what may not, and that no number changes."""

from __future__ import annotations

import copy

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import locc
from locc.errors import CaptureError, GraphError, MethodError, RunError
from locc.ir.spec import BatchDim, FreeDim, Point, TensorSpec, fit

VOCABULARY, CLASSES = 11, 3


class Language(nn.Module):
    """Tokens [B,T] to scores [B,T,V]; positions and mask follow the length."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(VOCABULARY, 8), nn.Embedding(32, 8)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True) for _ in range(3)
        )
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores."""
        length = x.shape[1]
        h = self.embed(x) + self.place(torch.arange(length))
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        for block in self.blocks:
            h = block(h, mask)
        return self.head(h)


class Segmenter(nn.Module):
    """Images [B,2,H,W] to scores [B,C,H,W], through maps of half and a quarter of the size."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(2, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(6, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU())
        self.head = nn.Conv2d(6, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores."""
        h = self.b(self.a(x))
        return F.interpolate(self.head(h), size=x.shape[-2:], mode="bilinear")


class Classifier(Segmenter):
    """Images of any size to scores [B,C]."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores."""
        return self.head(self.b(self.a(x))).mean((2, 3))


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(shape[1]))


def images(*sizes: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(sizes))
    return torch.randn(sizes[0], 2, *sizes[1:], generator=generator, dtype=torch.float64)


def labels(model: nn.Module, x: Tensor) -> Tensor:
    shape = x.shape[:1] if type(model) is not Segmenter else torch.Size((x.shape[0], *x.shape[-2:]))
    return x if isinstance(model, Language) else torch.arange(shape.numel()).view(shape) % CLASSES


def compiled(model: nn.Module, method: str, example: Tensor, **more: object) -> locc.Program:
    splits = ["blocks.0", "blocks.1"] if isinstance(model, Language) else ["a", "b"]
    sgd = lambda parameters: torch.optim.SGD(parameters, 0.1)  # noqa: E731
    return locc.compile(model, method, splits, example_inputs=example, seed=3, optimizer=sgd, **more)


def step(program: locc.Program, x: Tensor) -> None:
    program.step(x, labels(program.model, x))


ALIKE = {
    Language: (
        tokens(4, 8),
        tokens(3, 13),
        ("dgl", "dtp", "cdni"),
        ("bp", "predsim", "dni", "dfa", "altmin"),
    ),
    Segmenter: (images(4, 16, 16), images(3, 32, 24), ("dgl", "dtp", "dfa"), ("bp", "dni", "fa", "altmin")),
    Classifier: (images(4, 16, 16), images(2, 24, 16), ("dgl", "fa"), ("bp", "cdni", "dtp")),
}
CASES = [
    pytest.param(build, method, example, other, id=f"{build.__name__}-{method}", marks=marks)
    for build, (example, other, few, more) in ALIKE.items()
    for methods, marks in ((few, ()), (more, (pytest.mark.slow,)))
    for method in methods
]


@pytest.mark.parametrize(("build", "method", "example", "other"), CASES)
def test_a_step_at_another_size_is_that_of_a_program_compiled_for_it(build, method, example, other):
    torch.manual_seed(0)
    model = build().double()
    free = compiled(model, method, example, dynamic="auto")
    fixed = compiled(copy.deepcopy(model), method, other)
    fixed.root.load_state_dict(free.root.state_dict())
    one, two = (program.step(other, labels(model, other)) for program in (free, fixed))
    assert one.objectives.keys() == two.objectives.keys()
    for name, value in one.objectives.items():
        torch.testing.assert_close(value, two.objectives[name], rtol=1e-10, atol=1e-12)
    for name, value in free.root.state_dict().items():
        torch.testing.assert_close(value, fixed.root.state_dict()[name], rtol=1e-9, atol=1e-12)


def test_what_may_vary_is_printed_and_only_that_may():
    program = compiled(Segmenter().double(), "bp", images(4, 16, 16), dynamic={"x": {2: "H"}})
    assert [str(s) for s in program.ir.captured.signature.specs] == ["f64[B,2,H,16]"]
    assert "f64[B,6,H/2,8]" in str(program.ir)
    program(images(2, 32, 16))
    with pytest.raises(
        RunError, match=r"'x' was compiled as f64\[B,2,H,16\] and now is .*only B, H may change"
    ):
        step(program, images(2, 32, 32))
    program = compiled(Segmenter().double(), "bp", images(4, 16, 16))
    with pytest.raises(RunError, match=r"only B may change.*Compile with dynamic='auto'"):
        step(program, images(2, 32, 16))


class Two(nn.Module):
    """Two sequences of one length."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return scores."""
        return self.b(torch.tanh(self.a(x + y))).mean(1)


def test_dimensions_of_one_name_have_one_size():
    x = torch.randn(4, 5, 4)
    program = locc.compile(Two(), "dgl", ["a"], example_inputs=(x, x), dynamic="auto")
    assert [str(s) for s in program.ir.captured.signature.specs] == ["f32[B,T,4]"] * 2
    program.step((x[:, :3], x[:, :3]), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(RunError, match=r"'y' was compiled .*in all inputs alike \(here B = 4, T = 3\)"):
        program.step((x[:, :3], x), torch.zeros(4, dtype=torch.int64))


class Loops(Two):
    """A loop over time in Python."""

    def forward(self, x: Tensor) -> Tensor:
        """Return scores."""
        return sum(self.b(torch.tanh(self.a(x[:, t]))) for t in range(x.shape[1]))


class Asks(Two):
    """A branch on a size that a closed module makes."""

    def forward(self, x: Tensor) -> Tensor:
        """Return scores."""
        h = self.a(x)
        return self.b(h).mean(1) if h.shape[1] > 4 else self.b(h).sum(1)


@pytest.mark.parametrize(("build", "line"), [(Loops, "range(x.shape[1])"), (Asks, "h.shape[1] > 4")])
def test_a_size_on_which_the_code_decides_stays_and_its_line_is_named(build, line):
    x = torch.randn(4, 5, 4)
    program = locc.compile(build(), "dgl", ["a"], example_inputs=x, dynamic="auto")
    if build is Loops:
        assert [str(s) for s in program.ir.captured.signature.specs] == ["f32[B,5,4]"]
        (note,) = program.ir.captured.notes
        assert note.startswith("dimension 1 of input 'x' stays at 5: ")
        assert line in note
        with pytest.raises(CaptureError, match=r"dynamic: 'T' \(dimension 1 of input 'x'\) cannot vary: "):
            locc.compile(build(), "dgl", ["a"], example_inputs=x, dynamic={"x": [1]})
    else:  # longer sequences take the same branch, and shorter ones are refused with the line
        program.step(torch.randn(2, 9, 4), torch.zeros(2, dtype=torch.int64))
        with pytest.raises(RunError, match=r"the model branches on a size \(T > 4, at .*cover T = 3"):
            program.step(torch.randn(2, 3, 4), torch.zeros(2, dtype=torch.int64))


class Square(Classifier):
    """Square images only."""

    def forward(self, x: Tensor) -> Tensor:
        """Return scores."""
        return super().forward(x + x.transpose(2, 3))


def test_dimensions_that_the_model_needs_equal_vary_together():
    program = compiled(Square().double(), "dgl", images(4, 16, 16), dynamic="auto")
    assert [str(s) for s in program.ir.captured.signature.specs] == ["f64[B,2,H,H]"]
    step(program, images(2, 24, 24))
    with pytest.raises(RunError, match="only B, H may change"):
        step(program, images(2, 24, 16))


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ("yes", "dynamic='yes': give 'auto', or"),
        ([{2: "H"}], r"dynamic=\[\{2: 'H'\}\]: give 'auto', or"),
        ({"x": 2}, "dynamic: 2 of input 'x': give {dimension: name}, or dimensions"),
        ({"x": {2: 3}}, "dynamic: 3 is no name for a dimension"),
        ({"y": [2]}, "no tensor input 'y'; "),
        ({"x": [4]}, r"input 'x' of shape \[4, 2, 16, 16\] has no dimension 4"),
        ({"x": [0]}, "dimension 0 of input 'x' is the batch"),
        ({"x": {2: "B"}}, "'B' is no name for a dimension"),
        ({"x": {1: "S", 2: "S"}}, "'S' is 2 and 16 in the example inputs"),
        ({"x": {1: "C"}}, r"'C' \(dimension 1 of input 'x'\) cannot vary: the model itself takes no other"),
    ],
)
def test_what_cannot_be_asked_for_is_said(dynamic, message):
    model = Segmenter().double()
    with pytest.raises(CaptureError, match=message):
        compiled(model, "bp", images(4, 16, 16), dynamic=dynamic)


def test_a_method_that_needs_a_fixed_size_says_so():
    with pytest.raises(
        MethodError, match=r"varying number of features \(H/2, W/2\).*leave the dimension out of dynamic"
    ):
        compiled(Classifier().double(), "dfa", images(4, 16, 16), dynamic="auto")
    program = compiled(Classifier().double(), "bp", images(4, 16, 16), dynamic="auto")
    varying = program.ir.boundaries()[0].spec
    with pytest.raises(GraphError, match="'H/2' may vary from step to step"):
        program.ir.state("a", "kept", varying)


def test_exported_files_take_every_size(tmp_path):
    model, x = Segmenter(), images(3, 24, 40).float()
    program = compiled(model, "dgl", images(4, 16, 16).float(), dynamic="auto")
    program.export_onnx(tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    assert session.get_inputs()[0].shape == ["batch", 2, "H", "W"]
    assert session.get_outputs()[0].shape == ["batch", CLASSES, "H", "W"]
    (found,) = session.run(None, {"x": x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model.eval()(x), atol=1e-5, rtol=1e-5)


H = FreeDim("H", 16, 24)


@pytest.mark.parametrize(
    ("base", "grown", "other", "expected"),
    [
        ((4, 16), (5, 16), (4, 24), "[B,H]"),
        ((4, 8), (5, 8), (4, 12), "[B,H/2]"),
        ((64, 7), (80, 7), (96, 7), "[H*B,7]"),
        ((9, 32), (11, 32), (9, 48), "[2*B+1,2*H]"),
        ((4, 17), (5, 17), (4, 25), "[B,H+1]"),
        ((4, 256), (5, 256), (4, 576), "[B,H*H]"),
        ((4, 15), (5, 15), (4, 23), "[B,H-1]"),
    ],
)
def test_dims_follow_from_three_shapes(base, grown, other, expected):
    dims = fit({Point(4): base, Point(5): grown, Point(4, 1): other}, [H])
    assert dims is not None
    spec = TensorSpec(dims, torch.float32)
    assert str(spec) == f"f32{expected}"
    assert (spec.concrete(4), spec.concrete(5), spec.concrete(4, 1)) == (base, grown, other)
    assert spec.shape[0] != BatchDim() or spec.batch_dim == 0


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.head = nn.Linear(3, 4), nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(x))[0][:, -1])


def test_feedback_to_a_module_whose_size_varies_names_the_module() -> None:
    with pytest.raises(
        MethodError, match=r"adds to module 'embed' works at .* not at T = 3.*leave dynamic out"
    ):
        locc.compile(Recurrent(), "dfa", ["embed"], example_inputs=torch.randn(4, 6, 3), dynamic="auto")
