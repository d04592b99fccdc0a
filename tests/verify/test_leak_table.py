"""The ways in which locality is lost, and where each of them is planted."""

from __future__ import annotations

import pytest

from .leaks import LEAKS
from .plants import PLANTS

ITEMS = {
    "a missing detach": ("reads_stash", "foreign_module", "an edge without stop_gradient"),
    "a live tensor written into a buffer and read back": ("live_buffer",),
    "a persistent buffer that keeps history": ("history_buffer",),
    "an in-place addition of a live tensor after a detach": ("inplace_after_detach",),
    "an in-place copy of a live tensor into a view of a detached one": ("view_copy_after_detach",),
    "no_grad around the wrong line": ("no_grad_wrong_line",),
    "a straight-through function": ("straight_through",),
    "a custom function that writes a foreign gradient in its backward": ("custom_function",),
    "a tensor hook that does": ("tensor_hook",),
    "a re-entrant checkpoint around a foreign module": ("checkpoint_reentrant",),
    "a non-re-entrant checkpoint around a foreign module": ("checkpoint_non_reentrant",),
    "a tied weight": ("a tied weight", "a network of two owners", "a network that holds a foreign layer"),
    "a view of a foreign weight": ("foreign_weight", "a parameter on a view", "a network on a view"),
    "an activation stashed for the next step": ("reads_previous_stash", "reads_foreign_previous"),
    "two optimizers over one parameter": (
        "an optimizer with one parameter more",
        "an optimizer with a head more",
    ),
    "two optimizers over overlapping storage": (
        "an optimizer over memory of another",
        "an optimizer over memory of a head",
        "parameters that interleave",
    ),
    "a foreign parameter moved by weight decay": (
        "an optimizer that decays",
        "an optimizer that decays a head",
    ),
    "a .data alias changed in place": ("data_alias_parameter", "data_alias_activation"),
}


def _places(name: str) -> set[str]:
    """Where a plant is tried: an act in models and in the networks and functions that a pass adds."""
    return {"model", "graph"} if name in LEAKS else {PLANTS[name].place}


@pytest.mark.parametrize("item", ITEMS)
def test_each_way_is_planted_in_models_and_in_graphs(item: str) -> None:
    assert set().union(*(_places(name) for name in ITEMS[item])) == {"model", "graph"}
