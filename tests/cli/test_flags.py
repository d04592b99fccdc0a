"""Flags from the fields of a dataclass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest

from locc.commands.flags import MisuseError, flags_of, take
from locc.rewrite import Method, Pass, option


@dataclass(frozen=True)
class Sample(Method):
    """A method with a field of every kind."""

    family: ClassVar[str] = "test"
    reference: ClassVar[str] = "none"
    sigma: float = option(0.1, "noise")
    steps: int = 3
    tied: bool = False
    shape: Literal["flat", "image"] = "flat"
    limit: float | None = None
    widths: tuple[int, ...] = (1, 2)
    factory: Callable[[int], Any] | None = None
    loss: str = "own"

    def passes(self) -> Sequence[Pass]:
        return ()


FLAGS = flags_of(Sample, taken=["--loss"])


def read(*args: str) -> tuple[dict[str, Any], list[str]]:
    return take(FLAGS, ["--loss"], "sample", list(args))


def test_every_field_that_text_can_express_has_a_flag() -> None:
    assert list(FLAGS) == ["--sigma", "--steps", "--tied", "--shape", "--limit", "--widths", "--method-loss"]
    assert FLAGS["--sigma"].help == "noise"
    assert FLAGS["--shape"].spelling == "--shape [flat|image]"
    assert FLAGS["--tied"].spelling == "--tied / --no-tied"


@pytest.mark.parametrize(
    ("args", "options"),
    [
        (["--sigma", "0.5"], {"sigma": 0.5}),
        (["--sigma=-1e-3"], {"sigma": -1e-3}),
        (["--tied"], {"tied": True}),
        (["--no-tied"], {"tied": False}),
        (["--shape", "image"], {"shape": "image"}),
        (["--limit", "none"], {"limit": None}),
        (["--limit", "2"], {"limit": 2.0}),
        (["--widths", "4,5,6"], {"widths": (4, 5, 6)}),
        (["--method-loss", "mse"], {"loss": "mse"}),
    ],
)
def test_values(args: list[str], options: dict[str, Any]) -> None:
    assert read(*args) == (options, [])


def test_the_rest_is_left_for_the_command() -> None:
    assert read("model", "--loss", "mse", "--steps", "2", "-x") == (
        {"steps": 2},
        ["model", "--loss", "mse", "-x"],
    )
    assert read("--", "--sigma", "1") == ({}, ["--", "--sigma", "1"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--factory", "x"], "no option --factory"),
        (["--sigmaa", "1"], r"sample' takes\n  --sigma FLOAT"),
        (["--steps", "1.5"], "expected INT"),
        (["--shape", "round"], r"expected \[flat\|image\]"),
        (["--limit", "high"], r"expected FLOAT\|none"),
    ],
)
def test_refusals(args: list[str], message: str) -> None:
    with pytest.raises(MisuseError, match=message):
        read(*args)
