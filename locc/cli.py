"""The command line: `locc methods | inspect | train | verify | export | reproduce`.

What imports PyTorch is imported by the commands that need it: help and completion answer at once.

Exit codes: 0 when all went well, 1 when a check failed or locc refused, 2 when the command line itself is
wrong, 130 after Ctrl-C.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from locc.commands.flags import MisuseError
from locc.commands.method_command import DEFAULT, MethodCommand, method_options
from locc.commands.options import (
    BatchOption,
    CacheOption,
    DataOption,
    DebugOption,
    DtypeOption,
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
from locc.commands.reproduce import reproduce
from locc.commands.show import (
    describe,
    fail,
    leads,
    method_table,
    out,
    show_examination,
    show_history,
    show_method,
    show_warning,
)
from locc.errors import LoccError, LoccWarning, nearest
from locc.version import __version__

if TYPE_CHECKING:
    from locc.commands.loading import Data
    from locc.program import Program

HELP = """Train neural networks by local learning: no gradient crosses a module boundary, and that is proved.

MODEL is package.module:factory or path/to/file.py:factory; the factory returns a torch.nn.Module
(a class or an instance will do). Try:

    locc train examples/models.py:small_cnn --data digits --method predsim --splits layer1,layer2,layer3

Exit codes: 0 all went well, 1 a check failed or locc refused, 2 the command line is wrong, 130 Ctrl-C.
"""

app = typer.Typer(
    name="locc",
    help=HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(f"locc {__version__}")
        raise typer.Exit


VersionOption = Annotated[
    bool,
    typer.Option("--version", callback=_tell_version, is_eager=True, help="print the version and leave"),
]


@app.callback()
def before(version: VersionOption = False) -> None:
    """Take the options that stand before the command; the help is the app's."""


REQUIRED = {
    "weak": ("weakly modular", "strictly modular"),
    "strict": ("strictly modular",),
}


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Tell an error in one message; with --debug, let it through."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always", LoccWarning)
                warnings.showwarning = show_warning
                command(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            out().print("interrupted")
            raise typer.Exit(130) from None
        except Exception as error:  # the user's code runs here: one message for whatever it raises
            if kwargs.get("debug"):
                raise
            message, misuse = describe(error)
            fail(message, misuse)

    return run


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="show everything about this method")] = None,
) -> None:
    """List the registered methods, or show one."""
    from locc import methods as catalogue

    known = catalogue()
    if name is None:
        out().print(method_table(known.values()))
        return
    if name not in known:
        fail(f"there is no method '{name}'; {nearest(name, known)}", misuse=True)
    if (error := known[name].error) is not None:
        fail(f"'{name}' cannot be loaded: {type(error).__name__}: {error}")
    show_method(known[name])


@app.command(cls=MethodCommand)
@guarded
def inspect(
    ctx: typer.Context,
    model: ModelArgument,
    method: MethodOption = DEFAULT,
    splits: SplitsOption = "",
    loss: LossOption = "cross_entropy",
    tied: TiedOption = "auto",
    prediction: PredictionOption = None,
    dynamic: DynamicOption = False,
    input_shape: ShapeOption = None,
    input_dtype: DtypeOption = "float32",
    data: DataOption = None,
    batch_size: BatchOption = 4,
    seed: SeedOption = 0,
    ir: Annotated[bool, typer.Option("--ir", help="print the training graph as Python")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="print the instructions of one step")] = False,
    debug: DebugOption = False,
) -> None:
    """Show what compiling would do, or why not.

    Prints modules, boundaries and objectives, and the training graph with --ir. Trains nothing.
    """
    import torch

    from locc import examine
    from locc.commands.loading import data_of, inputs_of, load_model, loss_of, splits_of

    torch.manual_seed(seed)
    network, own = load_model(model)
    loaded = data_of(data, batch_size, seed, input_shape, loss)
    example = inputs_of(loaded, input_shape, input_dtype, batch_size, own)
    found = examine(
        network,
        method,
        splits_of(splits, batch_size),
        loss=loss_of(loss),
        tied=tied,
        prediction=prediction,
        dynamic=_free(dynamic),
        example_inputs=example,
        **method_options(ctx),
    )
    show_examination(found, ir, plan)
    if not found.ok:
        raise typer.Exit(1)


@app.command(cls=MethodCommand)
@guarded
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
    for path in (save, onnx):
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
        dynamic=_free(dynamic),
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
    _train(program, loaders, epochs, progress, save, onnx)


def _train(
    program: Program, data: Data, epochs: int, progress: bool, save: Path | None, onnx: Path | None
) -> None:
    console = out()
    history = program.fit(data.training, epochs, validation=data.validation, progress=progress)
    if not progress:
        console.print(Text(str(history)), soft_wrap=True)
    show_history(history)
    if save is not None:
        program.save(save)
        console.print(Text(f"saved {save}"), soft_wrap=True)
    if history.interrupted:
        console.print(f"interrupted after {program.steps} steps")
        raise typer.Exit(130)
    for name, loader in (("training", data.training), ("validation", data.validation)):
        if loader is not None:
            console.print(f"{name}: {program.evaluate(loader)}")
    if onnx is not None and leads():
        console.print(Text(f"exported {program.export_onnx(onnx)}"), soft_wrap=True)


@app.command(cls=MethodCommand)
@guarded
def verify(
    ctx: typer.Context,
    model: ModelArgument,
    method: MethodOption = DEFAULT,
    splits: SplitsOption = "",
    loss: LossOption = "cross_entropy",
    tied: TiedOption = "auto",
    prediction: PredictionOption = None,
    dynamic: DynamicOption = False,
    input_shape: ShapeOption = None,
    input_dtype: DtypeOption = "float32",
    data: DataOption = None,
    batch_size: BatchOption = 4,
    seed: SeedOption = 0,
    json: Annotated[
        Path | None, typer.Option(help="write the certificate to this file; - is standard output")
    ] = None,
    require: Annotated[
        str | None,
        typer.Option(help="weak or strict: fail unless the verdict is weakly, or strictly, modular"),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="print a block for each module")] = False,
    cache: CacheOption = False,
    debug: DebugOption = False,
) -> None:
    """Prove that no gradient crosses a boundary.

    Prints the certificate; --json writes it to a file as well (`--json -`: to standard output, and the rest
    to standard error). With --data, the checks run on its first
    batch; otherwise a target is made up. Fails where something crosses, where a check
    could not be completed, and where the verdict is not what --require asks for.
    """
    from locc import verify as prove
    from locc.commands.loading import data_of

    if require is not None and require not in REQUIRED:
        raise MisuseError(f"--require '{require}' is unknown; {nearest(require, REQUIRED)}")
    loaded = data_of(data, batch_size, seed, input_shape, loss)
    program = _compiled(
        ctx, model, method, splits, loss, tied, prediction, dynamic, input_shape, input_dtype, loaded,
        batch_size, seed, cache,
    )  # fmt: skip
    certificate = prove(program, *loaded.first()) if loaded is not None else prove(program)
    streamed = json is not None and str(json) == "-"
    out(stderr=streamed).print(Text(certificate.text(verbose)), soft_wrap=True)
    if streamed:
        typer.echo(certificate.to_json())
    elif json is not None:
        _write(json, certificate.to_json() + "\n")
    if not certificate.complete:
        fail("a check could not be completed, so nothing is proved: " + "; ".join(certificate.warnings))
    if require is not None and certificate.verdict not in REQUIRED[require]:
        fail(f"--require {require}: the program is {certificate.verdict}: {'; '.join(certificate.reasons)}")


@app.command(cls=MethodCommand)
@guarded
def export(
    ctx: typer.Context,
    model: ModelArgument,
    onnx: Annotated[Path | None, typer.Option(help="write the whole network to this file")] = None,
    modules: Annotated[
        Path | None, typer.Option(help="write one file per module and a manifest to this folder")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="export the weights of this checkpoint")] = None,
    method: MethodOption = DEFAULT,
    splits: SplitsOption = "",
    loss: LossOption = "cross_entropy",
    tied: TiedOption = "auto",
    prediction: PredictionOption = None,
    dynamic: DynamicOption = False,
    input_shape: ShapeOption = None,
    input_dtype: DtypeOption = "float32",
    data: DataOption = None,
    batch_size: BatchOption = 4,
    seed: SeedOption = 0,
    opset: Annotated[int | None, typer.Option(help="ONNX opset; default: the exporter's own choice")] = None,
    check: Annotated[
        bool, typer.Option(help="compare with PyTorch in onnxruntime at three batch sizes")
    ] = True,
    cache: CacheOption = False,
    debug: DebugOption = False,
) -> None:
    """Write ONNX: one file, or one for each module.

    With --checkpoint, give the method, splits and options that the checkpoint was trained with.
    """
    from locc.commands.loading import data_of

    if onnx is None and modules is None:
        raise MisuseError("nothing to write: give --onnx model.onnx, --modules folder, or both")
    loaded = data_of(data, batch_size, seed, input_shape, loss)
    program = _compiled(
        ctx, model, method, splits, loss, tied, prediction, dynamic, input_shape, input_dtype, loaded,
        batch_size, seed, cache,
    )  # fmt: skip
    if checkpoint is not None:
        program.load(checkpoint)
    if onnx is not None:
        out().print(Text(f"exported {program.export_onnx(onnx, opset=opset, check=check)}"), soft_wrap=True)
    if modules is not None:
        manifest = program.export_onnx_modules(modules, opset=opset, check=check)
        out().print(Text(f"exported {manifest}"), soft_wrap=True)


app.command()(guarded(reproduce))


def _compiled(
    ctx: typer.Context, model: str, method: str, splits: str, loss: str, tied: str,
    prediction: str | None, dynamic: bool,
    shapes: list[str] | None, dtype: str, data: Data | None, batch_size: int, seed: int, cache: bool,
) -> Program:  # fmt: skip
    """Compile without the proof: `verify` makes its own, and an export needs none."""
    import torch

    from locc import compile
    from locc.commands.loading import inputs_of, load_model, loss_of, splits_of

    torch.manual_seed(seed)
    network, own = load_model(model)
    example = inputs_of(data, shapes, dtype, batch_size, own)
    return compile(
        network, method, splits_of(splits, batch_size), loss=loss_of(loss), tied=tied, seed=seed,
        verify=False, prediction=prediction, dynamic=_free(dynamic), example_inputs=example, cache=cache,
        **method_options(ctx),
    )  # fmt: skip


def _free(dynamic: bool) -> str | None:
    return "auto" if dynamic else None


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise LoccError(f"cannot write '{path}': {error.strerror or error}") from error


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
