import pytest
import torch
from torch import nn

from locc.errors import MethodError
from locc.ir.spec import BatchDim, TensorSpec
from locc.nn import Layout, guess_layout, layout_of, pool, positions, regrid
from nn.specs import BOUNDARIES, B, spec, value


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((B, 12), Layout.flat()),
        ((B, 6, 8), Layout.sequence()),
        ((B, 16, 8), Layout.sequence()),
        ((B, 10, 8), Layout.sequence()),
        ((B, 17, 8), Layout.sequence(class_token=True)),
        ((B, 197, 768), Layout.sequence(class_token=True)),
        ((6, B, 8), Layout.sequence(time_first=True)),
        ((B, 8, 1), Layout.image(1)),
        ((B, 64, 8, 8), Layout.image()),
        ((B, 7, 7, 768), Layout.image(channels_last=True)),
        ((B, 8, 8, 8), Layout.image()),
        ((B, 512, 1, 1), Layout.image()),
        ((B, 1, 80, 300), Layout.image()),
        ((B, 4, 5, 6, 6), Layout.image(3)),
        ((B, 4, 7, 7, 96), Layout.image(3, channels_last=True)),
    ],
)
def test_the_rules(shape, expected):
    assert guess_layout(spec(*shape)) == expected


def test_a_hint_overrides_the_rules():
    assert guess_layout(spec(B, 6, 8), "channels_first") == Layout.image(1)
    assert guess_layout(spec(B, 17, 8), "sequence") == Layout.sequence()
    assert guess_layout(spec(B, 10, 8), "class_token") == Layout.sequence(class_token=True)
    assert guess_layout(spec(B, 6, 7, 8), "channels_last") == Layout.image(channels_last=True)
    mine = Layout("image", 2, (1, 3))
    assert guess_layout(spec(B, 6, 7, 8), mine) == mine
    with pytest.raises(MethodError, match="nearest: 'channels_first'"):
        guess_layout(spec(B, 6, 8), "channel_first")
    with pytest.raises(MethodError, match="4 dimensions"):
        guess_layout(spec(B, 6, 8), Layout.image())
    with pytest.raises(MethodError, match="2 dimensions"):
        guess_layout(spec(B, 6, 8), "flat")


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (spec(B, 6, dtype=torch.int64), "torch.int64"),
        (spec(B, 6, dtype=torch.complex64), "complex64"),
        (spec(), "has 0"),
        (spec(3, 4), "has 0"),
        (spec(B, B), "has 2"),
        (TensorSpec((BatchDim(1, 1), 4), torch.float32), "exactly one dimension"),
        (spec(B), "no known layout"),
        (spec(4, B), "no known layout"),
        (spec(B, 1, 2, 3, 4, 5), "no known layout"),
        (spec(B, 0), "empty dimension"),
    ],
)
def test_what_has_no_layout_is_named(bad, why):
    with pytest.raises(MethodError, match=why) as caught:
        guess_layout(bad)
    assert str(bad) in str(caught.value)


def test_a_layout_names_each_dimension_once():
    with pytest.raises(MethodError, match="does not name each dimension once"):
        Layout("image", 1, (1, 2))
    with pytest.raises(MethodError, match="class token"):
        Layout("image", 1, (2, 3), class_token=True)
    with pytest.raises(MethodError, match="unknown"):
        Layout("imagee", 1, (2, 3))


@pytest.mark.parametrize("name", BOUNDARIES)
def test_the_permutations_invert_each_other(name):
    s, hint = BOUNDARIES[name]
    layout, x = guess_layout(s, hint), value(s)
    last, first = layout.last(x), layout.first(x)
    assert last.shape == (3, *layout.sizes(s), layout.channels(s))
    assert first.shape == (3, layout.channels(s), *layout.sizes(s))
    assert torch.equal(layout.from_last(last), x)
    assert torch.equal(layout.from_first(first), x)
    assert torch.equal(first.movedim(1, -1), last)
    assert positions(x, layout).shape[2] == layout.channels(s)
    rows = last.reshape(3, -1, layout.channels(s))
    pooled = rows[:, 0] if layout.class_token else rows.mean(1)
    torch.testing.assert_close(pool(x, layout), pooled, atol=1e-12, rtol=0)


def test_layout_of_reads_the_layers():
    conv1 = nn.Sequential(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.ReLU())
    assert layout_of(conv1, spec(B, 6, 8)) == Layout.image(1)
    block = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    assert layout_of(block, spec(B, 6, 8)) == Layout.sequence()
    assert layout_of(block, spec(B, 17, 8)) == Layout.sequence(class_token=True)
    assert layout_of(block, spec(B, 5, 7, 8)) == Layout.image(channels_last=True)
    patches = nn.Sequential(nn.Conv2d(3, 8, 4), nn.Flatten(2))
    assert layout_of(patches, spec(B, 8, 16)) is None
    assert layout_of(nn.Conv2d(3, 6, 3), spec(B, 6, 6, 9)) == Layout.image()
    assert layout_of(nn.GRU(8, 8), spec(B, 17, 8)) == Layout.sequence(class_token=True)
    assert layout_of(nn.ReLU(), spec(B, 4)) == Layout.flat()


def test_tokens_unfold_into_a_square_map_in_row_order():
    x = torch.arange(16.0).reshape(1, 1, 16)
    assert torch.equal(regrid(x, (4, 4))[0, 0], torch.arange(16.0).reshape(4, 4))
    assert torch.equal(regrid(x, (2, 2))[0, 0], torch.tensor([[2.5, 4.5], [10.5, 12.5]]))
    assert regrid(torch.randn(2, 3, 4, 4), (5,)).shape == (2, 3, 5)
    assert regrid(torch.randn(2, 3, 4, 4), (7, 7)).shape == (2, 3, 7, 7)
