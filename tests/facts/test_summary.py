"""A certificate's text is short whatever the depth, and says all that must be said."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
from torch import nn

import locc
from locc.ir import Coupling


@cache
def certificate(method: str, depth: int) -> locc.Certificate:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(depth - 1)]
    model = nn.Sequential(*blocks, nn.Linear(6, 3))
    splits = [str(i) for i in range(depth - 1)]
    return locc.compile(model, method, splits, example_inputs=torch.randn(4, 6)).certificate


@pytest.mark.parametrize("method", ["dgl", "dtp", "dni", "bp"])
@pytest.mark.parametrize("depth", [4, 24, pytest.param(96, marks=pytest.mark.slow)])
def test_depth_adds_no_line(method: str, depth: int) -> None:
    found = certificate(method, depth)
    short, long = str(found).splitlines(), found.text(verbose=True).splitlines()
    assert len(short) <= 20
    assert max(map(len, short + long)) <= 120
    assert found.verdict in short[1]
    assert found.graph_hash in str(found)
    assert all(any(line.startswith(("module", "auxiliary")) and owner.name in line for line in long)
               for owner in found.owners)  # fmt: skip


def test_modules_of_a_kind_share_a_line_and_the_others_have_their_own() -> None:
    lines = [line.split() for line in str(certificate("dni", 24)).splitlines()]
    assert [line[:6] for line in lines if line[0] in ("module", "modules", "auxiliaries")] == [
        ["module", "0:", "42", "parameters;", "synthetic", "on"],
        ["auxiliaries", "0.s..ser", "...", "22...ser", "(23):", "24,541,322"],
        ["modules", "1", "...", "22", "(22):", "924"],
        ["module", "23:", "21", "parameters;", "loss", "on"],
    ]


def with_trouble(count: int) -> locc.Certificate:
    """Return a certificate with everything that may go wrong, `count` times, and modules of no two kinds."""
    found = certificate("bp", 24)
    owners = [
        dataclasses.replace(o, objectives=(dataclasses.replace(o.objectives[0], name=f"{o.name}.{o.name}x"),))
        for o in found.owners
    ]
    return dataclasses.replace(
        found,
        owners=tuple(owners),
        couplings=tuple(Coupling("t", ("0", "1"), f"coupling number {i} {'c' * 130}") for i in range(count)),
        warnings=tuple(f"warning number {i} " + "and more " * 40 for i in range(count)),
        checks=tuple(dataclasses.replace(c, status="incomplete") for c in found.checks),
        reasons=tuple(f"reason number {i} " + "and more " * 40 for i in range(count)),
    )


@pytest.mark.parametrize("count", [1, 2, 5])
def test_what_must_be_known_is_said_whatever_its_number(count: int) -> None:
    text = str(with_trouble(count))
    lines = text.splitlines()
    assert len(lines) <= 20
    assert max(map(len, lines)) <= 120
    assert "NOT PROVED: the reachability on the graph is incomplete" in lines[1]
    for what in ("coupling", "warning", "reason"):
        assert f"{what} number 0" in text
    for what in ("coupling", "warning"):
        assert (f"{what} number 1" in text) == (count == 2)
    assert text.count("and 4 more") == (2 if count == 5 else 0)
    assert ("(5 reasons)" in lines[3]) == (count == 5)
    assert "further kinds" in text


def test_an_objective_that_not_every_check_saw_is_no_kind_of_those_that_all_saw() -> None:
    found = certificate("dgl", 4)
    owner = found.owners[2]
    unseen = dataclasses.replace(owner.objectives[0], proved_by=owner.objectives[0].proved_by[:2])
    doubted = dataclasses.replace(owner, objectives=(unseen,))
    text = str(dataclasses.replace(found, owners=(*found.owners[:2], doubted, found.owners[3])))
    assert "2: 49 parameters" not in str(found)
    assert f"{owner.name}: {owner.count} parameters; loss (seen by 2 of 3 checks)" in text
