"""`compile`: the stages in a straight line."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from locc import files, registry
from locc.capture import Dynamic
from locc.errors import LoccError, MethodError, warn
from locc.filling import filled
from locc.ir import Inputs, Root
from locc.losses import MODEL, Loss
from locc.lower import stages
from locc.partition import TiedPolicy
from locc.program import Program
from locc.proof import prove
from locc.quiet import attempting
from locc.recipes import Recipe
from locc.request import Request, Splits, on_device, refuse_empty, rewrite
from locc.rewrite import Method, configure, options
from locc.rewrite.heads import strangers
from locc.rewrite.targets import misfit
from locc.runtime import Built, Compiled, Executor, Settings, waves, within
from locc.runtime import replicas as replication
from locc.runtime.compiled import Codes
from locc.runtime.fingerprint import fingerprint
from locc.runtime.graphs import Graphs, recorder_for
from locc.runtime.offload import Offload, OnDisk
from locc.runtime.recompute import computed_again
from locc.runtime.replay import Replay
from locc.runtime.visits import InHostMemory, device_for
from locc.snapshot import undone_on_failure

_log = logging.getLogger("locc")
_told: WeakValueDictionary[tuple[int, str], nn.Module] = WeakValueDictionary()


def compile(
    model: nn.Module,
    method: str | Method = "bp",
    splits: Splits = (),
    *,
    loss: str | Callable[[Any, Any], Tensor] = "cross_entropy",
    example_inputs: Any = None,
    prediction: str | int | None = None,
    dynamic: Dynamic = None,
    optimizer: Callable[..., torch.optim.Optimizer] | Recipe | None = None,
    schedule: str | None = None,
    batches: int | None = None,
    features: str | Path | None = None,
    features_limit: int | str | None = None,
    buffer: int | None = None,
    policy: str | None = None,
    reuse: int | None = None,
    slow: Mapping[str, float] | None = None,
    stages: Sequence[Sequence[str]] | None = None,
    timeout: float | None = None,
    replicas: int | None = None,
    backend: str = "eager",
    strict: bool = False,
    group: int | str | None = None,
    offload: str | Path | None = None,
    tied: str = "auto",
    scheduler: Any = None,
    clip: float | None = None,
    accumulate: int = 1,
    autocast: torch.dtype | str | None = None,
    seed: int | None = None,
    atomic: bool = False,
    update: str = "after_backward",
    recompute: bool | str | Sequence[str] = False,
    verify: bool = True,
    cache: bool = False,
    weights: str | Path | None = None,
    **method_options: Any,
) -> Program:
    """Compile a model for local learning.

    Args:
        model: any module; its own parameters are trained in place.
        method: the id of a registered method (`locc.methods()`), or a configured one (`locc.method`).
        splits: submodules after which to cut, by name or glob (a container ends with its last child; a glob
            leaves out cuts beside which nothing could train); or K for K modules of balanced cost (counted
            operations and parameters), cut where the fewest parameters are shared; or `locc.fit(memory=
            "2GiB", batch=64)` for the fewest modules that keep to a budget. Markers (`locc.split`) in the
            forward are used as well.
        loss: "cross_entropy", "mse", "bce", "l1"; "model" for the loss that the model's own forward returns
            (Hugging Face, with `labels` among the inputs); or a callable(output, target) that returns a 0-d
            tensor. Local heads train on the part of it that reads the predictions.
        example_inputs: a batch as `step` takes it; two samples are enough, and compiling runs the whole
            model on them. Without one, the first step compiles on the first few samples of its batch.
        prediction: where the forward returns several tensors, the name of the one to learn by ("seg", "0"):
            named losses, local heads and methods' own rules read it. None: every output that the last module
            computes and the loss reads (but auxiliary ones, `aux...`) is a task with heads of its own.
        dynamic: dimensions of the inputs that may vary beside the batch (lengths of sequences, sizes of
            images, numbers of points): "auto" for every one that the model's code leaves open, or by the
            input's name in `forward`, {"x": {2: "H", 3: "W"}} or {"x": [2, 3]}. Dimensions of one name have
            one size. Each is tried at a second size while compiling.
        optimizer: callable(params) -> Optimizer, called for each owner; or a `locc.Recipe`, such as
            `locc.methods()["dni"].recipe.at(lr=1e-4)`. None: the method's own recipe, published with it.
        schedule: "lockstep", which is the default unless a method is published with another; "sequential"
            (each module is trained to the end, then frozen); "wave" (each module trains on `batches` batches
            before the next one starts); "pipelined" (modules train at the same time in the processes that
            `torchrun` starts with one script, without a backward wave); or "replay" (each module trains at
            its own pace, on what it has kept of the one below; in one process, or in those of `torchrun`).
            "wave" and "pipelined" end with the bits of "lockstep"; these three are refused where a program is
            not pipeline-exact.
        batches: of a wave, 8 by default: how often a module's parameters serve once they are loaded. What
            passes between modules is kept for all of them.
        features: where `fit` keeps what the modules before the one that trains hand to it: "memory", "disk"
            (a temporary file without a name) or a folder for that file. For schedule="sequential", and for
            methods that train module after module; see below.
        features_limit: how much of it at most, in bytes or as "500MB"; "2GiB" by default.
        buffer: of "replay", the batches that each module but the first keeps, 50 by default; 0 is lock-step.
        policy: of "replay", which of them it reads: "priority-lifo" (the newest of those used least, the
            default) or "fifo" (each once).
        reuse: of "replay", how often a module may train on one batch, 10 by default.
        slow: of "replay", the share of its turns that a module loses, by its name: {"layer1": 0.5}.
        stages: of "pipelined" and "replay", the modules of each rank, in order: [["layer1"], ["layer2",
            "output"]]. None: neighbours together, by seconds that rank 0 measures on the first batch.
        replicas: of "pipelined", how many ranks run each stage, 1 by default, each a share of every batch:
            gradients and objectives are means over the whole, weighted by samples, and buffers those of the
            first share, as with `DistributedDataParallel`. The loss has to be a mean over samples; what
            compares samples (BatchNorm, similarities) sees those of a share.
        timeout: of "pipelined" and "replay", seconds after which a silent rank is lost, 600 by default.
        backend: "eager"; or "inductor": `torch.compile` compiles each module's code, forward and backward,
            when it first runs, and once more when sizes vary (on the CPU this needs a C++ compiler). What it
            cannot compile runs eagerly, and is logged; `program.backend_report` lists it with the reason.
            "vmap", for schedule="wave": modules of one structure run as one, each on another batch, the rest
            by themselves; `program.backend_report` says why.
            "cudagraphs", for a model on a GPU: a module's whole step is one CUDA graph for each shape of
            batch, launched at once; what cannot be recorded runs eagerly, and `program.backend_report` says
            why.
        strict: of "inductor" and "cudagraphs", an error instead for what cannot be compiled or recorded; the
            step that meets it is then undone.
        group: of "inductor", neighbours whose steps are compiled as one, forward and backward, the longest
            runs that allocate no more than this in a step ("64MiB", or bytes), for networks of tiny modules.
            What cannot join runs by itself; `program.backend_report` has the groups, and why.
        offload: "disk" or a folder: parameters, buffers and optimizer state are in files (without a name, in
            the folder of temporary files or in that one) and those of one module at a time in memory, for
            training that does not fit there. "cpu": they are in the memory of the CPU, and on the GPU are
            those of the module whose turn it is and of the next. It ends with the bits of training without;
            see below.
        tied: policy for a parameter that two modules use (an embedding that is the output layer's weight as
            well): "copy" (each module trains its own, which takes its place in the model), "owner" (the first
            one that uses it trains it, the others read it) or "error". "auto" is "owner" for `bp`, which then
            trains as without locc, and "copy" for local methods, logged once.
        scheduler: callable(optimizer) -> learning-rate scheduler, or a dict of them by module.
        clip: largest gradient norm of each owner.
        accumulate: number of steps whose mean gradient makes one update of the parameters. What a method
            sets without a gradient (state, moving averages, closed forms) is set in every step.
        autocast: "bfloat16" or "float16": run the forward under autocast.
        seed: of auxiliaries, dropout and noise; the default is `torch.initial_seed()`.
        atomic: undo a whole step when an objective is not finite, earlier modules' updates included;
            keeps a copy of all parameters and optimizer state during the step.
        update: "after_backward"; or "in_backward": a parameter is updated, and its gradient dropped, as soon
            as that is known, so that one gradient at a time is in memory. It trains the same bits where the
            optimizer treats each parameter by itself, as those of PyTorch do; hooks of the optimizer run for
            each parameter. Refused with `clip`, with `accumulate`, and where a method reads a module's
            parameters between its backward pass and its update.
        recompute: submodules, by name or glob, that keep their inputs alone between the forward and the
            backward pass, which runs their forward again as far as it needs; True for every one that the
            splits leave whole and that holds layers. It trains the same bits: the second run draws the same
            random numbers, and leaves buffers (BatchNorm's statistics) as they are. Hooks of what is inside
            run twice.
        verify: prove locality before returning.
        cache: keep what capturing this model has shown, and use it the next time; see below.
        weights: a safetensors file, or a folder of them, with values for a model on the `meta` device; see
            below.
        **method_options: hyper-parameters of the method.

    With `features=` a stage of a sequential training computes once what the modules at rest (in eval mode)
    make of each sample; its later passes cost the module that trains, and nothing below it, whose hooks do
    not run then. A sample goes by its content, so that loaders may shuffle. Where every batch comes again
    with the same samples, training ends with the bits that it has without `features=`; where other samples
    are beside one, kernels may round otherwise. What is over the limit is computed in every step, and so is
    everything where the inputs are augmented anew in each pass, or where what rests makes of a sample what
    depends on those beside it: the log says so. Features go with the end of their stage, or of `fit`,
    however that ends.

    With `offload="disk"` a tensor's storage is a file that is mapped into memory, on Linux and for models on
    the CPU. A module's files are let go when the next one's turn comes, and those of that one are asked for;
    gradients are in memory during a module's turn alone. The system reads and writes them, and keeps in
    memory what fits. With "wave" that is paid once for all batches of a wave; a step of `bp` pays it twice.
    Checkpoints, `evaluate`, `predict` and exports read the files as they go. In memory are all tensors under
    a page, what passes between modules, and one module's gradients; while compiling (the first step, without
    `example_inputs`), and in `program.diagnose` and `program.forecast`, copies of tensors and the gradients
    of the whole are in files, too.

    With `offload="cpu"` the model is one in the memory of the CPU (pinned), wherever it was, and its modules
    visit the GPU that it was on, or the current one: a module is copied there with its optimizer state and
    gradients that wait for more while the one before it computes, and back after its turn. A step ends when
    all are back, so that checkpoints, exports and your own code find a model on the CPU. The program's own
    calls (`predict`, `evaluate`) let modules visit as well, in eval mode and without gradients.

    A model that does not fit in memory is built within `locc.deferred()`, where its tensors are in files from
    the beginning; or on the `meta` device. Then compiling gives it memory (files, with `offload=`, and where
    several processes will each hold a part of it) module by module, submodules first: with the values in
    `weights`, or as each module's own `reset_parameters()` draws them, which for PyTorch's modules are those
    that `seed` gives where the model is built.

    With `cache=True` a file is kept in the folder `$LOCC_CACHE` (by default `locc` in the user's folder of
    caches: `~/.cache/locc` on Linux). It is found by the source of locc and of the model's classes, the
    versions of Python and PyTorch, the model's tensors and settings, the inputs' shapes, splits and
    `dynamic`; it is JSON and holds no code. The model is traced again each time: the file says that the very
    same graph has been compared with the model, so that the output at one size is all that is compared anew.
    A file that does not fit or is broken is noted in the log and replaced; any file may be deleted.

    Returns:
        The program.

    Raises:
        LoccError: one of its subclasses; the model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise LoccError(f"model must be a torch.nn.Module; found {type(model).__name__}")
    if isinstance(model, Compiled):
        raise LoccError("this is a program already; pass program.model to compile its model anew")
    chosen, name = _method(method, method_options)
    order = schedule or chosen.schedule
    settings = Settings(
        optimizer=chosen.recipe if optimizer is None else optimizer,
        schedule=order,
        backend=backend,
        clip=clip,
        accumulate=accumulate,
        scheduler=scheduler,
        autocast=autocast,
        seed=seed,
        atomic=atomic,
        batches=batches,
        features=features,
        features_limit=features_limit,
        stages=None if stages is None else tuple(map(tuple, stages)),
        timeout=timeout,
        replicas=replicas,
        offload=offload,
        replay=_replay(order, buffer=buffer, policy=policy, reuse=reuse, slow=slow),
        labels_within=loss == MODEL,
        update=update,
        recompute=_names(recompute),
        strict=strict,
        group=group,
    )
    request = Request(
        Root(model),
        chosen,
        name,
        splits,
        Loss(loss),
        tied,
        settings,
        verify,
        dynamic,
        prediction,
        cache,
        weights,
    )
    TiedPolicy(tied)
    program = Program(request.root, name, settings, lambda program, x: build(request, program, x))
    if example_inputs is not None:
        refuse_empty(Inputs.of(model, example_inputs))
        program.complete(example_inputs)
    return program


def _names(given: Any) -> Any:
    """Return names or globs as a tuple; anything else as it is, for `Settings` to judge."""
    if isinstance(given, str):
        return (given,)
    return tuple(given) if isinstance(given, Sequence) else given


def _replay(schedule: str, **given: Any) -> Replay | None:
    """Return how modules replay, where they do or the user says how."""
    chosen = {name: value for name, value in given.items() if value is not None}
    return Replay(**chosen) if chosen or schedule == "replay" else None


def build(request: Request, program: Compiled, inputs: Inputs) -> Built:
    """Run the stages: capture, partition, rewrite, verify, and set up the runtime."""
    seed = torch.initial_seed() if request.settings.seed is None else request.settings.seed
    place, meanwhile = request.settings.files, request.meanwhile
    with (
        torch.random.fork_rng(),
        undone_on_failure(request.root),
        attempting(),
        filled(request.root.model, request.weights, meanwhile, seed),
        files.keeping(meanwhile, () if place is None else _tensors(request.root)),
    ):
        device = device_for(program.device) if request.settings.visits else program.device
        recorder = recorder_for(device) if request.settings.backend == "cudagraphs" else None
        inputs = on_device(inputs, program.device)
        torch.manual_seed(seed)
        ir = rewrite(request, inputs, TiedPolicy(request.tied, request.method.ties))
        program.root.aux.to(program.device)
        phases = stages(ir, request.name, request.settings.schedule == "sequential")
        request.settings.check_used(ir, request.name)
        request.settings.check_resting(ir, phases, request.name)
        learners = request.settings.learners(ir)
        training = request.settings.training(learners)
        if request.settings.replay is not None:
            training = f"{training}; {request.settings.replay}"
        rates = {name: learner.rate for name, learner in learners.items()}
        advice = (*request.method.advise(ir, rates), *strangers(ir))
        certificate = None
        if request.verify:
            real = None if place is None else False  # real tensors would take what training does
            certificate = prove(
                ir, request.name, learners, inputs, real=real, training=training, advice=advice
            )
        if request.settings.replay is not None:
            request.settings.replay.check([module.name for module in ir.modules])
        if request.settings.schedule in ("wave", "pipelined", "replay"):
            waves.check(ir, request.name, certificate, request.settings.schedule)
        if request.settings.update == "in_backward":
            within.check(ir, phases, request.name)
        if (request.settings.replicas or 1) > 1:
            replication.check(ir, phases, request.name)
        recompute = computed_again(ir, request.settings.recompute)
        schedulers = request.settings.schedulers(learners)
        _tell(request.name, training, advice)
        offload: Offload | None = None
        if place is not None:
            offload = OnDisk(place, ir, learners)
        elif request.settings.visits:
            offload = InHostMemory(ir, learners, device)
            ir.captured.example = on_device(inputs, torch.device("cpu"))
    with torch.no_grad():
        for parameter, value in ir.initial:
            parameter.copy_(value)
    _note(request.root.model, ir.captured.notes)
    executor = Executor(
        request.root,
        learners,
        seed,
        request.settings.accumulate,
        request.settings.dtype,
        device,
        atomic=request.settings.atomic,
        offload=offload,
        in_backward=request.settings.update == "in_backward",
        recompute=recompute,
        codes=Codes(request.settings.strict),
        graphs=None if recorder is None else Graphs(ir, recorder, request.settings.strict),
        backend=request.settings.backend,
    )

    def unreadable(target: Any, batch: int) -> str | None:
        kinds = request.method.target
        of_method = (misfit(request.name, kinds, task.spec, task.own(target)) for task in ir.tasks)
        return next(filter(None, of_method), None) or Loss.of(ir.loss_function).misfit(target, batch)

    given = fingerprint(request.loss.given)
    asked = request.words()
    return Built(
        ir, certificate, learners, schedulers, executor, phases, unreadable, given, training, advice, asked
    )


def _tensors(root: nn.Module) -> list[tuple[str, Tensor]]:
    return [*root.named_parameters(), *root.named_buffers()]


def _note(model: nn.Module, notes: Sequence[str]) -> None:
    """Say, once for each model, what capturing did that nobody has asked for.

    It is logged and no warning, for the user's code has nothing to mend.
    """
    for note in notes:
        if _told.get((id(model), note)) is not model:
            _told[id(model), note] = model
            _log.warning("locc: %s: %s", type(model).__name__, note)


def _tell(name: str, training: str, advice: Sequence[str]) -> None:
    """Log by what a program trains, and warn where it may do so badly."""
    _log.info("method '%s' trains with %s", name, training)
    for text in advice:
        warn(f"method '{name}' may train badly: {text}")


def _method(method: str | Method, given: dict[str, Any]) -> tuple[Method, str]:
    if isinstance(method, Method):
        if given:
            raise MethodError(
                f"the method is configured already; give {', '.join(given)} to locc.method(...) instead of"
                " compile"
            )
        return method, registry.name_of(method)
    if not isinstance(method, str):
        raise MethodError(f"method must be an id or a Method; found {type(method).__name__}")
    chosen = registry.load(method)
    own = [name for name in inspect.signature(compile).parameters if name != "method_options"]
    for option in given:
        close = difflib.get_close_matches(option, own, 1, cutoff=0.7)
        if option not in options(chosen) and close:
            raise MethodError(
                f"compile has no argument '{option}', nor has method '{method}'; nearest: '{close[0]}'"
            )
    return configure(method, chosen, given), method
