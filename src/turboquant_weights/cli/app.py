"""The commands. Each does one call into the package and prints the result as text, or as one JSON object on stdout."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import __version__, evaluation, ops, quantize_model, save
from .. import budget as budgets
from .. import checkpoint as checkpoints
from ..calibration import Calibration
from ..config import MAX_SEED, TurboQuantConfig, with_skip
from ..errors import ConfigError
from . import tables
from .models import ConversionFormat, Dtype, continue_text, input_embedding, need_tokenizer, open_model, open_unloaded

app = typer.Typer(
    name="turboquant-weights",
    help="Quantize the linear layers of language models to 2-8 bits without data, check what it cost, and run the result.",
    epilog="Start with: turboquant-weights quantize HuggingFaceTB/SmolLM2-135M smollm2-4bit",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str, typer.Argument(help="Hub id, local folder, .gguf file, or a checkpoint of this package.", show_default=False)
]
Checkpoint = Annotated[Path, typer.Argument(help="Folder that `quantize` wrote.", show_default=False)]
DtypeOption = Annotated[Dtype, typer.Option(help="Of what is not quantized. auto: as stored; bfloat16 for a .gguf file.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... [default: cpu]", show_default=False)]
Calibrate = Annotated[
    bool, typer.Option("--calibrate", help="Read a text: the one that comes with the package, or --calibration-text.")
]
CalibrationText = Annotated[
    Path | None,
    typer.Option(help="UTF-8 file that resembles what the model will see; implies --calibrate.", show_default=False),
]
# None unless given: without a text they would have no effect, and that is an error.
Samples = Annotated[
    int | None,
    typer.Option(min=1, help=f"Windows of the text that are read. [default: {Calibration.samples}]", show_default=False),
]
SampleLength = Annotated[
    int | None,
    typer.Option(min=1, help=f"Tokens per window. [default: {Calibration.sample_length}]", show_default=False),
]
GroupSize = Annotated[int, typer.Option(help="Input columns that one rotation mixes: 32, 64 or 128.")]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the rotation's signs.")]
TargetRatio = Annotated[
    float | None, typer.Option(help="Times smaller than bf16, whole file, e.g. 3.2.", show_default=False)
]
TargetBits = Annotated[float | None, typer.Option(help="Bits per parameter of the whole file, e.g. 5.", show_default=False)]
MaxKl = Annotated[float | None, typer.Option(help="Expected KL divergence per token, nats, e.g. 0.01.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead; progress stays on stderr.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"turboquant-weights {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Options before the command."""


@app.command(epilog="Example: turboquant-weights quantize HuggingFaceTB/SmolLM2-135M out --bits 4 --residual-bits 4")
def quantize(
    model: Annotated[str, typer.Argument(help="Hub id, local folder, or .gguf file.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder to create; it appears only when complete.", show_default=False)],
    bits: Annotated[
        int | None, typer.Option(min=2, max=4, help="Bits of the base plane. [default: 4]", show_default=False)
    ] = None,
    residual_bits: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=4,
            help="Bits of the residual plane; 4 beside --bits 4 doubles the size and loses next to nothing. [default: 0]",
            show_default=False,
        ),
    ] = None,
    layer_bits: Annotated[
        list[str] | None,
        typer.Option(
            help="PATTERN=BITS: layers that get other bits, e.g. '*.down_proj=4+2'; repeatable, the first match wins.",
            show_default=False,
        ),
    ] = None,
    embedding_bits: Annotated[
        str | None,
        typer.Option(
            help="Quantize the input embedding too, and an output head tied to it, e.g. to 4+2. [default: leave it]",
            show_default=False,
        ),
    ] = None,
    group_size: GroupSize = 128,
    seed: Seed = 0,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            help="Glob pattern of layers to leave alone, e.g. 'lm_head'; repeatable. "
            "[default: the output head and layers tied to an embedding; with a budget none]",
            show_default=False,
        ),
    ] = None,
    calibrate: Calibrate = False,
    calibration_text: CalibrationText = None,
    samples: Samples = None,
    sample_length: SampleLength = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Folder for finished blocks of a calibrated run: repeat the command after an interruption, and it goes on "
            "there. Deleted when OUT is complete.",
            show_default=False,
        ),
    ] = None,
    target_ratio: TargetRatio = None,
    target_bits: TargetBits = None,
    max_kl: MaxKl = None,
    dtype: DtypeOption = Dtype.AUTO,
    device: Device = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is a model folder.")] = False,
    as_json: Json = False,
) -> None:
    """Quantize MODEL and save it to the folder OUT.

    Without further options, and from safetensors, it needs no text and no memory for the model: weights pass through one at
    a time, and the same command goes on after an interruption. With `--calibrate` it reads a text and rounds every layer for
    the inputs it really gets: minutes instead of seconds, and a fraction of the loss. With a budget (`--target-ratio`,
    `--target-bits` or `--max-kl`) it chooses the bits of every layer, the embedding and the output head; `plan` shows first
    what each budget gives. The tokenizer is saved too. If anything fails, or on Ctrl-C, OUT stays as it was.
    """
    calibration = _calibration(calibrate, calibration_text, samples, sample_length, device, resume)
    by_name = dict(_name_and_bits(text) for text in layer_bits or ())
    of_embedding = None if embedding_bits is None else _bits(embedding_bits, "--embedding-bits")
    own_bits = bits is not None or residual_bits is not None or by_name or of_embedding
    config = TurboQuantConfig(4 if bits is None else bits, residual_bits or 0, group_size, seed, layer_bits=by_name)
    config = with_skip(config, skip)
    budget = {"target_ratio": target_ratio, "target_bits": target_bits, "max_kl": max_kl}
    has_budget = any(value is not None for value in budget.values())
    if own_bits and has_budget:
        raise ConfigError(
            "a budget chooses the bits of every layer: leave out --bits, --residual-bits, --layer-bits and --embedding-bits"
        )
    if (
        not overwrite and out.exists() and not (out.is_dir() and not any(out.iterdir()))
    ):  # save() decides; this saves the work
        raise ConfigError(f"{out} exists: choose another folder, or add --overwrite")
    with _quiet_stdout():
        if calibration is None and not has_budget and Path(model).suffix != ".gguf":
            from ..integrations.streaming import quantize_dense

            source, tokenizer = open_unloaded(model, dtype)
            config = _with_input_embedding(config, source.model, of_embedding)
            report = quantize_dense(source, out, config, tokenizer=tokenizer, device=device, overwrite=overwrite)
        else:
            dense, tokenizer = open_model(model, dtype, device)
            config = _with_input_embedding(config, dense, of_embedding)
            report = quantize_model(dense, config, calibration=calibration, tokenizer=tokenizer, **budget)  # type: ignore[arg-type]
            save(dense, out, tokenizer=tokenizer, overwrite=overwrite)
        if resume is not None:
            shutil.rmtree(resume)
    size = sum(file.stat().st_size for file in out.iterdir())
    if as_json:
        _print_json({"model": model, "out": str(out), "folder_bytes": size, **report.to_dict()})
    else:
        print(report)
        print(f"saved to {out}: {tables.megabytes(size)}. Load it with turboquant_weights.load({str(out)!r})")


def _with_input_embedding(config: TurboQuantConfig, model: Any, bits: tuple[int, int] | None) -> TurboQuantConfig:
    return config if bits is None else dataclasses.replace(config, embeddings={input_embedding(model): bits})


@app.command(epilog="Example: turboquant-weights plan HuggingFaceTB/SmolLM2-135M --calibrate --plot plan.png")
def plan(
    model: Annotated[str, typer.Argument(help="Hub id, local folder, or .gguf file.", show_default=False)],
    calibrate: Calibrate = False,
    calibration_text: CalibrationText = None,
    samples: Samples = None,
    sample_length: SampleLength = None,
    group_size: GroupSize = 128,
    seed: Seed = 0,
    skip: Annotated[
        list[str] | None,
        typer.Option(help="Glob pattern of layers to leave alone; repeatable. [default: none]", show_default=False),
    ] = None,
    target_ratio: TargetRatio = None,
    target_bits: TargetBits = None,
    max_kl: MaxKl = None,
    layers: Annotated[bool, typer.Option("--layers", help="Also list the bits of every layer (needs one budget).")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="Write the curve of size against KL divergence to this .png or .svg file.", show_default=False),
    ] = None,
    dtype: DtypeOption = Dtype.AUTO,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Show what each budget would give for MODEL: whole-file size and expected KL divergence. Nothing is quantized.

    Sensitivities are measured with one backward pass: over a text with `--calibrate` (then the figures are for
    calibrated rounding), over random tokens without (then they rank layers, but predict no loss). `quantize` with the same
    options chooses the bits that are shown.
    """
    budget = {"target_ratio": target_ratio, "target_bits": target_bits, "max_kl": max_kl}
    given = {name: value for name, value in budget.items() if value is not None}
    if layers and not given:
        raise ConfigError("--layers needs a budget: add --target-ratio, --target-bits or --max-kl")
    if given:
        budgets.one_budget(budget)
    if plot is not None:
        tables.check_plot(plot)  # measuring takes minutes
    # As many tokens as `quantize` reads, although sensitivities take a few of them: it must come to the same bits.
    calibration = _calibration(calibrate, calibration_text, samples, sample_length, device, None)
    config = TurboQuantConfig(group_size=group_size, seed=seed)
    with _quiet_stdout():
        dense, tokenizer = open_model(model, dtype, device)
        tokens = None if calibration is None else calibration.tokens(need_tokenizer(tokenizer, model))
        found = budgets.plan_bits(dense, config, skip, tokens=tokens)
    allocations = [found.allocate(**given)] if given else tables.ladder(found)
    if plot is not None:
        tables.plot_plan(found, plot, Path(model).name)
    if as_json:
        _print_json(tables.plan_dict(model, found, allocations))
    else:
        tables.print_plan(model, found, allocations, layers)


@app.command(epilog="Example: turboquant-weights inspect smollm2-4bit")
def inspect(
    checkpoint: Checkpoint,
    reference: Annotated[
        str | None, typer.Option(help="Model it was made from: adds the error of each layer.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what CHECKPOINT holds: settings, layers and sizes, from its headers alone.

    Checks names, shapes and dtypes of all tensors on the way, but reads none (except with --reference); `verify` does.
    """
    info = checkpoints.validate(checkpoint)
    errors = None
    if reference is not None:
        with _quiet_stdout():
            errors = evaluation.layer_errors(open_model(checkpoint)[0], open_model(reference)[0])
    if as_json:
        _print_json(tables.checkpoint_dict(info, errors))
    else:
        tables.print_checkpoint(info, errors)


@app.command(epilog="Example: turboquant-weights convert smollm2-4+4 smollm2-int4 --to int4")
def convert(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint of this package: hub id or folder.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder to create; it appears only when complete.", show_default=False)],
    to: Annotated[
        ConversionFormat, typer.Option(help="bf16: plain Transformers. int4: compressed-tensors, for vLLM and Transformers.")
    ] = ConversionFormat.BF16,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is a model folder.")] = False,
    as_json: Json = False,
) -> None:
    """Write CHECKPOINT in a format that other software reads, and say what that costs.

    Weights pass through one at a time. Errors are against what the quantized model computes with: in bf16 only the rounding
    to bfloat16, in int4 that of a coarser format. The more bits CHECKPOINT has, the better the int4 weights.
    """
    with _quiet_stdout():
        from ..integrations.conversion import convert_quantized
        from ..integrations.transformers import load_tokenizer

        report = convert_quantized(checkpoint, out, to.value, tokenizer=load_tokenizer(checkpoint), overwrite=overwrite)
    if as_json:
        _print_json({"checkpoint": checkpoint, "out": str(out), **dataclasses.asdict(report)})
    else:
        tables.print_conversion(report)
        print(f"saved to {out}: {tables.megabytes(report.bytes)} of weights")


@app.command(epilog="Example: turboquant-weights verify smollm2-4bit")
def verify(checkpoint: Checkpoint, as_json: Json = False) -> None:
    """Check every byte of CHECKPOINT: settings, tensors, and checksums where they were saved."""
    result = checkpoints.verify(checkpoint)
    if as_json:
        _print_json({"checkpoint": str(checkpoint), "manifest_checked": result.manifest_checked, "sha256": result.checksums})
        return
    print(f"{checkpoint}: {len(result.info.layers)} quantized layers, {len(result.checksums)} files, all valid")
    if not result.manifest_checked:
        print("No checksums were saved with it, so a changed byte inside a tensor cannot be noticed.")


@app.command(
    "eval", epilog="Example: turboquant-weights eval smollm2-4bit --reference HuggingFaceTB/SmolLM2-135M --windows 4"
)
def evaluate(
    model: Model,
    reference: Annotated[
        str | None, typer.Option(help="Model to compare with: adds KL divergence and top-1 agreement.", show_default=False)
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text file. [default: 30 KB of Wikipedia that come with the package]", show_default=False),
    ] = None,
    windows: Annotated[
        int | None, typer.Option(min=1, help="Number of windows. [default: all that the text fills]", show_default=False)
    ] = None,
    window_length: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 1024,
    dtype: Annotated[Dtype, typer.Option(help="Both models compute in it.")] = Dtype.FLOAT32,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure MODEL on a text: perplexity, and its distance from a reference.

    KL is KL(reference || model) per token in nats. Compare only figures of the same text, window length and reference.
    """
    content = evaluation.sample_text() if text is None else _read_text(text)
    with _quiet_stdout():
        candidate, tokenizer = open_model(model, dtype, device)
        tokens = evaluation.text_windows(need_tokenizer(tokenizer, model), content, window_length, windows)
        if reference is None:
            results = {model: evaluation.evaluate(candidate, tokens)}
        else:
            other, _ = open_model(reference, dtype, device)
            results = evaluation.compare(other, {model: candidate}, tokens)
    if as_json:
        _print_json(
            {
                "model": model,
                "reference": reference,
                "text": "sample" if text is None else str(text),
                "windows": tokens.shape[0],
                "window_length": tokens.shape[1],
                "result": results[model].to_dict(),
                "reference_perplexity": results[evaluation.REFERENCE].perplexity if reference else None,
            }
        )
    else:
        tables.print_evaluations(results, f"{tokens.shape[0]} windows of {tokens.shape[1]} tokens")


@app.command(epilog="Example: turboquant-weights generate smollm2-4bit 'The capital of France is' --max-new-tokens 20")
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 50,
    dtype: DtypeOption = Dtype.AUTO,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Continue PROMPT with MODEL, always taking the most likely token."""

    with _quiet_stdout():
        ready, tokenizer = open_model(model, dtype, device)
        text = continue_text(ready, need_tokenizer(tokenizer, model), prompt, max_new_tokens)
    if as_json:
        _print_json({"model": model, "prompt": prompt, "text": text})
    else:
        print(prompt + text)


def _name_and_bits(text: str) -> tuple[str, tuple[int, int]]:
    """``PATTERN=4+2`` as the config has it."""
    pattern, equals, bits = text.rpartition("=")
    if not pattern or not equals:
        raise ConfigError(f"--layer-bits is {text!r}: PATTERN=BITS is needed, e.g. '*.down_proj=4+2'")
    return pattern, _bits(bits, "--layer-bits")


def _bits(text: str, option: str) -> tuple[int, int]:
    """``4`` or ``4+2``."""
    found = re.fullmatch(r"(\d)(?:\+(\d))?", text)
    if found is None:
        raise ConfigError(f"{option} has the bits {text!r}: base bits, or base+residual bits, are needed, e.g. 4 or 4+2")
    return int(found[1]), int(found[2] or 0)


@app.command(epilog="Example: turboquant-weights tune 37888x3584 4608x3584 --bits 4+2 --out schedules.json")
def tune(
    shapes: Annotated[list[str], typer.Argument(help="OUTxIN of the layers, e.g. 18944x3584.", show_default=False)],
    out: Annotated[Path, typer.Option(help="JSON file to write; what it holds already is kept.")] = Path("schedules.json"),
    bits: Annotated[str, typer.Option(help="Of the layers: base bits, or base+residual bits, e.g. 3 or 4+2.")] = "4",
    tokens: Annotated[list[int] | None, typer.Option(help="Of 1, 4, 8, 16, 32, 64, 128, 256. [default: all]")] = None,
) -> None:
    """Search the fastest kernel schedules for layers of these SHAPES on this GPU.

    Set the environment variable TURBOQUANT_WEIGHTS_SCHEDULES to the file to use them. Takes minutes per shape.
    """
    sizes = []
    for shape in shapes:
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", shape)
        if match is None or int(match[2]) % 128:
            raise ConfigError(f"{shape}: a shape is OUTxIN, e.g. 18944x3584, and IN a multiple of 128")
        sizes.append((int(match[1]), int(match[2])))
    for line in ops.tune_schedules(sizes, *_bits(bits, "--bits"), tokens, out):
        print(line)


def _calibration(
    calibrate: bool,
    text: Path | None,
    samples: int | None,
    length: int | None,
    device: str | None,
    resume: Path | None,
) -> Calibration | None:
    if not calibrate and text is None:
        if resume is not None:
            raise ConfigError("--resume is for calibrated runs, add --calibrate; others go on by themselves")
        if samples is not None or length is not None:
            raise ConfigError("--samples and --sample-length say how much of a text is read: add --calibrate")
        return None
    return Calibration(
        text,
        Calibration.samples if samples is None else samples,
        Calibration.sample_length if length is None else length,
        device,
        resume,
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it first") from None


@contextlib.contextmanager
def _quiet_stdout() -> Iterator[None]:
    """Sends what libraries print to stderr, so that stdout holds the result only."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _print_json(values: dict[str, Any]) -> None:
    print(json.dumps(values, indent=2, allow_nan=False))
