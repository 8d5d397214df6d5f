"""Fused projections: the same numbers, the same state dict, and the way back."""

import copy
import functools
import json
import pickle
import sys
import threading
import weakref

import pytest
import torch

from turboquant_weights import (
    TurboQuantConfig,
    TurboQuantLinear,
    fuse_projections,
    fusion,
    ops,
    quantize_model,
    unfuse_projections,
)
from turboquant_weights.cpu.library import chosen


@pytest.fixture(autouse=True)
def through_the_dispatcher(monkeypatch):
    """As on a GPU; the CPU engine, called directly, takes the layers one by one."""
    monkeypatch.setattr(ops, "is_direct", lambda *_: False)


class Block(torch.nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.q_proj = torch.nn.Linear(96, 64, bias=bias)
        self.k_proj = torch.nn.Linear(96, 32, bias=False)
        self.v_proj = torch.nn.Linear(96, 32, bias=bias)
        self.gate_proj = torch.nn.Linear(96, 80, bias=False)
        self.up_proj = torch.nn.Linear(96, 80, bias=False)

    def forward(self, x):
        attention = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)
        return torch.cat([attention, self.gate_proj(x) * self.up_proj(x)], -1)


@pytest.fixture(params=[0, 2])
def blocks(request):
    torch.manual_seed(0)
    separate = Block()
    quantize_model(separate, TurboQuantConfig(bits=4, residual_bits=request.param))
    fused = copy.deepcopy(separate)
    assert fuse_projections(fused) == [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]
    return separate, fused


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_same_numbers_and_one_matmul_per_group(blocks, monkeypatch):
    separate, fused = blocks
    x = torch.randn(2, 3, 96)
    with torch.no_grad():
        close(fused(x), separate(x))
        calls = []
        linear = ops.linear
        monkeypatch.setattr(ops, "linear", lambda *a: calls.append(a[1].shape) or linear(*a))
        for _ in range(2):
            close(fused(x), separate(x))
    assert [shape[0] for shape in calls if shape[0] in (128, 160)] == [128, 160] * 2


@pytest.mark.skipif(chosen() is None, reason="this machine has no engine")
def test_the_engine_takes_fused_layers_one_by_one(blocks, monkeypatch):
    separate, fused = blocks
    x = torch.randn(2, 3, 96)
    close(fused(x), separate(x))  # the planes are merged now
    monkeypatch.undo()
    monkeypatch.setattr(ops, "linear", lambda *_: pytest.fail("the dispatcher was asked"))
    with torch.no_grad():
        assert torch.equal(fused(x), separate(x))
    assert all(module._bound for module in fused.children())


def test_members_share_the_merged_memory(blocks):
    _, fused = blocks
    fused(torch.randn(1, 96))
    storages = {getattr(fused, name).codes.untyped_storage().data_ptr() for name in ("q_proj", "k_proj", "v_proj")}
    assert len(storages) == 1


def test_members_share_one_bias(blocks):
    """Views of one tensor, whatever becomes of them: training, another dtype, other memory, another parameter."""
    separate, fused = blocks
    x = torch.randn(2, 96)

    def joined():
        with torch.no_grad():
            close(fused(x), separate(x))
        biases = [fused.q_proj.bias, fused.v_proj.bias]
        assert biases[0].untyped_storage().data_ptr() == biases[1].untyped_storage().data_ptr()
        assert biases[1].data_ptr() == biases[0].data_ptr() + 96 * 4  # 64 of q, 32 zeros of k
        assert fused.q_proj.group.merged_bias() is not None

    with torch.inference_mode():
        close(fused(x), separate(x))
    assert not any(bias.is_inference() for bias in (fused.q_proj.bias, fused.v_proj.bias))
    joined()
    optimizers = [torch.optim.SGD([block.q_proj.bias, block.v_proj.bias], lr=0.1) for block in blocks]
    for block, optimizer in zip(blocks, optimizers, strict=True):
        block(x).square().sum().backward()
        optimizer.step()
    joined()
    for block in blocks:
        block.v_proj.bias.data = torch.ones(32)
    joined()
    for block in blocks:
        block.q_proj.bias = torch.nn.Parameter(torch.full((64,), 2.0))
    joined()
    for block in blocks:
        block.q_proj.bias = torch.nn.Parameter(torch.full((64,), 3.0, dtype=torch.bfloat16))
    with torch.no_grad():  # of another type: joined anew in every call
        close(fused(x), separate(x))
    assert fused.q_proj.bias.dtype == torch.bfloat16


def test_any_order_other_inputs_and_changed_inputs(blocks):
    separate, fused = blocks
    x, y = torch.randn(3, 96), torch.randn(3, 96)
    with torch.no_grad():
        close(fused.v_proj(x), separate.v_proj(x))
        close(fused.q_proj(y), separate.q_proj(y))
        close(fused.q_proj(x), separate.q_proj(x))
        close(fused.q_proj(x), separate.q_proj(x))  # called twice
        x.mul_(2)  # the kept parts are of the old values
        close(fused.k_proj(x), separate.k_proj(x))
    with torch.inference_mode():
        z = torch.randn(3, 96)
        close(fused(z), separate(z))
        for block in (separate, fused):
            block.q_proj.bias = torch.nn.Parameter(torch.ones(64), requires_grad=False)  # of inference mode itself
        close(fused(z), separate(z))


def test_gradients(blocks):
    separate, fused = blocks
    grads = []
    for block in (separate, fused):
        x = torch.linspace(-1, 1, 96).repeat(2, 1).requires_grad_()
        block.q_proj.bias.grad = None
        block(x).square().sum().backward()
        grads.append((x.grad, block.q_proj.bias.grad, block.v_proj.bias.grad))
    for a, b in zip(*grads, strict=True):
        close(a, b)


def test_changed_bias_and_loaded_planes_are_seen(blocks):
    separate, fused = blocks
    x = torch.randn(2, 96)
    fused(x)
    with torch.no_grad():
        fused(x)
        for block in blocks:
            block.q_proj.bias.add_(1)
        close(fused(x), separate(x))
    torch.manual_seed(5)
    other = Block()
    quantize_model(other, TurboQuantConfig(bits=4, residual_bits=separate.q_proj.residual_bits))
    fused.load_state_dict(other.state_dict())
    close(fused(x), other(x))


def test_state_dict_copy_pickle_dtype_and_back(blocks):
    separate, fused = blocks
    x = torch.randn(2, 96)
    fused(x)
    state = fused.state_dict()
    assert state.keys() == separate.state_dict().keys()
    assert all(torch.equal(value, separate.state_dict()[name]) for name, value in state.items())
    pointers = [value.untyped_storage().data_ptr() for name, value in state.items() if name.endswith(("codes", "bias"))]
    assert len(set(pointers)) == len(pointers)  # files cannot hold shared memory
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        close(twin(x), separate(x))
        assert twin.q_proj.group is not fused.q_proj.group
        assert twin.q_proj.group.members[0] is twin.q_proj
    fused.double()
    close(fused(x.double()), copy.deepcopy(separate).double()(x.double()))
    fused.float()
    assert unfuse_projections(fused) == 5
    assert type(fused.q_proj) is TurboQuantLinear
    for tensor in (fused.q_proj.codes, fused.q_proj.bias):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert torch.equal(fused(x), separate(x))


def test_base_only_drops_the_residual_of_the_group(blocks):
    separate, fused = blocks
    x = torch.randn(2, 96)
    fused(x)
    fused.k_proj.base_only_()
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(separate, name).base_only_()
    close(fused.q_proj(x), separate.q_proj(x))
    assert fused.v_proj.residual is None


def test_layers_that_disagree_stay_apart():
    block = Block()
    quantize_model(block, TurboQuantConfig(), skip=["gate_proj"])
    block.k_proj = TurboQuantLinear.from_linear(torch.nn.Linear(96, 32), TurboQuantConfig(seed=1))
    assert fuse_projections(block) == []
    hooked = Block()
    quantize_model(hooked, TurboQuantConfig())
    hooked.q_proj.register_forward_hook(lambda *_: None)
    assert fuse_projections(hooked) == [("gate_proj", "up_proj")]
    assert fuse_projections(hooked) == []  # already


def test_compiles_without_graph_breaks(blocks):
    separate, fused = blocks
    x = torch.randn(2, 96)
    fused(x)
    with torch.no_grad():
        compiled = torch.compile(fused, backend="eager", fullgraph=True)
        for _ in range(2):
            close(compiled(x), separate(x))
        close(compiled(x + 1), separate(x + 1))


def test_compiled_code_sees_another_bias(blocks):
    separate, fused = blocks
    x = torch.randn(2, 96)
    with torch.no_grad():
        fused(x)
        compiled = torch.compile(fused, backend="eager", fullgraph=True)
        close(compiled(x), separate(x))
        for block in blocks:
            block.q_proj.bias.add_(1)  # in place
        close(compiled(x), separate(x))
        for block in blocks:
            block.v_proj.bias = torch.nn.Parameter(torch.ones(32))
        close(compiled(x), separate(x))
        fused(x)
        close(compiled(x), separate(x))


def test_generation_of_a_transformers_model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.Qwen2ForCausalLM(config).eval()
    quantize_model(model, TurboQuantConfig(bits=4, residual_bits=4))
    prompt = torch.arange(8)[None]
    logits = model(prompt).logits
    tokens = model.generate(prompt, max_new_tokens=8, do_sample=False)
    assert len(fuse_projections(model)) == 4
    close(model(prompt).logits, logits)
    assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False), tokens)


def test_saving_a_fused_model(tmp_path):
    pytest.importorskip("transformers")
    from tiny_model import tiny_llama

    from turboquant_weights import load, save

    torch.manual_seed(0)
    model = tiny_llama(attention_bias=True).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.k_proj.bias)
    quantize_model(model, TurboQuantConfig(bits=4, residual_bits=2))
    separate = copy.deepcopy(model)
    fuse_projections(model)
    prompt = torch.arange(5)[None]
    model(prompt)  # merges
    for name, each in (("fused", model), ("separate", separate)):
        save(each, tmp_path / name)
    contents = []
    for name in ("fused", "separate"):
        data = (tmp_path / name / "model.safetensors").read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        contents.append((json.loads(data[8:end]), data[end:]))  # the library writes the header's metadata in any order
    assert contents[0] == contents[1]
    again = load(tmp_path / "fused", dtype=torch.float32)
    assert torch.equal(again(prompt).logits, separate(prompt).logits)


def test_planes_that_are_replaced_are_noticed(blocks):
    separate, fused = blocks
    torch.manual_seed(1)
    other = Block()
    quantize_model(other, TurboQuantConfig(bits=4, residual_bits=separate.q_proj.residual_bits))
    x = torch.randn(3, 96)
    with torch.no_grad():
        close(fused(x), separate(x))
        # For the length of a call.
        close(torch.func.functional_call(fused, other.state_dict(), (x,)), other(x))
        close(fused(x), separate(x))
        # The memory of one plane.
        q = {name: plane.clone() for name, plane in other.q_proj.state_dict().items()}
        for name in ("codes", "scales", "exponents"):
            getattr(fused.q_proj, name).data = q[name]
        if q.get("residual") is not None:
            fused.q_proj.residual.data = q["residual"]
        fused.q_proj.bias.data = q["bias"]
        close(fused(x)[:, :64], other(x)[:, :64])
        close(fused(x)[:, 64:], separate(x)[:, 64:])
        # All parameters.
        fused.load_state_dict(other.state_dict(), assign=True)
        close(fused(x), other(x))


@pytest.fixture
def hasty_threads():
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def run_at_once(functions):
    """Runs the functions in threads that start together; raises what one of them raised."""
    failures = []
    start = threading.Barrier(len(functions))

    def run(function):
        try:
            start.wait()
            function()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_threads_get_their_own_results(blocks, hasty_threads):
    separate, fused = blocks
    inputs = [torch.randn(2, 96) for _ in range(4)]
    wanted = [separate(x).detach() for x in inputs]

    @torch.no_grad()
    def compute(x, want):
        for _ in range(150):
            close(fused(x), want)

    run_at_once([functools.partial(compute, x, want) for x, want in zip(inputs, wanted, strict=True)])


def test_threads_that_come_before_the_planes_are_merged(blocks, hasty_threads):
    """Nobody sees half of what is merged."""
    separate, fused = blocks
    x = torch.randn(2, 96)
    want = separate(x).detach()

    @torch.no_grad()
    def compute(block):
        close(block(x), want)

    for _ in range(40):
        fresh = copy.deepcopy(fused)
        run_at_once([functools.partial(compute, fresh)] * 4)
        assert fresh.q_proj.group.bias is not None
        assert fresh.q_proj.group.bias.holds(fresh.q_proj.group._biases())


def test_planes_that_two_threads_find_replaced(blocks, monkeypatch):
    """The second leaves alone what the first has merged again: others compute with it."""
    separate, fused = blocks
    x = torch.randn(2, 96, requires_grad=True)
    fused(x)
    for block in blocks:
        block.k_proj.codes.data = block.k_proj.codes.data.flip(0)
    group, addresses, merged = fused.q_proj.group, fusion._addresses, []

    def second(parameters):
        monkeypatch.setattr(fusion, "_addresses", addresses)
        before = addresses(parameters)
        assert group.holds()
        merged.append(group.planes())  # the first
        return before

    monkeypatch.setattr(fusion, "_addresses", second)
    close(fused(x), separate(x))
    assert group.planes() is merged[0]


def test_parts_without_a_gradient_are_not_those_with_one(blocks):
    _, fused = blocks
    x = torch.randn(2, 96, requires_grad=True)
    with torch.no_grad():
        fused.q_proj(x)
    assert fused.k_proj(x).requires_grad


def test_a_sibling_that_is_not_called_keeps_nothing_alive(blocks):
    _, fused = blocks
    x = torch.randn(2, 96)
    with torch.no_grad():
        fused.q_proj(x)
    alive, parts = weakref.ref(x), fused.q_proj.group.parts.parts
    assert parts
    del x
    assert alive() is None
    assert not parts
