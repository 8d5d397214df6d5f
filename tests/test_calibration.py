"""Calibrated rounding: the algebra against float64, the streams against the model, the whole against data-free rounding."""

from __future__ import annotations

import copy
import itertools
import re
from pathlib import Path

import pytest
import torch
from tiny_model import tiny_llama
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from turboquant_weights import (
    ConfigError,
    QuantizationError,
    TurboQuantConfig,
    TurboQuantLinear,
    feedback,
    quantize_model,
    reference,
)
from turboquant_weights.calibration import Calibration, Calibrator, as_calibration, calibration_text, input_groups, windows
from turboquant_weights.codebook import boundary_tensor, level_tensor
from turboquant_weights.evaluation import sample_text
from turboquant_weights.model import plan_layers, replace_module
from turboquant_weights.rotation import rotate, rotation_block
from turboquant_weights.stream import BlockStream, find_blocks

PLANES = [(2, 0), (3, 1), (4, 0), (4, 2), (4, 4)]


def correlated(tokens: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.diag(torch.rand(columns, generator=generator) * 3) + 0.2 * torch.randn(columns, columns, generator=generator)
    return torch.randn(tokens, columns, generator=generator) @ mix


def output_loss(weight: Tensor, packed: reference.PackedWeight, now: Tensor, before: Tensor, **layout: int) -> float:
    """float64: mean square of ``W x - W' x'`` over that of ``W x``."""
    decoded = reference.dequantize_weight(packed, weight.shape[1], **layout).double()
    wanted = before.double() @ weight.double().T
    return float((wanted - now.double() @ decoded.T).square().sum() / wanted.square().sum())


@pytest.mark.parametrize(("bits", "residual_bits"), PLANES)
@pytest.mark.parametrize("columns", [96, 100])
def test_feedback_lowers_the_error_of_the_outputs(bits: int, residual_bits: int, columns: int) -> None:
    layout = dict(bits=bits, residual_bits=residual_bits, group_size=128, seed=3)
    weight, x = torch.randn(40, columns), correlated(2000, columns)
    moments = feedback.Moments(columns, x.device)
    moments.add(x[:900].view(9, 100, columns))
    moments.add(x[900:])
    calibrated = feedback.quantize_weight_calibrated(weight, moments.feedback(128, 3), **layout)
    plain = reference.quantize_weight(weight, **layout).weight
    assert [t.shape for t in calibrated if t is not None] == [t.shape for t in plain if t is not None]
    assert output_loss(weight, calibrated, x, x, **layout) < 0.75 * output_loss(weight, plain, x, x, **layout)
    # A SHOULD of FORMAT.md: the row's largest scale lies in the top octave.
    assert int(calibrated.scales.amax(1).min()) >= 224


def test_loss_of_a_block_is_the_quadratic_form_of_its_error() -> None:
    """What the scale search compares: sum of squared errors over the factor's diagonal = e H e^T, in float64."""
    x = correlated(500, 32)
    hessian = (x.T @ x / 500).double()
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    block, scale = torch.randn(17, 32), torch.rand(17, 3) * 0.02 + 0.01
    codes, errors, losses = feedback.feed_back(block, scale, factor.float(), 4, 0)
    decoded = level_tensor(4)[codes.long()] * scale[..., None]
    wrong = (block[:, None] - decoded).double()
    torch.testing.assert_close(losses.double(), ((wrong @ hessian) * wrong).sum(-1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(errors.square().sum(-1), losses)


def uneven(tokens: int, columns: int) -> Tensor:
    """Inputs whose blocks of 32 columns have energies 1, 2, 3, ... in an order that is not theirs."""
    energies = (torch.arange(columns // 32) * 5 % (columns // 32)) + 1.0
    return correlated(tokens, columns) * energies.sqrt().repeat_interleave(32)


def test_feedback_follows_its_definition_column_by_column(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the textbook loop over all columns in float64, with the scales that the search chose, blocks by energy."""
    monkeypatch.setattr(feedback, "_SWEEPS", 0)
    columns, layout = 192, dict(bits=4, residual_bits=0, group_size=32, seed=0)
    weight, x = torch.randn(5, columns), uneven(4000, columns)
    moments = feedback.Moments(columns, x.device)
    moments.add(x)
    found = feedback.quantize_weight_calibrated(weight, moments.feedback(32, 0), **layout)
    block = rotation_block(columns, 32)
    rotated = rotate(x.double(), block, 0)
    hessian = rotated.T @ rotated
    order = hessian.diagonal().view(-1, 32).sum(1).argsort(descending=True)
    turns = torch.cat([torch.arange(32 * b, 32 * b + 32) for b in order.tolist()])
    assert not torch.equal(turns, torch.arange(columns))
    hessian = hessian[turns][:, turns]
    hessian += feedback.DAMPING * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    left = rotate(weight.double(), block, 0)[:, turns]
    scale = reference.scale_tensor(torch.device("cpu"), torch.float64)[found.scales.long()]
    scale = (scale * torch.exp2(found.exponents.double())[:, None]).repeat_interleave(32, 1)[:, turns]
    table, boundaries = level_tensor(4).double(), boundary_tensor(4).double()
    wanted = torch.empty(5, columns)
    for j in range(columns):
        index = torch.bucketize(left[:, j] / scale[:, j], boundaries)
        wrong = (left[:, j] - table[index] * scale[:, j]) / factor[j, j]
        left[:, j:] -= wrong[:, None] * factor[j, j:]
        wanted[:, j] = index
    codes = reference.unpack(found.codes, 4)[:, turns]
    assert (codes == wanted).float().mean() > 0.98  # ties of float32 and float64 differ, and what follows from one


def test_blocks_with_little_energy_come_last(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, layout = uneven(4000, 256), torch.randn(40, 256), dict(bits=4, residual_bits=0, group_size=32, seed=0)
    moments = feedback.Moments(256, x.device)
    moments.add(x)
    falling, losses = feedback.block_order, []
    for order in (falling, lambda hessian: falling(hessian).flip(0)):
        monkeypatch.setattr(feedback, "block_order", order)
        packed = feedback.quantize_weight_calibrated(weight, moments.feedback(32, 0), **layout)
        losses.append(output_loss(weight, packed, x, x, **layout))
    assert losses[0] < 0.95 * losses[1]


@pytest.mark.parametrize(("bits", "residual_bits"), PLANES)
def test_sweeps_lower_the_loss_of_every_row(bits: int, residual_bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, and never a row's above what it was: the damped quadratic form that they descend."""
    x, weight = uneven(4000, 192), torch.randn(50, 192)
    layout = dict(bits=bits, residual_bits=residual_bits, group_size=64, seed=0)
    moments = feedback.Moments(192, x.device)
    moments.add(x, x + 0.1 * torch.randn_like(x))
    given = moments.feedback(64, 0)
    assert given.correction is not None
    turns = feedback.columns_of(given.order)
    rotated = rotate(weight, 64, 0)
    target = (rotated + rotated @ given.correction).double()[:, turns]
    losses = []
    for sweeps in range(4):
        monkeypatch.setattr(feedback, "_SWEEPS", sweeps)
        packed = feedback.quantize_weight_calibrated(weight, given, **layout)
        left = target - rotate(reference.dequantize_weight(packed, 192, **layout), 64, 0).double()[:, turns]
        losses.append(((left @ given.hessian.double()) * left).sum(1))
    for before, after in itertools.pairwise(losses):
        assert (after <= before * (1 + 1e-4)).all()
    assert losses[1].sum() < 0.985 * losses[0].sum()
    assert losses[2].sum() < 0.998 * losses[1].sum()


def test_sweeps_leave_alone_what_is_best_already(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncorrelated inputs: no block's error matters to another, so the first pass has said all."""
    weight, layout = torch.randn(20, 128), dict(bits=4, residual_bits=0, group_size=128, seed=0)
    eye = torch.eye(128)
    white = feedback.Feedback(torch.arange(4), eye, eye, None)
    found = []
    for sweeps in (0, 2):
        monkeypatch.setattr(feedback, "_SWEEPS", sweeps)
        found.append(feedback.quantize_weight_calibrated(weight, white, **layout))
    assert torch.equal(found[0].codes, found[1].codes)
    assert torch.equal(found[0].scales, found[1].scales)


@pytest.mark.parametrize("power", [0.0, 0.25, 0.5, 1.0])
def test_gain_of_feedback_is_known_from_the_inputs(power: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the factor that feedback uses, and against the losses of rounding with and without it (and without sweeps)."""
    monkeypatch.setattr(feedback, "_SWEEPS", 0)
    torch.manual_seed(4)
    basis = torch.linalg.qr(torch.randn(128, 128)).Q
    x = torch.randn(20000, 128) * torch.arange(1, 129) ** -power @ basis.T
    weight, layout = torch.randn(256, 128), dict(bits=4, residual_bits=0, group_size=128, seed=0)
    moments = feedback.Moments(128, x.device)
    moments.add(x)
    hessian = feedback.rotated_moments(moments.now, 128, 0)
    gain = feedback.feedback_gain(hessian)
    factor = moments.feedback(128, 0).factor
    assert gain == pytest.approx(float(factor.diagonal().square().reciprocal().mean()), rel=1e-4)
    errors = []
    for packed in (
        feedback.quantize_weight_calibrated(weight, moments.feedback(128, 0), **layout),
        reference.quantize_weight(weight, **layout).weight,
    ):
        errors.append(rotate(reference.dequantize_weight(packed, 128, **layout) - weight, 128, 0).double())
    second = (hessian / hessian.diagonal().mean()).double()
    damped = second + feedback.DAMPING * torch.eye(128, dtype=torch.float64)
    # With feedback, scales are searched for the loss at hand: worth more, the fewer directions count.
    measured = float(((errors[0] @ damped) * errors[0]).sum() / ((errors[1] @ second) * errors[1]).sum())
    assert 0.95 * measured < gain < (1.06 if power < 1 else 1.4) * measured


def test_gain_of_rank_deficient_and_dead_inputs() -> None:
    assert feedback.feedback_gain(torch.zeros(32, 32)) == 1
    one = torch.randn(32)
    assert feedback.feedback_gain(one[:, None] * one) < 0.1


def test_drift_of_the_inputs_is_made_up_for() -> None:
    layout = dict(bits=4, residual_bits=4, group_size=128, seed=0)
    before = correlated(4000, 128)
    now = before + 0.05 * before @ torch.randn(128, 128) * 0.1
    weight = torch.randn(30, 128)
    losses = []
    for original in (None, before):
        moments = feedback.Moments(128, now.device)
        moments.add(now, original)
        packed = feedback.quantize_weight_calibrated(weight, moments.feedback(128, 0), **layout)
        losses.append(output_loss(weight, packed, now, before, **layout))
    assert losses[1] < 0.2 * losses[0]


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_rank_deficient_and_dead_inputs(tokens: int) -> None:
    x = torch.randn(tokens, 64)
    x[:, :7] = 0
    moments = feedback.Moments(64, x.device)
    moments.add(x, x + 0.1)
    weight = torch.randn(8, 64)
    layout = dict(bits=4, residual_bits=4, group_size=64, seed=0)
    packed = feedback.quantize_weight_calibrated(weight, moments.feedback(64, 0), **layout)
    assert reference.relative_error(weight, packed, **layout) < 0.5
    rows = feedback.quantize_weight_calibrated(torch.zeros(3, 64), moments.feedback(64, 0), **layout)
    assert not rows.scales.any()


def test_infinite_inputs_are_an_error() -> None:
    moments = feedback.Moments(32, torch.device("cpu"))
    moments.add(torch.full((4, 32), 3e38))
    with pytest.raises(QuantizationError, match="NaN or Inf"):
        moments.feedback(32, 0)


def test_stream_is_the_model() -> None:
    model = tiny_llama().eval()
    tokens = torch.randint(0, model.config.vocab_size, (3, 17))
    with torch.no_grad(), BlockStream(model, tokens, torch.device("cpu")) as stream:
        for index in range(len(stream.blocks)):
            for batch in stream.batches:
                batch.hidden = stream.run(index, batch)
        logits = torch.cat([stream.tail(batch.tokens, batch.hidden) for batch in stream.batches])
    torch.testing.assert_close(logits, model(input_ids=tokens).logits)
    assert all("forward" not in block.__dict__ for block in find_blocks(model)[1])


def test_samples_longer_than_the_table_of_positions_are_an_error() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=2, n_positions=32))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(QuantizationError, match=r"40 tokens at once.*max_position_embeddings: 32"):
        quantize_model(model, TurboQuantConfig(), calibration=torch.zeros(2, 40, dtype=torch.int64), progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_stream_refuses_blocks_that_pass_on_more_than_hidden_states() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, hidden_states: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
            memory = memory + hidden_states
            return self.inner(memory), memory

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.blocks = nn.Embedding(11, 8), nn.ModuleList([Block(), Block(), Block()])

        def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
            hidden = memory = self.embed(input_ids)
            for block in self.blocks:
                hidden, memory = block(hidden, memory)
            return hidden

    with pytest.raises(QuantizationError, match="more than hidden states"):
        BlockStream(Model(), torch.randint(0, 11, (1, 4)), torch.device("cpu"))
    with pytest.raises(QuantizationError, match="no list of blocks"):
        BlockStream(nn.Sequential(nn.Linear(4, 4)), torch.zeros(1, 4, dtype=torch.int64), torch.device("cpu"))


def test_layers_with_one_input_are_found_in_the_order_of_their_calls() -> None:
    model = tiny_llama()
    layers = {name: model.get_submodule(name) for name in plan_layers(model)[0] if ".0." in name}
    groups = input_groups(layers, lambda: model(input_ids=torch.zeros(1, 3, dtype=torch.int64)))
    ends = [[name.rsplit(".", 1)[1] for name in group] for group in groups]
    assert ends == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def calibrated(model: nn.Module, tokens: Tensor, config: TurboQuantConfig) -> tuple[nn.Module, Calibrator]:
    model = copy.deepcopy(model)

    def install(name: str, quantized: reference.Quantized, own: TurboQuantConfig) -> None:
        old = model.get_submodule(name)
        replace_module(model, name, TurboQuantLinear.from_packed(quantized.weight, old.in_features, old.bias, own))

    with BlockStream(model, tokens, torch.device("cpu")) as stream:
        calibrator = Calibrator(stream, dict.fromkeys(plan_layers(model, [])[0], config), install)
        calibrator.run(progress=False)
    return model, calibrator


def test_a_calibrated_model_is_nearer_to_its_original_than_a_data_free_one() -> None:
    from turboquant_weights import quantize_model

    model = tiny_llama(hidden_size=64, intermediate_size=96, num_hidden_layers=3, tie_word_embeddings=False).eval()
    tokens = torch.randint(0, model.config.vocab_size, (40, 64))
    config = TurboQuantConfig(bits=3)
    better, calibrator = calibrated(model, tokens[8:], config)
    plain = copy.deepcopy(model)
    quantize_model(plain, config, skip=[], progress=False)
    assert not calibrator.unreached
    assert not [name for name, module in better.named_modules() if type(module) is nn.Linear]
    with torch.no_grad():
        wanted = model(input_ids=tokens[:8]).logits
        distances = [float((m(input_ids=tokens[:8]).logits - wanted).square().mean()) for m in (better, plain)]
    assert distances[0] < 0.8 * distances[1]


def test_layers_without_input_are_rounded_without_data_and_named() -> None:
    model = tiny_llama()
    model.model.layers[1].unused = nn.Linear(32, 8)
    done, calibrator = calibrated(model, torch.zeros(1, 5, dtype=torch.int64), TurboQuantConfig())
    assert calibrator.unreached == ["model.layers.1.unused"]
    assert isinstance(done.model.layers[1].unused, TurboQuantLinear)


class Words:
    """A tokenizer: one token per word."""

    bos_token_id: int | None = None

    def __call__(self, text: str, **kwargs: object) -> Words:
        self.input_ids = [len(word) for word in text.split()]
        return self


def test_texts_become_windows(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("a bb ccc dddd " * 3)
    wanted = torch.tensor([[1, 2, 3, 4, 1], [2, 3, 4, 1, 2]])
    for text in (file.read_text(), file, ["a bb ccc", "dddd a bb ccc dddd", "a bb ccc dddd"]):
        assert torch.equal(Calibration(text, samples=9, sample_length=5).tokens(Words()), wanted)
    assert torch.equal(Calibration(file, samples=1, sample_length=5).tokens(Words()), wanted[:1])
    assert torch.equal(windows(torch.arange(5), 3, 9, 7), torch.tensor([[7, 0, 1], [7, 2, 3]]))
    assert windows(torch.arange(2), 512, 4, None).shape == (1, 2), "a text too short for a window gives one short window"
    assert torch.equal(Calibration(wanted, samples=1).tokens(None), wanted[:1])
    assert as_calibration(True).text is None
    for value, tokenizer, message in (
        ("a b", None, "tokenizer="),
        ("", Words(), "no token"),
        ([1, 2], Words(), "strings are needed"),
        (torch.zeros(3), None, r"\[s, l\]"),
    ):
        with pytest.raises(ConfigError, match=message):
            Calibration(value).tokens(tokenizer)
    with pytest.raises(ConfigError, match="at least 1"):
        Calibration(samples=0)


def test_rotated_moments_are_those_of_the_rotated_inputs() -> None:
    x, y = correlated(200, 64).double(), correlated(200, 64, 1).double()
    block = rotation_block(64, 32)
    wanted = rotate(x, block, 5).T @ rotate(y, block, 5)
    torch.testing.assert_close(feedback.rotated_moments(x.T @ y, 32, 5), wanted)


def test_calibration_text_is_natural_and_mixed() -> None:
    text = calibration_text()
    assert 900_000 < len(text) < 1_100_000
    assert not re.search(r"<unk>|@[-,.]@|[a-z] [,;] [a-z]|[a-z] '(s|t) [a-z]", text), "WikiText's tokens are not joined"
    # Every quarter has encyclopaedia, dialogue, documentation and source.
    for start in range(0, 4 * (len(text) // 4), len(text) // 4):
        quarter = text[start : start + len(text) // 4]
        for sign in ("Elizabeth", "\n    def ", ".. ", " was "):
            assert sign in quarter, (start, sign)


def test_calibration_text_is_not_the_evaluation_text() -> None:
    """No run of eight words of the test split's excerpt, whatever the spacing, is in the calibration text."""
    words, calibration = (re.findall(r"\w+", t.lower()) for t in (sample_text(), calibration_text()))
    runs = {tuple(calibration[i : i + 8]) for i in range(len(calibration) - 7)}
    assert not [words[i : i + 8] for i in range(len(words) - 7) if tuple(words[i : i + 8]) in runs]
