"""`locc train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from locc.commands.flags import MisuseError
from locc.commands.method_command import DEFAULT, method_options
from locc.commands.options import (
    BatchOption,
    CacheOption,
    DataOption,
    DebugOption,
    DynamicOption,
    LossOption,
    MethodOption,
    ModelArgument,
    PredictionOption,
    SeedOption,
    ShapeOption,
    SplitsOption,
    TiedOption,
)
from locc.commands.show import leads, out, show_history

if TYPE_CHECKING:
    from locc.commands.loading import Data
    from locc.program import Program


def train(
    ctx: typer.Context,
    model: ModelArgument,
    data: DataOption = None,
    method: MethodOption = DEFAULT,
    splits: SplitsOption = "",
    loss: LossOption = "cross_entropy",
    tied: TiedOption = "auto",
    prediction: PredictionOption = None,
    dynamic: DynamicOption = False,
    epochs: Annotated[
        int, typer.Option(min=0, help="epochs to train now (after --resume: further ones)")
    ] = 10,
    batch_size: BatchOption = 64,
    lr: Annotated[
        float | None,
        typer.Option(min=0.0, help="learning rate of every module; default: the method's own, or 0.001"),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(
            help="adam, adamw, sgd, rmsprop or momentum (sgd with momentum 0.9); default: the method's own"
        ),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="lockstep, sequential (one module after the other), wave (8 batches each), replay, or "
            "pipelined (`torchrun -m locc train ...`); default: lockstep, or the method's own"
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            help="under sequential: keep what earlier modules make of each sample (memory, disk, a folder)"
        ),
    ] = None,
    features_limit: Annotated[str | None, typer.Option(help="how much of it; default: 2GiB")] = None,
    offload: Annotated[
        str | None,
        typer.Option(help="keep what does not train now in files (disk, a folder), or off the GPU (cpu)"),
    ] = None,
    clip: Annotated[float | None, typer.Option(help="largest gradient norm of a module")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="a further argument of locc.compile, such as backend=inductor, batches=16 or "
            "update=in_backward; may be given several times",
        ),
    ] = None,
    seed: SeedOption = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    input_shape: ShapeOption = None,
    save: Annotated[Path | None, typer.Option(help="write a checkpoint at the end, and on Ctrl-C")] = None,
    resume: Annotated[Path | None, typer.Option(help="go on from this checkpoint")] = None,
    onnx: Annotated[Path | None, typer.Option(help="export the trained network to this file")] = None,
    report: Annotated[
        Path | None, typer.Option(help="write an HTML page of the training to this file")
    ] = None,
    progress: Annotated[bool, typer.Option(help="show a progress bar")] = True,
    cache: CacheOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a model.

    Prints the objectives of every module and the final accuracy. Ctrl-C stops after the last whole step;
    with --save, the checkpoint is written then, too.
    """
    import torch

    from locc import compile
    from locc.commands.loading import (
        data_of,
        load_model,
        loss_of,
        placed,
        recipe_of,
        settings_of,
        splits_of,
    )

    if data is None:
        raise MisuseError(
            "there is nothing to train on: give --data digits, or --data package.module:factory"
        )
    for path in (save, onnx, report):
        if path is not None and not path.parent.is_dir():
            raise MisuseError(f"the folder '{path.parent}' of '{path}' does not exist; create it first")
    torch.manual_seed(seed)
    loaders = data_of(data, batch_size, seed, input_shape, loss)
    assert loaders is not None
    further = settings_of(set_ or (), ctx.params.keys() - {"model"})
    program = compile(
        placed(load_model(model)[0], device),
        method,
        splits_of(splits, batch_size),
        loss=loss_of(loss),
        tied=tied,
        prediction=prediction,
        dynamic="auto" if dynamic else None,
        example_inputs=loaders.example(),
        optimizer=recipe_of(method, optimizer, lr),
        schedule=schedule,
        features=features,
        features_limit=features_limit,
        offload=offload,
        clip=clip,
        seed=seed,
        cache=cache,
        **further,
        **method_options(ctx),
    )
    out().print(Text(f"trains with {program.built.training}"), soft_wrap=True)
    if resume is not None:
        program.load(resume)
    _train(program, loaders, epochs, progress, save, onnx, report)


def _train(
    program: Program,
    data: Data,
    epochs: int,
    progress: bool,
    save: Path | None,
    onnx: Path | None,
    report: Path | None,
) -> None:
    console = out()
    history = program.fit(data.training, epochs, validation=data.validation, progress=progress)
    if not progress:
        console.print(Text(str(history)), soft_wrap=True)
    show_history(history)
    if save is not None:
        program.save(save)
        console.print(Text(f"saved {save}"), soft_wrap=True)
    if report is not None and leads():
        console.print(Text(f"wrote {program.report(report)}"), soft_wrap=True)
    if history.interrupted:
        console.print(f"interrupted after {program.steps} steps")
        raise typer.Exit(130)
    for name, loader in (("training", data.training), ("validation", data.validation)):
        if loader is not None:
            console.print(f"{name}: {program.evaluate(loader)}")
    if onnx is not None and leads():
        console.print(Text(f"exported {program.export_onnx(onnx)}"), soft_wrap=True)
