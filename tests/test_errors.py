from __future__ import annotations

import pytest
import torch
from torch import nn

import locc
from locc.errors import once


def test_a_reason_that_holds_for_every_module_is_given_once():
    """Convolutions cannot be compared with labels at each pixel, in none of eight modules."""
    model = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(9)))
    with pytest.raises(locc.MethodError) as e:
        locc.compile(model, "sim", [str(i) for i in range(8)], example_inputs=torch.randn(2, 3, 4, 4))
    text = str(e.value)
    assert text.count("per position is defined for sequences") == 1
    assert "module '0': the similarity of labels" in text
    assert text.endswith("(and so for '1', '2', '3' and 4 more: 8 in all)")


@pytest.mark.parametrize(
    ("reasons", "text"),
    [
        ([], ""),
        (["module 'a' is odd"], "module 'a' is odd"),
        (["module 'a' is odd", "module 'a' is odd"], "module 'a' is odd"),
        (["'a' is odd", "no loss", "'b' is odd"], "'a' is odd (and so for 'b': 2 in all); no loss"),
        (["'x' of 'a' is odd", "'x' of 'b' is odd"], "'x' of 'a' is odd (and so for 'b': 2 in all)"),
        (
            ["'a' reads 'x'", "'b' reads 'x'", "'b' reads 'y'"],
            "'a' reads 'x' (and so for 'b': 3 in all)",
        ),
        (["f32[B,3] of 'a'", "f32[B,4] of 'b'"], "f32[B,3] of 'a'; f32[B,4] of 'b'"),
    ],
)
def test_what_is_alike_but_for_the_names(reasons, text):
    assert once(reasons) == text
