"""Passes that go on where the one before ended: the same results, and nothing computed twice that need not be."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_model import tiny_llama
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from turboquant_weights import Calibration, calibration, quantize_model
from turboquant_weights.calibration import input_of
from turboquant_weights.replay import Replay
from turboquant_weights.stream import BlockStream

ROOM = 1 << 20


class Part(nn.Module):
    """A layer that counts its calls, and what a subclass makes of its result."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.calls = 0

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        self.calls += 1
        return self.layer(x), None


class Twice(nn.Module):
    """Calls its part twice, with its own result in between, changed in place if asked to; then a last layer."""

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.part, self.last, self.in_place = Part(), nn.Linear(8, 8), in_place

    def forward(self, x: Tensor) -> Tensor:
        first, _ = self.part(x)
        first = first.add_(1) if self.in_place else first + 1
        second, _ = self.part(first)
        return self.last(second + first)


@torch.no_grad()
def passes(block: Twice, room: int = ROOM) -> tuple[Tensor, int]:
    """A pass to the last layer, whose weight is changed then, and one to the end; calls of the part in that one."""
    replay = Replay(block, [block.part.layer, block.last], room)
    replay.final([block.part.layer])
    x = torch.ones(2, 8)
    seen = input_of(block.last, lambda: replay.run(0, lambda: block(x)))
    torch.testing.assert_close(seen, input_of(block.last, lambda: block(x)))
    block.last.weight.mul_(3)
    replay.final([block.last])
    block.part.calls = 0
    return replay.run(0, lambda: block(x)), block.part.calls


def test_final_results_are_kept_for_the_next_pass() -> None:
    block = Twice()
    found, calls = passes(block)
    assert calls == 0
    assert torch.equal(found, block(torch.ones(2, 8)))


def test_results_changed_in_place_are_computed_again() -> None:
    block = Twice(in_place=True)
    with torch.no_grad():
        found, calls = passes(block)
        assert calls == 1  # the second result was left alone
        assert torch.equal(found, block(torch.ones(2, 8)))


def test_without_room_everything_is_computed_again() -> None:
    assert passes(Twice(), room=0)[1] == 2
    assert passes(Twice(), room=2 * 8 * 4)[1] == 1


@torch.no_grad()
def test_nothing_is_kept_behind_a_layer_still_to_be_rounded() -> None:
    block, x = Twice(), torch.ones(2, 8)
    replay = Replay(block, [block.part.layer, block.last], ROOM)
    replay.run(0, lambda: block(x))
    block.part.layer.weight.mul_(2)
    assert torch.equal(replay.run(0, lambda: block(x)), block(x))
    assert "forward" not in block.part.__dict__


@torch.no_grad()
def test_batches_are_told_apart_and_forgotten() -> None:
    block, x = Twice(), torch.ones(2, 8)
    replay = Replay(block, [], ROOM)
    replay.run(0, lambda: block(x))
    assert torch.equal(replay.run(1, lambda: block(2 * x)), block(2 * x))
    replay.forget(0)
    block.part.calls = 0
    replay.run(1, lambda: block(2 * x))
    assert block.part.calls == 0
    replay.run(0, lambda: block(x))
    assert block.part.calls == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_calibrated_model_is_the_same_with_and_without(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = tiny_llama().to(dtype)
    tokens = torch.randint(0, model.config.vocab_size, (6, 32))
    states = []
    for room in (0, ROOM, 1 << 30):
        monkeypatch.setattr(calibration, "_REPLAYED_BYTES", room)
        one = copy.deepcopy(model)
        quantize_model(one, calibration=Calibration(tokens), progress=False)
        states.append(one.state_dict())
    assert all(torch.equal(states[0][name], state[name]) for state in states for name in states[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_multiplied_in_float32_only_where_it_is_emulated(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for emulated in (True, False):
        model = tiny_llama().to(dtype)
        tokens = torch.randint(0, model.config.vocab_size, (2, 32))
        monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda emulated=emulated: emulated)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        with BlockStream(model, tokens, torch.device("cpu")) as stream, stream.block(0) as block, torch.no_grad():
            linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
            assert all(("forward" in module.__dict__) == emulated for module in linears)
            twin = copy.deepcopy(block)
            before = stream.run(0, stream.batches[0])
            for module in linears:
                module.weight.zero_()
            torch.testing.assert_close(stream.run(0, stream.batches[0], twin), before, rtol=0, atol=0)
            assert not torch.equal(stream.run(0, stream.batches[0]), before)
        assert not any("forward" in module.__dict__ for module in linears)


@pytest.mark.parametrize("emulated", [True, False])
def test_so_is_the_head(emulated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama().bfloat16()
    tokens = torch.randint(0, model.config.vocab_size, (2, 32))
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: emulated)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    seen: list[bool] = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append("forward" in module.__dict__))
    with BlockStream(model, tokens, torch.device("cpu")) as stream, torch.no_grad():
        seen.clear()
        hidden = stream.batches[0].hidden
        logits = stream.tail(tokens, hidden)
        assert seen == [emulated]
        assert "forward" not in model.lm_head.__dict__
        exact = model.lm_head(model.model.norm(hidden)).float()
        torch.testing.assert_close(logits.float(), exact, rtol=0.02, atol=0.02)


class Attentions(TorchDispatchMode):
    """Counts computed attentions."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "scaled_dot_product" in str(func)
        return func(*args, **(kwargs or {}))


def test_attention_goes_on_where_the_last_pass_ended() -> None:
    """Of the passes up to the output projection and on from there, one computes it."""
    model = tiny_llama()
    tokens = torch.arange(64).view(1, 64) % model.config.vocab_size
    with BlockStream(model, tokens, torch.device("cpu")) as stream, torch.no_grad():
        block, batch = stream.blocks[0], stream.batches[0]
        layers = [layer for layer in block.modules() if isinstance(layer, nn.Linear)]
        attention = block.self_attn
        replay = Replay(block, layers, ROOM)

        def run() -> Tensor:
            return stream.run(0, batch)

        replay.final([attention.q_proj, attention.k_proj, attention.v_proj])
        with Attentions() as first:
            seen = input_of(attention.o_proj, lambda: replay.run(0, run))
        torch.testing.assert_close(seen, input_of(attention.o_proj, run))
        attention.o_proj.weight.mul_(3)
        replay.final(layers)
        with Attentions() as second:
            found = replay.run(0, run)
        assert (first.count, second.count) == (1, 0)
        assert torch.equal(found, run())
