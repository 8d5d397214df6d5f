"""Calibration, sensitivities and budgets of mixtures of experts: each expert is rounded for the rows that reach it."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

import turboquant_weights as tq  # noqa: E402
from turboquant_weights import calibration, feedback  # noqa: E402
from turboquant_weights.evaluation import kl_divergence  # noqa: E402
from turboquant_weights.experts import DenseExperts, TurboQuantExperts, dense_stacks, find_stacks  # noqa: E402
from turboquant_weights.reference import quantize_weight  # noqa: E402

SIZES = dict(vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
LAYOUT = dict(bits=3, residual_bits=0, group_size=128, seed=0)


def mixtral():
    return transformers.MixtralConfig(**SIZES, intermediate_size=40, num_local_experts=4)


def llama4():  # sends rows of zeros to experts that are not chosen
    sizes = dict(intermediate_size=48, intermediate_size_mlp=96, head_dim=16)
    return transformers.Llama4TextConfig(**SIZES, **sizes, num_local_experts=4)


def jetmoe():  # calls expert by expert
    return transformers.JetMoeConfig(
        **SIZES, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2, kv_channels=16
    )


def build(config):
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * 1.5 / parameter.shape[-1] ** 0.5)
    return model


def divergence(model, reference, tokens):
    with torch.no_grad():
        return float(kl_divergence(reference(tokens).logits.flatten(0, 1), model(tokens).logits.flatten(0, 1)).mean())


def tokens(samples, length, seed=0):
    return torch.randint(96, (samples, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("config", [mixtral, llama4, jetmoe], ids=lambda config: config.__name__)
def test_calibration_beats_rounding_without_data(config):
    reference = build(config)
    plain, calibrated = copy.deepcopy(reference), copy.deepcopy(reference)
    tq.quantize_model(plain, tq.TurboQuantConfig(3), progress=False)
    report = tq.quantize_model(calibrated, tq.TurboQuantConfig(3), calibration=tokens(12, 64), progress=False)
    assert report.uncalibrated == []
    assert {row.name for row in report.layers if row.kind == "experts"} == set(
        find_stacks(reference, tq.TurboQuantConfig())[0]
    )
    assert not [module for module in calibrated.modules() if isinstance(module, DenseExperts)]
    held_out = tokens(6, 64, seed=1)
    assert divergence(calibrated, reference, held_out) < 0.93 * divergence(plain, reference, held_out)


def test_each_expert_is_rounded_for_its_own_rows():
    """Against the algebra on rows that the model's own router picked: nothing else is quantized, so nothing has drifted."""
    model = build(mixtral)
    text = tokens(4, 32)
    rows = []
    handle = model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda module, args: rows.append(args[:2]))
    with torch.no_grad():
        model(text)
    handle.remove()
    (hidden, chosen), name = rows[0], "model.layers.0.mlp.experts.gate_up_proj"
    weight = model.get_parameter(name).detach().clone()
    others = [key for key, _ in model.named_modules() if isinstance(model.get_submodule(key), torch.nn.Linear)]
    others += [key for key in find_stacks(model, tq.TurboQuantConfig())[0] if key != name]
    tq.quantize_model(model, tq.TurboQuantConfig(3), calibration=text, skip=others, progress=False)
    stack = model.get_submodule(name)
    assert isinstance(stack, TurboQuantExperts)
    for expert in range(4):
        mine = hidden[(chosen == expert).any(-1)]
        assert 16 < len(mine) < 128
        moments = feedback.Moments(64, mine.device)
        moments.add(mine)
        moments.add_white(64 / (8 * len(mine)))
        expected = feedback.quantize_weight_calibrated(weight[expert], moments.feedback(128, 0), **LAYOUT)
        assert (stack.codes[expert] == expected.codes).float().mean() > 0.98  # up to the order of sums
        assert (stack.codes[expert] == quantize_weight(weight[expert], **LAYOUT).weight.codes).float().mean() < 0.9


@pytest.mark.parametrize("config", [mixtral, llama4, jetmoe], ids=lambda config: config.__name__)
def test_experts_without_a_token_are_rounded_without_data_and_named(config):
    model = build(config)
    dense = copy.deepcopy(model)
    report = tq.quantize_model(model, tq.TurboQuantConfig(3), calibration=tokens(1, 2), progress=False)
    assert report.uncalibrated
    for entry in report.uncalibrated:
        name, _, experts = entry.removesuffix("]").rpartition("[")
        assert f"did not reach it: {entry}" in str(report)
        stack, weight = model.get_submodule(name), dense.get_parameter(name)
        for expert in map(int, experts.split(", ")):
            matrix = weight[expert] if stack.layout == "out_in" else weight[expert].T
            assert torch.equal(stack.codes[expert], quantize_weight(matrix, **LAYOUT).weight.codes)


def test_few_moments_at_a_time_give_the_same(monkeypatch):
    model = build(mixtral)
    other = copy.deepcopy(model)
    tq.quantize_model(model, tq.TurboQuantConfig(3), calibration=tokens(3, 32), progress=False)
    monkeypatch.setattr(calibration, "_MOMENTS_BYTES", 1)
    tq.quantize_model(other, tq.TurboQuantConfig(3), calibration=tokens(3, 32), progress=False)
    left, right = model.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    reference = build(mixtral)
    whole, broken, again = (copy.deepcopy(reference) for _ in range(3))
    config = tq.TurboQuantConfig(4, 1)
    tq.quantize_model(whole, config, calibration=tokens(3, 32), progress=False)
    settings = tq.Calibration(tokens(3, 32), resume=tmp_path / "half")
    advance = calibration.Calibrator._advance

    def fails(self, index, *args):
        if index == 1:
            raise KeyboardInterrupt
        advance(self, index, *args)

    with monkeypatch.context() as patch:
        patch.setattr(calibration.Calibrator, "_advance", fails)
        with pytest.raises(KeyboardInterrupt):
            tq.quantize_model(broken, config, calibration=settings, progress=False)
    assert not [module for module in broken.modules() if isinstance(module, DenseExperts)]
    monkeypatch.setattr(calibration.Calibrator, "_quantize_block", None)  # both blocks are done
    tq.quantize_model(again, config, calibration=settings, progress=False)
    left, right = whole.state_dict(), again.state_dict()
    assert list(left) == list(right)
    assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("config", [mixtral, llama4], ids=lambda config: config.__name__)
def test_budgets_reach_experts(config, tmp_path):
    model = build(config)
    reference = copy.deepcopy(model)
    plan = tq.plan_bits(model, progress=False)
    stacks = find_stacks(model, tq.TurboQuantConfig())[0]
    units = {unit.names: unit for unit in plan.units}
    for name in stacks:
        assert units[name,].weights == reference.get_parameter(name).numel()
        assert units[name,].sensitivity > 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in reference.named_parameters()]
    report = tq.quantize_model(model, target_ratio=2.5, progress=False)
    assert report.ratio >= 2.5
    assert {row.name for row in report.layers} >= set(stacks)
    measured = divergence(model, reference, tokens(6, 64))
    assert 0.4 < measured / report.expected_kl < 2.5
    tq.save(model, tmp_path / "out")
    again = tq.load(tmp_path / "out", dtype=torch.float32)
    assert again.config.quantization_config.layer_bits == report.config.layer_bits


def test_a_budget_leaves_what_skip_names(tmp_path):
    model = build(mixtral).bfloat16()
    report = tq.quantize_model(model, skip=["*.gate_up_proj"], target_ratio=1.2, progress=False)
    assert sum("gate_up_proj" in name for name in report.skipped) == 2
    assert {row.name.rpartition(".")[2] for row in report.layers if row.kind == "experts"} == {"down_proj"}


def test_parameters_come_back_when_something_fails():
    model = build(mixtral)
    before = copy.deepcopy(model)
    stacks = find_stacks(model, tq.TurboQuantConfig())[0]
    with dense_stacks(model, stacks), torch.no_grad():
        inside = model(tokens(1, 8)).logits

    def fail():
        with dense_stacks(model, stacks):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert model.state_dict().keys() == before.state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(inside, before(tokens(1, 8)).logits, rtol=0, atol=1e-4)
        assert torch.equal(model(tokens(1, 8)).logits, before(tokens(1, 8)).logits)
