"""Bits under a budget: the allocation against brute force, sensitivities against measured KL divergence."""

from __future__ import annotations

import copy
import itertools
import random
import warnings

import pytest
import torch
from tiny_model import tiny_llama
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, MptConfig, MptForCausalLM

from turboquant_weights import ConfigError, TurboQuantConfig, plan_bits, reference
from turboquant_weights.allocation import ERRORS, Unit, allocate, steps
from turboquant_weights.evaluation import kl_divergence
from turboquant_weights.feedback import DAMPING
from turboquant_weights.linear import is_linear
from turboquant_weights.rotation import rotate
from turboquant_weights.sensitivity import feedback_gains, measure
from turboquant_weights.stream import BlockStream


def units(count: int, seed: int) -> list[Unit]:
    chance = random.Random(seed)
    return [
        Unit((f"layer{i}",), ((chance.choice((64, 192, 576)), chance.choice((128, 576))),), 10 ** chance.uniform(-3, 1))
        for i in range(count)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_allocation_is_optimal_for_its_own_size(seed: int) -> None:
    """What it arrives at on the hull, no other choice of bits beats with as many bytes."""
    some = units(4, seed)
    choices = [*ERRORS, None]
    every = [
        (sum(u.bytes(b) for u, b in zip(some, bits, strict=True)), sum(u.kl(b) for u, b in zip(some, bits, strict=True)))
        for bits in itertools.product(choices, repeat=4)
    ]
    path = steps(some, 0)
    for point in path:
        assert point.expected_kl <= 1.0000001 * min(kl for size, kl in every if size <= point.total_bytes)
    assert [p.total_bytes for p in path] == sorted(p.total_bytes for p in path)
    assert path[-1].ratio == 1.0
    assert path[-1].expected_kl == 0.0


@pytest.mark.parametrize("seed", range(3))
def test_budgets_hold_and_are_used(seed: int) -> None:
    some = units(40, seed)
    dense = sum(unit.bytes(None) for unit in some) + 1000
    for ratio in (1.0, 2.0, 3.2, 5.0):
        found = allocate(some, 1000, max_bytes=dense / ratio)
        assert found.dense_bytes == dense
        assert found.ratio >= ratio
        assert found.ratio < 1.1 * ratio, "the budget is not used"
        again = sum(unit.bytes(found.bits[unit.names[0]]) for unit in some) + 1000
        assert again == found.total_bytes
        assert found.expected_kl == pytest.approx(sum(unit.kl(found.bits[unit.names[0]]) for unit in some))
    limit = steps(some, 0)[30].expected_kl * 1.01
    smallest = allocate(some, 1000, max_kl=limit)
    assert smallest.expected_kl <= limit
    assert smallest.total_bytes <= min(p.total_bytes for p in steps(some, 1000) if p.expected_kl <= limit)


@pytest.mark.parametrize("seed", range(5))
def test_budgets_are_used_up(seed: int) -> None:
    """Against the straight lines between the allocations on the hull, which nothing can be below."""
    some = units(80, seed)
    path = steps(some, 0)
    for low, high in itertools.pairwise(path):
        if low.ratio > 4.5 or high.ratio < 2.5:
            continue
        middle = (low.total_bytes + high.total_bytes) // 2
        share = (middle - low.total_bytes) / (high.total_bytes - low.total_bytes)
        bound = low.expected_kl + share * (high.expected_kl - low.expected_kl)
        found = allocate(some, 0, max_bytes=middle)
        assert found.total_bytes <= middle
        assert bound * 0.999999 <= found.expected_kl <= 1.01 * bound
        smallest = allocate(some, 0, max_kl=bound)
        assert smallest.expected_kl <= bound
        assert middle - 1 <= smallest.total_bytes <= 1.005 * middle


@pytest.mark.parametrize("ratio", [2.5, 3.7])
def test_few_units_exchange_what_steps_leave(ratio: float) -> None:
    """Against all choices of bits; the steps alone lose 1.66 and 1.98 times what they might."""
    some = units(5, 3)
    every = [
        (sum(u.bytes(b) for u, b in zip(some, bits, strict=True)), sum(u.kl(b) for u, b in zip(some, bits, strict=True)))
        for bits in itertools.product([*ERRORS, None], repeat=5)
    ]
    limit = max(size for size, _ in every) / ratio
    found = allocate(some, 0, max_bytes=limit)
    assert found.total_bytes <= limit
    assert found.expected_kl < 1.5 * min(kl for size, kl in every if size <= limit)


def test_what_does_not_fit_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"at most 7\.07 times"):
        allocate(units(5, 0), 0, max_bytes=100)


def test_more_sensitive_units_get_more_bits() -> None:
    shape = ((256, 512),)
    some = [Unit((name,), shape, value) for name, value in (("low", 0.01), ("middle", 0.1), ("high", 10.0))]
    bits = allocate(some, 0, max_bytes=0.31 * sum(unit.bytes(None) for unit in some)).bits
    totals = [sum(bits[name] or (16,)) for name in ("low", "middle", "high")]
    assert totals == sorted(totals)
    assert totals[0] < totals[2]


def test_nothing_is_better_than_dense_and_larger() -> None:
    """Three layers on one weight that would have planes of their own: 4+4 three times is more than the weight once."""
    one = Unit(("a", "b", "c"), ((64, 128),) * 3, 1.0, dense=64 * 128 * 2)
    hull = one.hull()
    assert [bits for _, _, bits in hull] == [(2, 0), (3, 0), (4, 0), None]
    assert allocate([one], 0, max_bytes=1e9).bits == dict.fromkeys("abc")


def test_errors_are_those_of_the_quantizer() -> None:
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(5))
    for (bits, residual_bits), error in ERRORS.items():
        found = reference.quantize_weight(weight, bits=bits, residual_bits=residual_bits).error
        assert found == pytest.approx(error, rel=0.02)


def test_sensitivities_predict_the_kl_divergence_of_noise() -> None:
    """White noise of 0.3 % of the weights, in all layers at once and in the tied embedding alone."""
    torch.manual_seed(0)
    model = tiny_llama(initializer_range=0.2).eval()
    tokens = torch.randint(0, 97, (24, 24))
    linears = {n: m for n, m in model.named_modules() if is_linear(m) and n != "lm_head"}
    embeddings = {"model.embed_tokens": model.model.embed_tokens}
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with BlockStream(model, tokens, torch.device("cpu"), windows=1) as stream:
        values = measure(stream, linears, embeddings, progress=False)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    for names in (list(linears), ["model.embed_tokens"]):
        measured = []
        for _ in range(6):
            noisy = copy.deepcopy(model)
            for name in names:
                weight = noisy.get_submodule(name).weight
                rms = weight.detach().square().mean(1, keepdim=True).sqrt()
                weight.data += 0.003**0.5 * rms * torch.randn_like(weight)
            with torch.no_grad():
                wanted, found = (m(input_ids=tokens).logits.flatten(0, 1) for m in (model, noisy))
            measured.append(float(kl_divergence(wanted, found).mean()))
        predicted = 0.003 * sum(values[name] for name in names)
        assert predicted == pytest.approx(sum(measured) / len(measured), rel=0.25)


def test_a_budget_knows_where_calibration_helps() -> None:
    """Of two layers alike, the one whose inputs lie in few directions gets fewer bits."""
    torch.manual_seed(0)
    model = tiny_llama(hidden_size=64, intermediate_size=64, initializer_range=0.1).eval()
    tokens = torch.randint(0, 97, (8, 64))
    linears = {n: m for n, m in model.named_modules() if is_linear(m) and n != "lm_head"}
    groups = [[name] for name in linears if not name.endswith("up_proj")]
    groups[[g[0].endswith("gate_proj") for g in groups].index(True)].append("model.layers.0.mlp.up_proj")
    with BlockStream(model, tokens, torch.device("cpu")) as stream:
        gains = feedback_gains(stream, groups, linears, TurboQuantConfig(), enough=tokens.numel(), progress=False)
    with BlockStream(model, tokens, torch.device("cpu")) as stream:  # 8,192 are asked for, and 512 say less
        few = feedback_gains(stream, groups, linears, TurboQuantConfig(), enough=8192, progress=False)
    assert all(gains[name] < few[name] < 1 for name in gains)
    assert set(gains) == {name for group in groups for name in group}
    seen = {}
    for name in gains:
        linears[name].register_forward_pre_hook(lambda module, args, name=name: seen.update({name: args[0]}))
    with torch.no_grad():
        model(input_ids=tokens)
    for name, x in seen.items():
        rotated = rotate(x.reshape(-1, x.shape[-1]).double(), 64, 0)
        second = rotated.T @ rotated
        if second.diagonal()[:32].sum() < second.diagonal()[32:].sum():  # blocks of 32 by falling energy
            second = second.roll((32, 32), (0, 1))
        second = second / second.diagonal().mean() + DAMPING * torch.eye(64, dtype=torch.float64)
        # What is left of each input once those after it have predicted it.
        wanted = [1 / torch.linalg.inv(second[j:, j:])[0, 0] for j in range(64)]
        assert gains[name] == pytest.approx(float(sum(wanted)) / 64, rel=1e-3)
    plan = plan_bits(model, tokens=tokens, progress=False)
    units = {unit.names[0]: unit for unit in plan.units}
    free = {unit.names[0]: unit for unit in plan_bits(model, tokens=tokens, calibrated=False, progress=False).units}
    o_proj = "model.layers.0.self_attn.o_proj"
    assert units[o_proj].sensitivity == pytest.approx(free[o_proj].sensitivity * few[o_proj], rel=1e-3)


def test_a_budget_says_when_its_text_is_too_short() -> None:
    model = tiny_llama().eval()
    with pytest.warns(UserWarning, match=r"text has 8,191 tokens, and this model needs 8,192"):
        plan_bits(model, tokens=torch.randint(0, 97, (1, 8191)), progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan_bits(model, tokens=torch.randint(0, 97, (64, 128)), progress=False)
        plan_bits(model, tokens=torch.randint(0, 97, (2, 64)), calibrated=False, progress=False)
        plan_bits(model, progress=False)


def test_sensitivities_are_reproducible() -> None:
    model = tiny_llama().eval()
    tokens = torch.randint(0, 97, (2, 64))
    layers = {n: m for n, m in model.named_modules() if is_linear(m) and n != "lm_head"}
    found = []
    for part in (tokens, tokens.clone()):
        with BlockStream(model, part, torch.device("cpu"), windows=1) as stream:
            found.append(measure(stream, layers, {}, progress=False))
    assert found[0] == found[1]


def test_budgets_for_a_bias_that_belongs_to_heads_and_windows_at_once() -> None:
    """BLOOM's alibi is [windows * heads, 1, l]: cutting recorded arguments by their first dimension cannot be right."""
    model = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4))
    tokens = torch.randint(0, 97, (12, 64), generator=torch.Generator().manual_seed(1))
    plan = plan_bits(model, tokens=tokens, progress=False)
    assert all(unit.sensitivity > 0 for unit in plan.units)


def test_a_bias_per_head_is_not_cut_where_there_are_as_many_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """MPT's bias is [heads, 1, l]. The same window again and again says the same, however often."""
    monkeypatch.setattr(torch, "multinomial", lambda p, count, generator: p.argmax(-1, keepdim=True))  # no chance
    torch.manual_seed(0)
    model = MptForCausalLM(MptConfig(vocab_size=97, d_model=32, n_layers=2, n_heads=4, initializer_range=0.3)).eval()
    window = torch.randint(0, 97, (1, 24), generator=torch.Generator().manual_seed(1))
    linears = {n: m for n, m in model.named_modules() if is_linear(m) and n != "lm_head"}
    found = []
    for count in (3, 4):
        with BlockStream(model, window.expand(count, -1), torch.device("cpu"), windows=1) as stream:
            found.append(measure(stream, linears, {}, progress=False))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


class Positions(nn.Module):
    """An MLP that has an embedding of its own."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp, self.positions = mlp, nn.Embedding(24, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x + self.positions(torch.arange(x.shape[1])))


def test_an_embedding_inside_a_block_is_measured_like_its_layers() -> None:
    torch.manual_seed(0)
    model = tiny_llama(initializer_range=0.2).eval()
    model.model.layers[1].mlp = Positions(model.model.layers[1].mlp)
    tokens = torch.randint(0, 97, (24, 24))
    name = "model.layers.1.mlp.positions"
    with BlockStream(model, tokens, torch.device("cpu"), windows=1) as stream:
        values = measure(stream, {}, {name: model.get_submodule(name)}, progress=False)
    measured = []
    for _ in range(6):
        noisy = copy.deepcopy(model)
        weight = noisy.get_submodule(name).weight
        weight.data += 0.003**0.5 * weight.detach().square().mean(1, keepdim=True).sqrt() * torch.randn_like(weight)
        with torch.no_grad():
            wanted, found = (m(input_ids=tokens).logits.flatten(0, 1) for m in (model, noisy))
        measured.append(float(kl_divergence(wanted, found).mean()))
    assert 0.003 * values[name] == pytest.approx(sum(measured) / len(measured), rel=0.25)
    unit = next(
        unit for unit in plan_bits(model, tokens=tokens, calibrated=False, progress=False).units if name in unit.names
    )
    assert unit.sensitivity > 0


def test_layers_that_share_a_weight_have_one_sensitivity_that_of_all_uses() -> None:
    """One layer under two names in one block, one label: the gradient is the sum, and it is not counted twice."""
    torch.manual_seed(0)
    model = tiny_llama(initializer_range=0.2).eval()
    mlps = [layer.mlp for layer in model.model.layers]
    mlps[0].up_proj.weight = mlps[0].gate_proj.weight = mlps[1].gate_proj.weight
    tokens = torch.randint(0, 97, (4, 24))
    names = ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.gate_proj"]
    values = []
    for used in (names, names[1:2]):
        with BlockStream(model, tokens, torch.device("cpu"), windows=1) as stream:
            values.append(measure(stream, {name: model.get_submodule(name) for name in used}, {}, progress=False))
    assert values[0] == dict.fromkeys(names, values[1][names[1]])
