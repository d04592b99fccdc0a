"""What does not need PyTorch does not load it, and every public name is there all the same."""

from __future__ import annotations

import importlib
import os
import pkgutil
import subprocess
import sys

import pytest

import locc
import locc.testing

COMMANDS = {
    "import": "import locc, locc.registry; dir(locc); locc.LoccError; locc.registry.registered()",
    "plugin": "import locc.testing.plugin",
    "--help": "import locc.cli; locc.cli.app(['--help'], standalone_mode=False)",
    "--version": "import locc.cli; locc.cli.app(['--version'], standalone_mode=False)",
    "train --help": "import locc.cli; locc.cli.app(['train', '--help'], standalone_mode=False)",
    "reproduce --help": "import locc.cli; locc.cli.app(['reproduce', '--help'], standalone_mode=False)",
    "completion": "import locc.cli; locc.cli.app(prog_name='locc')",
}
COMPLETION = {"_LOCC_COMPLETE": "complete_bash", "COMP_WORDS": "locc train --method d", "COMP_CWORD": "3"}


@pytest.mark.parametrize("name", COMMANDS)
def test_it_answers_without_pytorch(name: str) -> None:
    code = f"import sys\ntry:\n    {COMMANDS[name]}\nfinally:\n    assert 'torch' not in sys.modules"
    env = os.environ | (COMPLETION if name == "completion" else {})
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    if name == "completion":
        assert done.stdout.split() == [
            "ddtp-linear",
            "ddtp-rhl",
            "dfa",
            "dgl",
            "dgl-async",
            "dladmm",
            "dni",
            "dtp",
            "dtp-drl",
        ]


@pytest.mark.parametrize("package", [locc, locc.testing], ids=lambda p: p.__name__)
def test_public_names_are_listed_found_and_no_modules(package) -> None:
    """A module of the name would take its place as soon as it is imported."""
    modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
    assert modules.isdisjoint(package.__all__)
    for name in package.__all__:
        assert name in dir(package)
        assert getattr(package, name) is not None


def test_modules_are_found_as_attributes_and_nothing_else_is() -> None:
    assert locc.losses is importlib.import_module("locc.losses")
    with pytest.raises(AttributeError, match=r"module 'locc' has no attribute 'compiled'"):
        locc.compiled  # noqa: B018
