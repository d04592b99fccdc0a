"""Which of the model's outputs are its tasks: predictions that local heads imitate."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from locc.capture.tree import flatten, spell
from locc.errors import MethodError, nearest
from locc.ir import Inputs, TensorSpec, TrainingGraph
from locc.ir.task import Task
from locc.losses import MODEL, Loss, own_loss
from locc.proof.experiment.batch import made_up, outputs_of, small_batch


def tasks_of(ir: TrainingGraph, loss: Loss, asked: str | int | None, inputs: Inputs) -> tuple[Task, ...]:
    """Return the tasks of a model, the main prediction first.

    An output is a task where the last module computes it, the loss reads it, and it neither enters the main
    prediction nor is computed from it. Auxiliary classifiers (`aux`, `aux_logits`) are none: a local head is
    one.

    Args:
        ir: the partitioned forward.
        loss: the user's.
        asked: the name of the only one, where the user has chosen it.
        inputs: of the example.

    Raises:
        MethodError: no floating-point output is called `asked`.
    """
    outputs = _outputs(ir)
    if asked is not None:
        asked = str(asked)  # 0, of a tuple
        if asked not in outputs:
            raise MethodError(
                f"prediction='{asked}' names no floating-point output of the model; {nearest(asked, outputs)}"
            )
        return (outputs[asked],)
    main = next(task for task in outputs.values() if task.value is ir.prediction)
    if not main.path or loss.name not in (None, MODEL):
        return (main,)
    found = [main, *(task for task in outputs.values() if _separate(ir, task, main))]
    read = _read(ir, found, inputs) if loss.name is None else _behind(own_loss(ir.output_structure()))
    return tuple(task for task in found if task.value in read) or (main,)


def _outputs(ir: TrainingGraph) -> dict[str, Task]:
    """Return the floating-point tensors that the forward returns, by name; one returned alone is 'output'."""
    leaves, structure = flatten(ir.output_structure())
    found: dict[str, Task] = {}
    for leaf, path in zip(leaves, structure.paths(), strict=True):
        spec = leaf.meta.get("spec") if isinstance(leaf, fx.Node) else None
        if isinstance(spec, TensorSpec) and spec.differentiable and spec.shape:
            name = spell(path).strip("[]'") or "output"
            found[name] = Task(name, leaf, tuple(key for _, key in path))
    return found


def _separate(ir: TrainingGraph, task: Task, main: Task) -> bool:
    made_last = task.value.meta["owner"] == ir.last.name and task.value.meta["role"] == "forward"
    auxiliary = any(str(key).startswith("aux") for key in task.path)
    if auxiliary or not made_last or task.spec.batch_dim is None:
        return False
    return task.value not in _behind(main.value) and main.value not in _behind(task.value)


def _behind(node: object) -> set[fx.Node]:
    """Return a node and all that it is computed from."""
    todo, seen = [node], set[fx.Node]()
    while todo:
        found = todo.pop()
        if isinstance(found, fx.Node) and found not in seen:
            seen.add(found)
            todo += found.all_input_nodes
    return seen


def _read(ir: TrainingGraph, tasks: Iterable[Task], inputs: Inputs) -> set[fx.Node]:
    """Return the predictions that a callable loss reads, as its gradient tells; all if it cannot be tried."""
    ir.tasks = tuple(tasks)  # their targets are to be made up
    batch = small_batch(ir, inputs)
    values = {task.value: made_up(ir, task.value, batch.size).requires_grad_() for task in ir.tasks}
    if batch.stand_in:
        return set(values)
    loss = ir.loss_function(outputs_of(ir, batch.size, values), batch.target)
    found = torch.autograd.grad(loss, list(values.values()), allow_unused=True) if loss.requires_grad else ()
    return {node for node, gradient in zip(values, found, strict=False) if gradient is not None}
