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
    method_table,
    out,
    show_examination,
    show_method,
    show_warning,
)
from locc.commands.train import train
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
        dynamic="auto" if dynamic else None,
        example_inputs=example,
        **method_options(ctx),
    )
    show_examination(found, ir, plan)
    if not found.ok:
        raise typer.Exit(1)


app.command(cls=MethodCommand)(guarded(train))


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
    program = _compiled(ctx, loaded)
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
    program = _compiled(ctx, loaded)
    if checkpoint is not None:
        program.load(checkpoint)
    if onnx is not None:
        out().print(Text(f"exported {program.export_onnx(onnx, opset=opset, check=check)}"), soft_wrap=True)
    if modules is not None:
        manifest = program.export_onnx_modules(modules, opset=opset, check=check)
        out().print(Text(f"exported {manifest}"), soft_wrap=True)


app.command()(guarded(reproduce))


def _compiled(ctx: typer.Context, loaded: Data | None) -> Program:
    """Compile without the proof: `verify` makes its own, and an export needs none."""
    import torch

    from locc import compile
    from locc.commands.loading import inputs_of, load_model, loss_of, splits_of

    given = ctx.params
    torch.manual_seed(given["seed"])
    network, own = load_model(given["model"])
    example = inputs_of(loaded, given["input_shape"], given["input_dtype"], given["batch_size"], own)
    return compile(
        network,
        given["method"],
        splits_of(given["splits"], given["batch_size"]),
        loss=loss_of(given["loss"]),
        dynamic="auto" if given["dynamic"] else None,
        example_inputs=example,
        verify=False,
        **{name: given[name] for name in ("tied", "prediction", "seed", "cache")},
        **method_options(ctx),
    )


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
