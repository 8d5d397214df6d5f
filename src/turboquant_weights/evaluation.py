"""How much a quantized model differs from its reference: perplexity, KL divergence, top-1 agreement.

The protocol: the text is tokenised once and cut into windows of equal length that do not overlap; the tail is dropped; a
tokenizer that starts texts with a BOS token starts every window with it. The window is the model's whole context, so its
first tokens are predicted from little. Log-probabilities are float32, KL is KL(reference || candidate) in nats per
position, perplexity is over the predicted tokens (all but the first of a window).

Reference and candidates see a window one after the other and only sums and one float per position stay, so memory holds
two sets of logits of one window however long the text is. Figures of different texts, window lengths or references do not
compare.

Letters: ``w`` windows, ``l`` tokens per window, ``v`` vocabulary size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .errors import ConfigError, QuantizationError, TurboQuantError
from .experts import TurboQuantExperts
from .graded import GRADED, grade_names
from .linear import dense_weight
from .planes import PackedPlanes

REFERENCE = "reference"
# Rows of logits in float32 at once: a vocabulary of 262,144 then takes 134 MB per temporary.
_ROWS = 128


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What one model scored. The fields after ``perplexity`` are None for a model that was compared with nothing.

    ``tokens``: predicted tokens behind ``perplexity``. ``positions``: positions behind the KL figures. ``kl_stderr`` is the
    standard error of ``kl_mean`` over positions, ``kl_p99`` the 99th percentile, ``top1`` the share of positions where
    both models find the same token most likely.
    """

    tokens: int
    perplexity: float
    positions: int | None = None
    kl_mean: float | None = None
    kl_stderr: float | None = None
    kl_p99: float | None = None
    kl_max: float | None = None
    top1: float | None = None

    def to_dict(self) -> dict[str, float | int | None]:
        return dataclasses.asdict(self)


def sample_text() -> str:
    """The text that comes with the package: two articles of WikiText-2's test split, about 30 KB (data/NOTICE)."""
    return (resources.files(__package__) / "data" / "wikitext-2-excerpt.txt").read_text(encoding="utf-8")


def text_windows(
    tokenizer: Any, text: str, length: int = 1024, count: int | None = None, *, bos: bool | None = None
) -> Tensor:
    """Cuts a text into token windows [w, length] (int64), the BOS token included where the tokenizer writes one.

    Args:
        tokenizer: A Transformers tokenizer.
        bos: Whether each window starts with the BOS token. None asks the tokenizer: yes if it starts an ordinary text so.
            Say True for a model that needs it (Gemma) and a tokenizer that forgets it: Transformers up to 5.17 at least
            reads Gemma's GGUF tokenizer without it, and the perplexity of Gemma 3 270M is then 217 instead of 23.
        text: Tokenised once, as a whole.
        length: Tokens per window, at least 2.
        count: Only the first so many windows; None takes all.

    Raises:
        ConfigError: the text gives fewer windows than ``count``, or none.
    """
    if length < 2 or (count is not None and count < 1):
        raise ConfigError(f"windows of {length} tokens, {count} of them: at least 2 tokens and 1 window are needed")
    token = tokenizer.bos_token_id
    starts_with_bos = (token is not None and tokenizer("a").input_ids[:1] == [token]) if bos is None else bos
    if starts_with_bos and token is None:
        raise ConfigError("bos=True, but the tokenizer has no BOS token: use bos=None or False")
    # verbose=False: the tokenizer warns about texts longer than the context, which is what the windows are for.
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.int64)
    step = length - 1 if starts_with_bos else length
    available = len(ids) // step
    wanted = available if count is None else count
    if wanted < 1 or wanted > available:
        raise ConfigError(
            f"the text has {len(ids)} tokens, {available} windows of {length}: "
            f"{max(wanted, 1)} wanted; give a longer text, a shorter window or fewer windows"
        )
    windows = ids[: wanted * step].view(wanted, step)
    return torch.cat([torch.full((wanted, 1), token), windows], dim=1) if starts_with_bos else windows


def evaluate(model: nn.Module, windows: Tensor, reference: nn.Module | None = None, *, progress: bool = True) -> Evaluation:
    """Perplexity of ``model`` on ``windows`` [w, l], and its distance from ``reference`` where one is given.

    Both are Transformers causal language models, or modules called as ``model(input_ids=..., use_cache=False)`` that
    return an object with ``logits`` [1, l, v]. They may lie on different devices. ``progress`` shows a bar on stderr.

    Raises:
        ConfigError: ``windows`` is malformed, or the two vocabularies differ in size.
        TurboQuantError: a model's logits are not finite.
    """
    if reference is None:
        return compare(model, {}, windows, progress=progress)[REFERENCE]
    return compare(reference, {"model": model}, windows, progress=progress)["model"]


def compare(
    reference: nn.Module, models: Mapping[str, nn.Module], windows: Tensor, *, progress: bool = True
) -> dict[str, Evaluation]:
    """Evaluates several models against one reference in a single pass; see :func:`evaluate`.

    Returns the evaluations in the order of ``models`` after that of the reference itself, under the key ``"reference"``.
    """
    _check_windows(windows)
    if REFERENCE in models:
        raise ConfigError(f"a model is named {REFERENCE!r}: that name is taken by the reference's own result")
    scores = {name: _Score() for name in (REFERENCE, *models)}
    with contextlib.ExitStack() as stack, torch.no_grad():
        for model in (reference, *models.values()):
            stack.enter_context(_evaluation_mode(model))
        bar = stack.enter_context(
            tqdm(total=len(windows) * len(scores), desc="evaluating", unit="window", disable=not progress)
        )
        for window in windows:
            expected = _logits(reference, window[None])[0]
            scores[REFERENCE].add_tokens(expected, window)
            bar.update()
            for name, model in models.items():
                logits = _logits(model, window[None])[0]
                scores[name].add_tokens(logits, window)
                scores[name].add_distance(expected, logits, name)
                bar.update()
    return {name: score.result() for name, score in scores.items()}


def noise_floor(model: nn.Module, windows: Tensor, *, progress: bool = True) -> Evaluation:
    """The distance of a model from itself when only the batch shape changes: windows in pairs against windows alone.

    Other batch shapes take other summation orders, so this is what "no difference" looks like in the model's dtype on its
    device. An odd last window is paired with itself.
    """
    _check_windows(windows)
    score = _Score()
    with _evaluation_mode(model), torch.no_grad():
        for pair in tqdm(windows.split(2), desc="noise floor", unit="pair", disable=not progress):
            together = _logits(model, pair if len(pair) == 2 else pair.repeat(2, 1))
            for window, logits in zip(pair, together, strict=False):
                score.add_tokens(logits, window)
                score.add_distance(_logits(model, window[None])[0], logits, "model")
    return score.result()


def resident_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers in memory, each storage once (tied weights share one)."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        storages[tensor.device, storage.data_ptr() or id(tensor)] = storage.nbytes()
    return sum(storages.values())


def layer_errors(model: nn.Module, reference: nn.Module) -> dict[str, float]:
    """Layer name -> ``||W - W'||^2 / ||W||^2`` of each quantized layer, embedding and expert stack of ``model``;
    ``reference`` holds the dense ``W``.

    Raises:
        ConfigError: ``reference`` has no such layer, or one of another shape.
    """
    errors = {}
    grades = grade_names(model)
    for name, module in model.named_modules():
        if isinstance(module, (PackedPlanes, *GRADED)) and name not in grades:
            try:
                if isinstance(module, TurboQuantExperts):
                    weight: Tensor = reference.get_parameter(name)
                else:
                    other = reference.get_submodule(name)
                    weight = other.weight if isinstance(other, nn.Embedding) else dense_weight(other, name)
            except (AttributeError, QuantizationError) as error:
                raise ConfigError(f"the reference does not fit the checkpoint: {error}") from None
            weight = weight.to(next(module.parameters()).device, torch.float32)
            if weight.shape != module.shape:
                raise ConfigError(f"{name} is {list(weight.shape)} in the reference: the checkpoint was not made from it")
            change = torch.linalg.vector_norm(module.dequantize(torch.float32) - weight)
            norm = torch.linalg.vector_norm(weight)
            errors[name] = 0.0 if change == 0 else (change / norm).square().item()
    return errors


class _Score:
    """Running figures of one model."""

    def __init__(self) -> None:
        self.nll = 0.0
        self.tokens = 0
        self.agreeing = 0
        self.kl: list[Tensor] = []

    def add_tokens(self, logits: Tensor, window: Tensor) -> None:
        """``logits`` [l, v] of ``window`` [l]."""
        targets = window[1:].to(logits.device)
        for rows, target in zip(logits[:-1].split(_ROWS), targets.split(_ROWS), strict=True):
            self.nll += nn.functional.cross_entropy(rows.float(), target, reduction="sum").item()
        self.tokens += len(targets)

    def add_distance(self, expected: Tensor, logits: Tensor, name: str) -> None:
        """The reference's logits [l, v] and this model's."""
        if expected.shape != logits.shape:
            raise ConfigError(
                f"the logits of {name} are {list(logits.shape)} and the reference's {list(expected.shape)}: "
                "KL divergence needs two models with the same vocabulary"
            )
        for p_rows, q_rows in zip(expected.to(logits.device).split(_ROWS), logits.split(_ROWS), strict=True):
            self.kl.append(kl_divergence(p_rows, q_rows).cpu())
            self.agreeing += int((p_rows.argmax(-1) == q_rows.argmax(-1)).sum())

    def result(self) -> Evaluation:
        perplexity = math.exp(self.nll / self.tokens)
        if not self.kl:
            return Evaluation(self.tokens, perplexity)
        kl = torch.cat(self.kl).double()
        count = len(kl)
        return Evaluation(
            tokens=self.tokens,
            perplexity=perplexity,
            positions=count,
            kl_mean=kl.mean().item(),
            kl_stderr=(kl.std() / math.sqrt(count)).item(),
            # Not torch.quantile, which refuses more than 16 million values.
            kl_p99=kl.sort().values[math.ceil(0.99 * count) - 1].item(),
            kl_max=kl.max().item(),
            top1=self.agreeing / count,
        )


def kl_divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || candidate) in nats [l] (float32) from two sets of logits [l, v] of any float dtype."""
    p = reference.float().log_softmax(-1)
    q = logits.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """``tokens`` [b, l] -> logits [b, l, v] on the model's device."""
    device = next(model.parameters()).device
    logits = model(input_ids=tokens.to(device), use_cache=False).logits
    # min and max are NaN where anything is: two reductions instead of a boolean copy of the logits.
    if not torch.isfinite(torch.stack(logits.aminmax())).all():
        raise TurboQuantError(
            f"{type(model).__name__} returned logits with NaN or Inf: check its dtype ({logits.dtype}) and weights"
        )
    return logits


def _check_windows(windows: Tensor) -> None:
    if windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 2 or windows.dtype != torch.int64:
        raise ConfigError(
            f"windows are {windows.dtype} of shape {tuple(windows.shape)}: int64 [w, l] with w >= 1 and l >= 2 is needed"
        )


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Without dropout inside the block; the model's mode is restored after it."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
