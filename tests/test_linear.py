"""``TurboQuantLinear`` as a drop-in for ``nn.Linear``, and the operators below it."""

import copy
import io
import pickle

import format_oracle as oracle
import pytest
import torch
from torch import nn

from turboquant_weights import ConfigError, QuantizationError, TurboQuantConfig, TurboQuantLinear, rotation

CONFIGS = [
    TurboQuantConfig(bits=4),
    TurboQuantConfig(bits=3, residual_bits=2, group_size=64, seed=4),
    TurboQuantConfig(bits=2),
]
IDS = ["4", "3+2", "2"]
PLANES = ("codes", "residual", "scales", "exponents")


def dense(in_features=100, out_features=37, bias=True, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(in_features, out_features, bias)


def inputs(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def equal(a, b):
    state = a.state_dict()
    other = b.state_dict()
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


@pytest.fixture(params=CONFIGS, ids=IDS)
def config(request):
    return request.param


@pytest.fixture
def layer(config):
    return TurboQuantLinear.from_linear(dense(), config)


# -- what the layer is


def test_forward_is_the_dequantized_linear(layer, config):
    settings = dict(bits=config.bits, residual_bits=config.residual_bits, group_size=config.group_size, seed=config.seed)
    weight = oracle.dequantize(layer.packed, 100, **settings)
    x = inputs(2, 5, 100)
    torch.testing.assert_close(layer(x).double(), x.double() @ weight.T + layer.bias.double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(layer.dequantize().double(), weight, rtol=0, atol=1e-6)
    assert torch.equal(layer.weight, layer.dequantize())
    assert layer.dequantize(torch.bfloat16).dtype == torch.bfloat16


def test_parameters_are_planes_and_bias(layer, config):
    assert isinstance(layer, nn.Linear)
    names = {"codes", "scales", "exponents", "bias"} | ({"residual"} if config.residual_bits else set())
    assert set(dict(layer.named_parameters())) == set(layer.state_dict()) == names
    assert not list(layer.buffers())
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bias"]


def test_repr_says_what_matters():
    layer = TurboQuantLinear(256, 8, config=TurboQuantConfig(bits=4, residual_bits=2, seed=3))
    text = repr(layer)
    for part in ("TurboQuantLinear", "in_features=256", "out_features=8", "bias=True", "bits=4+2", "seed=3"):
        assert part in text
    assert layer.bits_per_weight == 6 + 8 / 32 + 8 / 256
    assert "bits_per_weight=6.281" in text


@pytest.mark.parametrize("bias", [True, False])
def test_a_new_layer_computes_zeros(bias):
    layer = TurboQuantLinear(33, 5, bias=bias)
    assert layer(inputs(2, 33)).tolist() == [[0.0] * 5] * 2
    assert (layer.bias is not None) == bias


def test_quantization_error_is_kept():
    linear = dense(128, 16)
    layer = TurboQuantLinear.from_linear(linear)
    weight = linear.weight.detach().double()
    expected = float((layer.dequantize() - weight).square().sum() / weight.square().sum())
    assert layer.quantization_error == pytest.approx(expected, rel=1e-3)


# -- from_linear


def test_from_linear_shares_bias_and_keeps_mode():
    linear = dense().eval()
    layer = TurboQuantLinear.from_linear(linear)
    assert layer.bias is linear.bias
    assert not layer.training
    assert TurboQuantLinear.from_linear(dense(bias=False)).bias is None


def test_from_conv1d_transposes():
    transformers = pytest.importorskip("transformers")
    linear = dense(96, 40)
    conv = transformers.pytorch_utils.Conv1D(40, 96)
    conv.weight.data = linear.weight.data.T.contiguous()
    conv.bias = linear.bias
    assert equal(TurboQuantLinear.from_linear(conv), TurboQuantLinear.from_linear(linear))


class FancyLinear(nn.Linear):
    pass


@pytest.mark.parametrize("module", [nn.Conv1d(4, 4, 1), FancyLinear(4, 4), nn.Embedding(4, 4)])
def test_other_modules_are_refused(module):
    with pytest.raises(QuantizationError, match=rf"head is a {type(module).__name__}: only nn\.Linear and Conv1D"):
        TurboQuantLinear.from_linear(module, name="head")


def test_meta_weights_are_refused():
    with pytest.raises(QuantizationError, match="meta device: load the model"):
        TurboQuantLinear.from_linear(nn.Linear(4, 4, device="meta"))


def test_bad_weights_name_the_layer():
    linear = dense()
    linear.weight.data[3, 7] = float("nan")
    with pytest.raises(QuantizationError, match=r"blocks\.2\.up: weight\[3, 7\] is nan"):
        TurboQuantLinear.from_linear(linear, name="blocks.2.up")


@pytest.mark.parametrize(
    "values", [dict(bits=1), dict(bits=4.0), dict(residual_bits=5), dict(group_size=96), dict(seed=2**32), dict(skip="a")]
)
def test_bad_settings_name_the_field(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        TurboQuantConfig(**values)


@pytest.mark.parametrize(
    "x", [torch.zeros(2, 99), torch.zeros(100, 2), torch.zeros(2, 100, dtype=torch.int64), torch.zeros(())]
)
def test_wrong_inputs_name_the_rule(x):
    with pytest.raises(QuantizationError, match=r"floating-point tensor \[\.\.\., 100\]"):
        TurboQuantLinear(100, 3)(x)


# -- moving it around


def test_state_dict_round_trip(layer, config):
    other = TurboQuantLinear(100, 37, config=config)
    assert not equal(layer, other)
    other.load_state_dict(layer.state_dict())
    assert equal(layer, other)
    assert torch.equal(layer(inputs(3, 100)), other(inputs(3, 100)))


def test_state_dict_of_another_shape_is_refused(layer, config):
    with pytest.raises(RuntimeError, match="size mismatch for codes"):
        TurboQuantLinear(64, 37, config=config).load_state_dict(layer.state_dict())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_equal_and_independent(layer, duplicate):
    other = duplicate(layer)
    assert equal(layer, other)
    assert torch.equal(layer(inputs(3, 100)), other(inputs(3, 100)))
    other.codes.data.zero_()
    assert not equal(layer, other)
    assert repr(other) == repr(layer)


def test_torch_save_round_trip(layer):
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    assert equal(torch.load(stream, weights_only=False), layer)


def test_meta_device_construction(layer, config):
    empty = TurboQuantLinear(100, 37, config=config, device="meta")
    with torch.device("meta"):
        context = TurboQuantLinear(100, 37, config=config)
    for other in (empty, context):
        assert all(p.is_meta for p in other.parameters())
        assert {n: (p.shape, p.dtype) for n, p in other.named_parameters()} == {
            n: (p.shape, p.dtype) for n, p in layer.named_parameters()
        }
        assert other(torch.empty(4, 100, device="meta")).shape == (4, 37)
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(empty(inputs(3, 100)), layer(inputs(3, 100)))


@pytest.mark.parametrize(
    "cast", [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.float64), lambda m: m.double()]
)
def test_casts_change_the_bias_only(layer, cast):
    planes = {name: getattr(layer, name).clone() for name in PLANES if getattr(layer, name) is not None}
    cast(layer)
    assert layer.bias.dtype != torch.float32
    for name, plane in planes.items():
        assert getattr(layer, name).dtype == plane.dtype
        assert torch.equal(getattr(layer, name), plane)
    assert layer(inputs(2, 100).to(layer.bias.dtype)).dtype == layer.bias.dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_input_decides_the_output_dtype(layer, dtype):
    out = layer(inputs(2, 100).to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), layer(inputs(2, 100)), rtol=0, atol=0.1)


def test_functional_call(layer, config):
    other = TurboQuantLinear(100, 37, config=config)
    x = inputs(2, 100)
    assert torch.equal(torch.func.functional_call(other, layer.state_dict(), x), layer(x))


def test_reset_parameters_keeps_the_weights(layer):
    before = copy.deepcopy(layer)
    layer.reset_parameters()
    assert equal(before, layer)


def test_base_only():
    config = TurboQuantConfig(bits=4, residual_bits=3, seed=2)
    layer = TurboQuantLinear.from_linear(dense(), config)
    packed = layer.packed
    full = layer.dequantize()
    assert layer.base_only_() is layer
    assert "residual" not in layer.state_dict()
    assert layer.packed.residual is None
    expected = oracle.dequantize(packed._replace(residual=None), 100, 4, 0, 128, 2)
    torch.testing.assert_close(layer.dequantize().double(), expected, rtol=0, atol=1e-6)
    x = inputs(3, 100)
    torch.testing.assert_close(layer(x).double(), x.double() @ expected.T + layer.bias.double(), rtol=0, atol=1e-5)
    assert not torch.equal(full, layer.dequantize())
    assert "bits=4," in repr(layer)
    before = copy.deepcopy(layer)
    assert equal(layer.base_only_(), before)


# -- gradients, autocast, compilation


def test_gradients_reach_input_and_bias(layer):
    x = inputs(2, 3, 100).requires_grad_()
    probe = inputs(2, 3, 37, seed=2)
    (layer(x) * probe).sum().backward()
    weight = layer.dequantize(torch.float64)
    torch.testing.assert_close(x.grad.double(), probe.double() @ weight, rtol=0, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, probe.sum((0, 1)), rtol=0, atol=1e-5)
    assert all(getattr(layer, name).grad is None for name in ("codes", "scales", "exponents"))


def test_gradcheck_in_double_precision():
    layer = TurboQuantLinear.from_linear(dense(40, 6)).double()
    x = inputs(2, 40).double().requires_grad_()
    torch.autograd.gradcheck(layer, (x,), eps=1e-3, atol=1e-4, nondet_tol=0)


def test_an_adapter_trains_on_top():
    layer = TurboQuantLinear.from_linear(dense(64, 64))
    down, up = nn.Linear(64, 4, bias=False), nn.Linear(4, 64, bias=False)
    nn.init.zeros_(up.weight)
    x, target = inputs(16, 64), inputs(16, 64, seed=5)
    optimizer = torch.optim.SGD([*down.parameters(), *up.parameters()], lr=0.5)
    losses = []
    for _ in range(5):
        hidden = layer(x)
        loss = (layer(hidden + up(down(hidden))) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_decides_the_dtype(layer, dtype):
    x = inputs(2, 100)
    with torch.autocast("cpu", dtype=dtype):
        out = layer(x)
        double = layer(x.double())
    assert torch.equal(out, layer(x.to(dtype)))
    assert torch.equal(double, layer(x.double()))  # like nn.Linear, which leaves float64 alone


def op_arguments(layer, x, *, with_bias):
    planes = (layer.codes, layer.residual, layer.scales, layer.exponents)
    numbers = (layer.in_features, layer.bits, layer.residual_bits, layer.group_size, layer.seed)
    return (x, *planes, layer.bias, *numbers) if with_bias else (x, *planes, *numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(layer, dtype):
    x = inputs(2, 3, 100).to(dtype).requires_grad_()
    torch.library.opcheck(torch.ops.turboquant_weights.linear.default, op_arguments(layer, x, with_bias=True))
    grad = inputs(2, 3, 37).to(dtype)
    torch.library.opcheck(
        torch.ops.turboquant_weights.linear_input_gradient.default, op_arguments(layer, grad, with_bias=False)
    )


def test_compiles_into_one_graph_with_any_batch(layer):
    torch._dynamo.reset()
    model = nn.Sequential(layer, nn.GELU())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (3, 5, 8):
        x = inputs(batch, 100).requires_grad_()
        y = inputs(batch, 100).requires_grad_()
        out = compiled(x)
        torch.testing.assert_close(out, model(y), rtol=0, atol=1e-6)
        out.sum().backward()
        model(y).sum().backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-6)


def test_compiles_under_autocast_and_without_gradients(layer):
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled(inputs(2, 100)), layer(inputs(2, 100)))


def test_export_keeps_the_operator(layer):
    program = torch.export.export(layer, (inputs(2, 100),))
    assert any("turboquant_weights.linear" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(inputs(2, 100)), layer(inputs(2, 100)))


# -- devices


@pytest.mark.parametrize("installed", [None, "3.2.0", "3.5.1+fb"])
def test_a_gpu_without_a_recent_triton_says_that_it_is_slow(monkeypatch, installed):
    from turboquant_weights import ops

    def version(name):
        if installed is None:
            raise ops.importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(ops.importlib.metadata, "version", version)
    with pytest.warns(UserWarning, match=installed.split("+")[0] if installed else "Triton is not installed"):
        assert not ops.has_triton.__wrapped__()


@pytest.mark.parametrize("installed", ["3.6.0", "3.10.1", "4.0"])
def test_a_recent_triton_is_used(monkeypatch, installed, recwarn):
    from turboquant_weights import ops

    monkeypatch.setattr(ops.importlib.metadata, "version", lambda name: installed)
    assert ops.has_triton.__wrapped__()
    assert not recwarn.list


# -- settings that the bytes do not show, and modes that must leave no mark


@pytest.mark.parametrize("other", [dict(seed=9), dict(group_size=64)])
def test_planes_of_other_settings_are_refused(other):
    layer = TurboQuantLinear.from_linear(dense(128), TurboQuantConfig(**other))
    target = TurboQuantLinear(128, 37, config=TurboQuantConfig())
    with pytest.raises(RuntimeError, match=f"quantized with {next(iter(other))}"):
        target.load_state_dict(layer.state_dict())


def test_planes_are_never_cast():
    layer = TurboQuantLinear.from_linear(dense(), TurboQuantConfig())
    state = {name: tensor.float() for name, tensor in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"codes is torch\.float32: it must be torch\.uint8"):
        layer.load_state_dict(state)


@pytest.mark.parametrize("bias", [True, False])
def test_weight_has_the_dtype_that_the_dense_one_would_have(bias):
    layer = TurboQuantLinear.from_linear(dense(bias=bias).bfloat16())
    assert layer.weight.dtype == torch.bfloat16
    assert layer.to(torch.float16).weight.dtype == torch.float16
    assert layer.double().weight.dtype == torch.float64
    assert TurboQuantLinear(8, 8, bias=bias, dtype=torch.bfloat16).weight.dtype == torch.bfloat16


def fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


@pytest.mark.parametrize(
    ("mode", "seed"), [(fake_tensors, 7001), (torch.inference_mode, 7002), (lambda: torch.device("meta"), 7003)]
)
def test_constants_survive_the_modes_of_their_first_caller(mode, seed):
    # The seed is used nowhere else: the signs are made inside the mode.
    layer = TurboQuantLinear(224, 37, config=TurboQuantConfig(seed=seed))
    with mode():
        layer.dequantize()
    after = layer.dequantize()
    assert type(after) is torch.Tensor
    assert not after.is_meta
    x = inputs(3, 224).requires_grad_()
    rotation.rotate(x, 32, seed).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("value", [1e40, 1e300])
def test_float64_beyond_float32_is_an_error(value):
    linear = dense().double()
    with torch.no_grad():
        linear.weight[1, 2] = value
    with pytest.raises(QuantizationError, match=r"weight\[1, 2\] is 1e\+"):
        TurboQuantLinear.from_linear(linear)


def test_gradients_of_gradients():
    layer = TurboQuantLinear.from_linear(dense())
    weight = layer.dequantize()
    x, direction = inputs(3, 100).requires_grad_(), inputs(3, 100, seed=2)
    (gradient,) = torch.autograd.grad(layer(x).square().sum() / 2, x, create_graph=True)
    (product,) = torch.autograd.grad(gradient, x, direction)
    torch.testing.assert_close(product, direction @ weight.T @ weight, rtol=1e-4, atol=1e-5)
