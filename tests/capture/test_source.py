"""Whose line of code is named."""

from __future__ import annotations

import os

import pytest
import torch

import locc
from locc.capture.source import user_line

TORCH, LOCC = (os.path.dirname(os.path.abspath(package.__file__)) for package in (torch, locc))


@pytest.mark.parametrize(
    ("path", "users"),
    [
        (f"{TORCH}vision/models.py", True),  # a package beside torch whose name begins alike
        (f"{TORCH}/nn/functional.py", False),
        (f"{LOCC}/capture/ledger.py", False),
    ],
)
def test_the_line_is_the_users_own(path: str, users: bool) -> None:
    scope = {"user_line": user_line}
    exec(compile("def called():\n    return user_line()", path, "exec"), scope)
    found = scope["called"]()
    assert found is not None
    assert found.startswith(path if users else __file__)


def test_who_calls_compile_is_not_meant() -> None:
    scope = {"user_line": user_line}
    exec(compile("def compile():\n    return user_line()", f"{LOCC}/compiler.py", "exec"), scope)
    assert scope["compile"]() is None
