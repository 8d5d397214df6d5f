"""The CPU engine against the float64 oracle: at most twice the error of the eager computation in the same precision."""

import contextlib
import copy
import ctypes
import functools
import os
import pickle
import subprocess
import sys
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from format_oracle import dequantize

from turboquant_weights import QuantizationError, TurboQuantConfig, TurboQuantLinear, feedback, ops, reference
from turboquant_weights.codebook import boundary_tensor, level_tensor
from turboquant_weights.cpu import build, library
from turboquant_weights.cpu import linear as cpu_linear
from turboquant_weights.cpu.feedback import feed_back
from turboquant_weights.cpu.linear import linear

ENGINES = library.engines()
assert ENGINES, "the CPU engine is not built: python -m turboquant_weights.cpu"
# (engine, exact): each arithmetic of each engine
PATHS = [(engine, exact) for engine in ENGINES for exact in (False, True) if exact or engine.has_integer]
IDS = [f"{engine.name}-{'exact' if exact else 'integer'}" for engine, exact in PATHS]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
COMBINATIONS = [(bits, residual) for bits in (2, 3, 4) for residual in range(5)]
each_path = pytest.mark.parametrize(("engine", "exact"), PATHS, ids=IDS)


@functools.cache
def layer(n, k, bits=4, residual_bits=0, group_size=128, seed=0):
    """Quantized weight, with rows of every magnitude, and its float64 matrix."""
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n * k)) * torch.logspace(-3, 1, n)[:, None]
    layout = dict(bits=bits, residual_bits=residual_bits, group_size=group_size, seed=seed)
    packed = reference.quantize_weight(weight, **layout).weight
    return packed, dequantize(packed, k, bits, residual_bits, group_size, seed)


def inputs(m, k, dtype, seed=0):
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed + m)).to(dtype)


def check(x, n, k, engine, exact, bits=4, residual_bits=0, group_size=128, seed=0, bias=None):
    if x.dtype == torch.float32 and not exact:
        pytest.skip("float32 is always exact")
    packed, weight = layer(n, k, bits, residual_bits, group_size, seed)
    layout = dict(bits=bits, residual_bits=residual_bits, group_size=group_size, seed=seed)
    got = linear(x, packed, bias, k, **layout, engine=engine, exact=exact)
    assert got.dtype == x.dtype
    assert got.shape == (*x.shape[:-1], n)
    want = x.double() @ weight.T + (0 if bias is None else bias.double())
    eager = reference.linear(x, packed, bias, k, **layout)
    size = weight.norm(dim=1)  # rows of every magnitude count alike
    error, allowed = (((y.double() - want) / size).norm() for y in (got, eager))
    assert error <= 2 * allowed + 1e-7 * x.double().norm()
    assert torch.equal(got, linear(x, packed, bias, k, **layout, engine=engine, exact=exact)), "not deterministic"
    return got, want


@each_path
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "residual_bits"), COMBINATIONS)
def test_every_pair_of_planes(bits, residual_bits, dtype, engine, exact):
    for m in (1, 7, 40):
        check(inputs(m, 1000, dtype), 67, 1000, engine, exact, bits, residual_bits)


@each_path
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [0, 1, 2, 3, 4, 5, 8, 9, 16, 31, 32, 33, 130])
def test_any_number_of_tokens(m, dtype, engine, exact):
    bias = torch.randn(35, generator=torch.Generator().manual_seed(m)) if m % 2 else None
    check(inputs(m, 288, dtype), 35, 288, engine, exact, bias=bias)


@each_path
@pytest.mark.parametrize(
    ("n", "k", "group_size"),
    [(1, 1, 128), (3, 31, 128), (64, 128, 32), (65, 100, 64), (5, 512, 128), (2, 8200, 64), (131, 96, 128)],
)
def test_awkward_shapes(n, k, group_size, engine, exact):
    for residual_bits in (0, 3, 4):
        for m in (1, 6, 33):
            check(inputs(m, k, torch.bfloat16), n, k, engine, exact, 4, residual_bits, group_size, seed=7)


@each_path
@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 40])
def test_bias_of_any_dtype(m, bias_dtype, engine, exact):
    check(inputs(m, 96, torch.bfloat16), 33, 96, engine, exact, bias=torch.linspace(-3, 3, 33).to(bias_dtype))


@each_path
@pytest.mark.parametrize("m", [1, 5, 40])
def test_strides_and_leading_dimensions(m, engine, exact):
    wide = torch.randn(2, m, 2 * 288, generator=torch.Generator().manual_seed(1)).bfloat16()
    settings = dict(bits=4, residual_bits=0, group_size=128, seed=0, engine=engine, exact=exact)
    packed, _ = layer(35, 288)
    for x in (wide[..., :288], wide[..., ::2], wide[:, :, 288:].transpose(0, 1), wide[:, :, :288].flip(0)):
        got, _ = check(x, 35, 288, engine, exact)
        rows = [linear(row, packed, None, 288, **settings) for row in x.reshape(-1, 288)[:3]]
        assert rows[0].shape == (35,)
        difference = torch.stack(rows).double() - got.reshape(-1, 35)[:3].double()
        assert difference.norm() <= 0.01 * got.double().norm()
    padded = reference.PackedWeight(*(None if t is None else torch.stack([t, t], -1)[..., 0] for t in packed))
    same = [linear(wide[0, :, :288], planes, None, 288, **settings) for planes in (packed, padded)]
    assert torch.equal(*same)


@each_path
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("magnitude", [1e-40, 1e-30, 1e-7, 1.0, 300.0, 6e4, 1e30, 3e38])
def test_activations_of_any_magnitude(magnitude, dtype, engine, exact):
    """Outliers, blocks of very different size, tokens of zeros; sums that overflow only if the result does."""
    if magnitude > torch.finfo(dtype).max or magnitude < torch.finfo(dtype).smallest_normal / 1e4:
        pytest.skip("not in this dtype")
    if dtype == torch.float32 and not exact:
        pytest.skip("float32 is always exact")
    weight = torch.randn(24, 256, generator=torch.Generator().manual_seed(0)) * 1e-3
    packed = reference.quantize_weight(weight).weight
    exact_weight = dequantize(packed, 256, 4, 0, 128, 0)
    x = (torch.sign(torch.randn(4, 256, generator=torch.Generator().manual_seed(1))).double() * magnitude).to(dtype)
    x[1] = 0
    x[2, 1:] *= 1e-3
    x[3, :128] *= 1e-3
    for m in (4, 40):
        many = x.repeat(m // 4, 1)
        got = linear(many, packed, None, 256, bits=4, residual_bits=0, group_size=128, seed=0, engine=engine, exact=exact)
        want = many.double() @ exact_weight.T
        assert (got[1] == 0).all()
        tiny = 24**0.5 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the result's own grid
        error = (got.double() - want).norm(dim=1)
        assert (error <= 4 * torch.finfo(dtype).eps * want.norm(dim=1) + tiny).all()


@each_path
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_reach_their_token_only(value, engine, exact):
    packed, _ = layer(35, 288)
    for m in (3, 40):
        x = inputs(m, 288, torch.bfloat16)
        x[1, 17] = value
        got = linear(x, packed, None, 288, bits=4, residual_bits=0, group_size=128, seed=0, engine=engine, exact=exact)
        assert got[1].isnan().all()
        assert got[[0, *range(2, m)]].isfinite().all()


@each_path
@pytest.mark.parametrize("rows", [5, 48, 83])
def test_a_bias_decides_about_its_column_only(rows, engine, exact):
    packed, _ = layer(rows, 288)
    bias = torch.full((rows,), 3.0)
    bias[rows // 2] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # NaN, which must not become -0
    bias[rows - 1], bias[0] = float("inf"), 3.4e38  # to bfloat16 the second is infinity, too
    x = inputs(40, 288, torch.bfloat16)
    got = linear(x, packed, bias, 288, bits=4, residual_bits=0, group_size=128, seed=0, engine=engine, exact=exact)
    assert got[:, rows // 2].isnan().all()
    assert got[:, [0, rows - 1]].isposinf().all()
    assert got[:, 1 : rows // 2].isfinite().all()
    assert got[:, rows // 2 + 1 : rows - 1].isfinite().all()


@each_path
@pytest.mark.parametrize("m", [9, 40])
def test_results_are_rounded_to_the_nearest_bfloat16(m, engine, exact):
    packed, _ = layer(60, 288)
    packed = packed._replace(scales=torch.zeros_like(packed.scales))  # so that the result is the bias, exactly
    x = inputs(m, 288, torch.bfloat16)
    bias = 1 + torch.arange(60) * 2.0**-9  # every quarter of a step of bfloat16, ties among them
    got = linear(x, packed, bias, 288, bits=4, residual_bits=0, group_size=128, seed=0, engine=engine, exact=exact)
    assert torch.equal(got, bias.bfloat16().expand(m, 60))


@each_path
def test_extreme_exponents_and_scales(engine, exact):
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).double()
    rows = (weight * torch.tensor([1e-30, 1e-12, 1.0, 1e25])[:, None]).float()
    packed = reference.quantize_weight(rows).weight
    packed.exponents[0], packed.exponents[3] = -128, 100
    packed.scales[1] = torch.tensor([0, 255], dtype=torch.uint8)
    packed.scales[2] = torch.tensor([1, 31], dtype=torch.uint8)  # subnormal among the half-precision numbers
    want_weight = dequantize(packed, 64, 4, 0, 128, 0)
    for m in (2, 40):
        x = inputs(m, 64, torch.float32 if exact else torch.bfloat16) * 1e-3
        got = linear(x, packed, None, 64, bits=4, residual_bits=0, group_size=128, seed=0, engine=engine, exact=exact)
        want = x.double() @ want_weight.T
        limit = 1e-5 if exact else 1e-2
        assert ((got.double() - want).norm(dim=0) <= limit * want.norm(dim=0) + 1e-43).all()


def test_flushing_subnormals_changes_nothing():
    """Of the activation; results that are subnormal themselves are flushed, as the user wants."""
    x = inputs(3, 288, torch.bfloat16) * 2.0**-100
    layout = dict(bits=4, residual_bits=4, group_size=128, seed=0)
    packed, _ = layer(35, 288, 4, 4)
    for engine, exact in PATHS:
        want = linear(x, packed, None, 288, **layout, engine=engine, exact=exact)
        torch.set_flush_denormal(True)
        try:
            got = linear(x, packed, None, 288, **layout, engine=engine, exact=exact)
        finally:
            torch.set_flush_denormal(False)
        assert torch.equal(got, want), engine.name
        assert (want.abs() > torch.finfo(torch.bfloat16).smallest_normal).all()


# -- which path runs


def test_float32_is_exact_and_half_precision_is_not_by_default(monkeypatch):
    packed, _ = layer(67, 1000)
    layout = dict(bits=4, residual_bits=0, group_size=128, seed=0)
    engine = library.chosen()
    for dtype, exact in ((torch.float32, True), (torch.bfloat16, not engine.has_integer)):
        x = inputs(3, 1000, dtype)
        default = linear(x, packed, None, 1000, **layout)
        assert torch.equal(default, linear(x, packed, None, 1000, **layout, engine=engine, exact=exact))
    monkeypatch.setattr("turboquant_weights.cpu.linear.always_exact", lambda: True)
    assert torch.equal(
        linear(x, packed, None, 1000, **layout), linear(x, packed, None, 1000, **layout, engine=engine, exact=True)
    )


def run_python(code, **environment):
    variables = {name: value for name, value in os.environ.items() if not name.startswith("TURBOQUANT_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**variables, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done


@pytest.mark.parametrize("name", [*(engine.name for engine in ENGINES), "reference"])
def test_the_environment_names_an_engine(name):
    code = "from turboquant_weights.cpu.library import chosen; print(chosen().name if chosen() else 'reference')"
    assert run_python(code, TURBOQUANT_WEIGHTS_CPU=name).stdout.strip() == name
    if name == ENGINES[0].name:
        assert run_python(code).stdout.strip() == name, "not the best by default"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"TURBOQUANT_WEIGHTS_CPU": "sse9"}, "TURBOQUANT_WEIGHTS_CPU is 'sse9': this machine has .*portable, reference"),
        ({"TURBOQUANT_WEIGHTS_CPU_EXACT": "yes"}, "TURBOQUANT_WEIGHTS_CPU_EXACT is 'yes': 0 or 1"),
    ],
)
def test_bad_variables_are_refused(variables, message):
    import re

    code = "import torch, turboquant_weights as t; t.TurboQuantLinear(32, 4)(torch.zeros(1, 32).half())"
    assert re.search(message, run_python(code, **variables).stderr)


def test_without_the_library_the_reference_computes_and_says_so_once(tmp_path):
    code = f"""
import pathlib, warnings
import turboquant_weights.cpu.library as library
library.FOLDER = pathlib.Path({str(tmp_path)!r})
import torch, turboquant_weights as t
layer = t.TurboQuantLinear.from_linear(torch.nn.Linear(96, 8))
x = torch.randn(2, 96)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    y = [layer(x) for _ in range(3)]
assert torch.allclose(y[0], torch.nn.functional.linear(x, layer.weight, layer.bias), atol=1e-5)
messages = [str(w.message) for w in caught]
assert len(messages) == 1 and "python -m turboquant_weights.cpu" in messages[0], messages
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_float64_uses_the_reference():
    module = TurboQuantLinear.from_linear(torch.nn.Linear(100, 7), TurboQuantConfig(residual_bits=2))
    x = torch.randn(3, 100, dtype=torch.float64)
    want = x @ module.dequantize(torch.float64).T + module.bias.double()
    torch.testing.assert_close(module(x), want, rtol=1e-6, atol=1e-6)


# -- arguments are checked before an address crosses


def test_bad_tensors_are_refused():
    packed, _ = layer(35, 288, 4, 2)
    layout = dict(bits=4, residual_bits=2, group_size=128, seed=0)
    x = inputs(2, 288, torch.bfloat16)
    cases = {
        "codes": packed._replace(codes=packed.codes[:, 1:]),
        "scales": packed._replace(scales=packed.scales[1:]),
        "exponents": packed._replace(exponents=packed.exponents.int()),
        "residual is a": packed._replace(residual=packed.residual[:, :-1]),
        "residual_bits is 2": packed._replace(residual=None),
        r"codes.*meta": packed._replace(codes=packed.codes.to("meta")),
    }
    for message, bad in cases.items():
        with pytest.raises(QuantizationError, match=message):
            linear(x, bad, None, 288, **layout)
    with pytest.raises(QuantizationError, match="residual_bits is 0"):
        linear(x, packed, None, 288, **{**layout, "residual_bits": 0})
    for bias in (torch.zeros(34), torch.zeros(35, dtype=torch.int64), torch.zeros(35, 1)):
        with pytest.raises(QuantizationError, match="bias is a"):
            linear(x, packed, bias, 288, **layout)
    for bad_x in (x[:, 1:], x.double(), x.to("meta"), x.int()):
        with pytest.raises(QuantizationError, match="x is a"):
            linear(bad_x, packed, None, 288, **layout)


# -- layers that are called again and again


@pytest.fixture(params=["in C", "in Python"])
def way(request, monkeypatch):
    """Which calls a bound layer makes. Without Python's headers, or before PyTorch 2.10, there are none in C."""
    if request.param == "in Python":
        monkeypatch.setattr(cpu_linear, "calls", None)
    elif cpu_linear.calls is None or not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("no calls in C here")
    return request.param


def _called(residual_bits=2, bias=True):
    """A layer after its first call, which bound it, and an activation."""
    torch.manual_seed(0)
    dense = torch.nn.Linear(96, 40, bias=bias, dtype=torch.bfloat16)
    module = TurboQuantLinear.from_linear(dense, TurboQuantConfig(residual_bits=residual_bits)).requires_grad_(False)
    x = inputs(3, 96, torch.bfloat16)
    module(x)
    assert (module._bound is not None) == (library.chosen() is not None)
    return module, x


def _arguments(module):
    return *module.packed, module.bias, module.in_features, *module.settings.values()


def _in_python(module, x):
    """By the kernel that looks at everything anew."""
    return ops._linear_cpu(x, *_arguments(module))


def _by_the_op(module, x):
    return torch.ops.turboquant_weights.linear_inference(x, *_arguments(module))


CHANGES = {
    "contents": lambda module: module.codes.copy_(module.codes.flip(0)),
    "new parameter": lambda module: setattr(module, "codes", torch.nn.Parameter(module.codes.flip(0), requires_grad=False)),
    "new memory": lambda module: setattr(module.scales, "data", module.scales.flip(0)),
    "gaps": lambda module: setattr(module.exponents, "data", torch.stack([module.exponents.flip(0)] * 2, -1)[:, 0]),
    "no residual plane": lambda module: module.base_only_(),
    "no bias": lambda module: setattr(module, "bias", None),
    "bias": lambda module: setattr(module.bias, "data", torch.linspace(-1, 1, 40)),
    "bias of another type in the same bytes": lambda module: setattr(module.bias, "data", module.bias.view(torch.float16)),
    "loaded": lambda module: module.load_state_dict(_called()[0].state_dict(), assign=True),
    "parametrized": lambda module: torch.nn.utils.parametrize.register_parametrization(module, "bias", torch.nn.ReLU()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_that_changed_computes_with_what_it_has(change, way):
    module, x = _called()
    with torch.no_grad():
        CHANGES[change](module)
        want = _in_python(module, x)
        for _ in range(3):
            assert torch.equal(module(x), want)
            assert torch.equal(_by_the_op(module, x), want)


def test_planes_that_no_longer_fit_are_refused(way):
    """The memory that was checked is there, but not all of it belongs to the plane."""
    module, x = _called()
    module.codes.data = module.codes.data[:20]
    with pytest.raises(QuantizationError, match=r"scales is a .* \(20, 3\) on the CPU is needed"):
        module(x)
    module, x = _called()
    module.codes.data = module.codes.data[:1].expand(40, -1)
    assert torch.equal(module(x), _in_python(module, x))


def test_inputs_of_other_kinds_after_binding(way):
    module, x = _called()
    weight, bias = module.dequantize(torch.float64), module.bias.double()
    for given in (x.double(), x.float(), x.half(), x[0], x[:0], x[:, None], x.repeat(40, 1), torch.cat([x, x], 1)[:, ::2]):
        want = given.double() @ weight.T + bias
        got = module(given)
        assert got.dtype == given.dtype
        torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2)
    for bad in (x[:, 1:], x[0, 0], x.int()):
        with pytest.raises(QuantizationError, match="TurboQuantLinear got a"):
            module(bad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x.float()).dtype == torch.bfloat16
    assert module(x.requires_grad_()).requires_grad


def test_copies_of_a_layer_have_addresses_of_their_own(way):
    module, x = _called()
    want = module(x)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert again._bound is None
        with torch.no_grad():
            module.codes.zero_()
        assert torch.equal(again(x), want)
        module = again


def test_a_layer_does_not_keep_planes_alive(way):
    module, _ = _called()
    plane = weakref.ref(module.codes)
    module.codes = None
    assert plane() is None


needs_engine = pytest.mark.skipif(library.chosen() is None, reason="the environment asks for the reference")


@pytest.fixture
def at_once(way):
    """A bound layer, its call in C, and an activation."""
    if way == "in Python" or library.chosen() is None:
        pytest.skip("no calls in C here")
    module, x = _called()
    return module, lambda x: module._bound.at_once(x, module._parameters), x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(96,), (1, 96), (1, 1, 96), (15, 96), (2, 3, 2, 96)])
@pytest.mark.parametrize(("residual_bits", "bias"), [(0, True), (2, False), (4, True)])
def test_calls_in_c_are_those_of_the_op(residual_bits, bias, shape, dtype, at_once):
    module, _ = _called(residual_bits, bias)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = module._bound.at_once(x, module._parameters)
    assert torch.equal(got, _in_python(module, x))
    assert (got.dtype, got.shape) == (dtype, (*shape[:-1], 40))
    with torch.inference_mode():
        assert module._bound.at_once(x, module._parameters).is_inference()


class _Watching(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _transformed():
    level = torch._C._functorch._grad_increment_nesting()
    assert level == 1
    try:
        yield
    finally:
        torch._C._functorch._grad_decrement_nesting()


WATCHERS = {
    "dispatch mode": _Watching,
    "function mode": lambda: torch.device("cpu"),
    "profiler": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "forward mode": torch.autograd.forward_ad.dual_level,
    "transform": _transformed,
}


@pytest.mark.parametrize("watcher", WATCHERS)
def test_calls_in_c_give_way_to_whoever_watches(watcher, at_once):
    module, call, x = at_once
    for _ in range(2):
        assert call(x) is not None
        with WATCHERS[watcher]():
            assert call(x) is None
            assert not ops.is_direct(x, module._parameters)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_calls_in_c_give_way_to_tracers(at_once):
    _, call, x = at_once
    answers = []

    def traced(x):
        answers.append(call(x))
        return x + 1

    torch.jit.trace(traced, x, check_trace=False)
    assert answers == [None]
    assert call(x) is not None


def test_calls_in_c_give_way_to_gradients(at_once):
    module, call, x = at_once
    asking = x.clone().requires_grad_()
    assert call(asking) is None
    with torch.no_grad():
        assert torch.equal(call(asking), _in_python(module, x))
    module.bias.requires_grad_()
    assert call(x) is None
    with torch.no_grad():
        assert torch.equal(call(x), _in_python(module, x))


class _Named(torch.Tensor):
    pass


def test_calls_in_c_leave_other_tensors_to_python(at_once):
    module, call, x = at_once
    others = (
        x.double(), x.int(), x[:, 1:], x[0, 0], x[:0], x.repeat(6, 1), x.to("meta"), x.as_subclass(_Named), x.to_sparse(),
        None, torch.nn.Parameter(x, requires_grad=False), torch.cat([x, x], 1)[:, ::2], x.T.contiguous().T, 3, "x",
    )  # fmt: skip
    for given in others:
        assert call(given) is None, given
    bound = module._bound.at_once
    for name, tensor in module._parameters.items():
        for instead in (tensor.to("meta"), tensor.data.as_subclass(_Named), tensor.clone(), None, 3):
            assert bound(x, {**module._parameters, name: instead}) is None, (name, instead)
        assert bound(x, {key: value for key, value in module._parameters.items() if key != name}) is None, name
    assert bound(x, module._parameters) is not None
    for arguments in ((), (x,), (x, None), (x, module._parameters, 3)):
        with pytest.raises(TypeError, match="an input and a dictionary"):
            bound(*arguments)


def _met_by_the_op(monkeypatch):
    """A layer that the operator's kernel has seen, its arguments, and what the kernel leaves to Python from then on."""
    module, x = _called()
    left = []
    monkeypatch.setattr(cpu_linear, "_MOST_KNOWN", 2)

    def other(x, *arguments):
        left.append(x)
        return ops._linear_cpu(x, *arguments)

    kernel = cpu_linear.kernel(other)
    assert torch.equal(kernel(x, *_arguments(module)), module(x))
    assert len(left) == 1
    left.clear()
    return module, x, kernel, left


def test_the_operator_calls_c_for_layers_it_has_met(at_once, monkeypatch):
    module, x, kernel, left = _met_by_the_op(monkeypatch)
    for given in (x, x.half(), x.float(), x[0], x[:, None]):
        assert torch.equal(kernel(given, *_arguments(module)), _in_python(module, given))
    assert not left
    with torch.autograd.profiler.profile():  # whoever watches has seen the operator
        kernel(x, *_arguments(module))
    assert not left


def test_the_operator_leaves_all_else_to_python(at_once, monkeypatch):
    module, x, kernel, left = _met_by_the_op(monkeypatch)
    arguments = _arguments(module)
    for given in (x.double(), x.repeat(6, 1), x[:0], torch.cat([x, x], 1)[:, ::2]):
        assert torch.equal(kernel(given, *arguments), _in_python(module, given))
        assert left.pop() is given
    for i, tensor in enumerate(arguments[:5]):  # the same values elsewhere
        moved = *arguments[:i], tensor.clone(), *arguments[i + 1 :]
        assert torch.equal(kernel(x, *moved), _in_python(module, x))
        assert left.pop() is x
        kernel(x, *arguments)  # met again where its codes are
        left.clear()
    residual, in_features, bits, seed = 1, 5, 6, 9
    wrong = {
        "in_features": (in_features, 95), "bits": (bits, 3), "seed": (seed, 1), "codes": (0, arguments[0].view(80, -1)),
        "type": (0, arguments[0].view(torch.int8)), "absent": (residual, None),
    }  # fmt: skip
    for what, (i, value) in wrong.items():
        changed = *arguments[:i], value, *arguments[i + 1 :]
        if what == "seed":
            assert torch.equal(kernel(x, *changed), ops._linear_cpu(x, *changed))
        else:
            with pytest.raises(QuantizationError):
                kernel(x, *changed)
        assert left.pop() is x, what
    with pytest.raises(TypeError):
        kernel(x)
    with pytest.raises(TypeError):
        kernel(x, *arguments[:-1], "0")


def test_the_operator_keeps_no_references(at_once, monkeypatch):
    module, x, kernel, left = _met_by_the_op(monkeypatch)
    arguments = _arguments(module)
    held = [x, *arguments[:5], torch.Tensor, torch.bfloat16, None]
    before = [sys.getrefcount(each) for each in held]
    for _ in range(1000):
        kernel(x, *arguments)
        kernel(x.double(), *arguments)
        left.clear()
    after = [sys.getrefcount(each) for each in held]
    assert max(abs(b - a) for a, b in zip(before, after, strict=True)) < 20
    for _ in range(3):
        other, _ = _called()
        kernel(x, *_arguments(other))
    plane = weakref.ref(other.codes)
    other.codes = None
    assert plane() is None


def test_calls_in_c_report_what_went_wrong(at_once, monkeypatch):
    module, _, x = at_once
    real = library.library().tq_linear
    fails = ctypes.CFUNCTYPE(real.restype, *real.argtypes)(lambda *_: 1)
    monkeypatch.setattr(cpu_linear, "library", lambda: SimpleNamespace(tq_linear=fails))
    module._bound = None
    with pytest.raises(MemoryError, match="rotated activations"):
        module(x)
    with pytest.raises(MemoryError, match="rotated activations"):
        module._bound.at_once(x, module._parameters)


def test_calls_in_c_keep_no_references(at_once):
    module, call, x = at_once
    held = [x, *module._parameters.values(), module._parameters, torch.Tensor, torch.bfloat16, None]
    before = [sys.getrefcount(each) for each in held]
    for given in (x, x.double(), x.to_sparse(), None):
        for _ in range(1000):
            call(given)
            module._bound.at_once(x, {})
    after = [sys.getrefcount(each) for each in held]
    assert max(abs(b - a) for a, b in zip(before, after, strict=True)) < 20
    structure = weakref.ref(module._bound.product.owned[0])
    module._bound = None
    assert structure() is None, "the description of a layer outlives its calls"


def test_calls_compile_without_warnings_and_need_headers(tmp_path, monkeypatch):
    build.build_calls(tmp_path / "calls.so", build.WARNINGS)
    monkeypatch.setattr(build.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(build.CompilerError, match=r"headers are not installed .*Python\.h"):
        build.build_calls(tmp_path / "again.so")
    assert not (tmp_path / "again.so").exists()


# -- threads and processes


class _Before:
    """The library, but another thread's turn comes before one of its functions."""

    def __init__(self, function, turn):
        self.function, self.turn = function, turn

    def __getattr__(self, name):
        real = getattr(library.library(), name)
        if name != self.function:
            return real
        prototype = ctypes.CFUNCTYPE(real.restype, *real.argtypes)  # that C can call, too
        return prototype(lambda *arguments: (self.turn(), real(*arguments))[1])


@needs_engine
def test_a_plane_that_another_thread_replaces_while_a_layer_is_bound(monkeypatch):
    module, x = _called()
    module._bound = None
    checked = cpu_linear._checked

    def interrupted(*arguments):
        out = checked(*arguments)
        module.codes = torch.nn.Parameter(module.codes.flip(0), requires_grad=False)
        return out

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(cpu_linear, "_checked", interrupted)
        module(x)
    assert torch.equal(module(x), _in_python(module, x))


@needs_engine
@pytest.mark.parametrize("name", [*reference.PackedWeight._fields, "bias"])
def test_what_the_engine_reads_lives_until_it_is_done(name, way, monkeypatch):
    """Also if another thread takes it from the layer in the meantime: the engine runs without the interpreter's lock."""
    module, x = _called()
    module._bound = None
    tensor, alive = weakref.ref(module._parameters[name]), []

    def take():
        module._parameters[name] = None
        alive.append(tensor() is not None)

    monkeypatch.setattr(cpu_linear, "library", lambda: _Before("tq_linear", take))
    module(x)
    assert alive == [True]


def _module():
    torch.manual_seed(0)
    return TurboQuantLinear.from_linear(torch.nn.Linear(1024, 1536, dtype=torch.bfloat16)).requires_grad_(False)


@pytest.mark.parametrize("m", [1, 6, 40])
def test_any_number_of_threads_gives_the_same_result(m):
    module, x, before = _module(), inputs(m, 1024, torch.bfloat16), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = module(x)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            got = module(x)
            if m < 32:
                assert torch.equal(got, want)
            else:
                torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-3)
    finally:
        torch.set_num_threads(before)


def test_several_python_threads():
    module, x = _module(), inputs(1, 1024, torch.bfloat16)
    want = module(x)
    wrong = []

    def work():
        torch.set_num_threads(2)
        for _ in range(50):
            if not torch.equal(module(x), want):
                wrong.append(threading.get_ident())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


def test_a_forked_child_computes_too():
    """After the parent has used the threads, which do not survive a fork."""
    code = """
import os, torch
torch.set_num_threads(2)
import turboquant_weights as t
torch.manual_seed(0)
layer = t.TurboQuantLinear.from_linear(torch.nn.Linear(1024, 1536, dtype=torch.bfloat16)).requires_grad_(False)
x = torch.randn(1, 1024).bfloat16()
want = layer(x)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(layer(x), want) else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(layer(x), want)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_no_second_openmp_runtime_is_loaded():
    code = """
import re, torch, turboquant_weights as t
runtimes = lambda: set(re.findall(r"/\\S*(?:gomp|iomp|libomp)\\S*", open("/proc/self/maps").read()))
before = runtimes()
t.TurboQuantLinear(1024, 1024)(torch.zeros(1, 1024).half())
assert before and runtimes() == before, (before, runtimes())
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


# -- the op around it


def test_gradient_and_compile_go_through_the_op():
    module = TurboQuantLinear.from_linear(torch.nn.Linear(96, 40))
    x = inputs(3, 96, torch.float32).requires_grad_()
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, module.dequantize().sum(0).expand(3, 96), rtol=1e-4, atol=1e-5)
    assert torch.equal(module.bias.grad, torch.full((40,), 3.0))
    half = inputs(3, 96, torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(half), module(half))


def test_autocast_decides_the_dtype():
    module, x = _module(), inputs(40, 1024, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = module(x)
        assert got.dtype == torch.bfloat16
        few = module(x[:2])
    torch.testing.assert_close(few, got[:2], rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
@pytest.mark.parametrize(("bits", "residual_bits"), [(2, 0), (3, 1), (4, 0), (4, 4)])
@pytest.mark.parametrize("rows", [1, 70, 300])
def test_feedback_of_a_block_is_that_of_the_reference(rows, bits, residual_bits, engine, monkeypatch):
    """Same codes but for ties, same errors and losses, for numbers of rows that no share of the work divides."""
    x = torch.randn(200, 32)
    factor = torch.linalg.cholesky(torch.linalg.inv(x.T @ x / 200), upper=True)
    block, scale = torch.randn(rows, 32) * 0.3, torch.rand(rows, 3) * 0.01 + 0.004
    scale[rows // 2, 1] = 0
    tables = boundary_tensor(bits, residual_bits, block.device), level_tensor(bits, residual_bits, block.device)
    codes, errors, losses = feed_back(block.T.contiguous().T, scale, factor, *tables, engine)
    monkeypatch.setattr(feedback, "chosen", lambda: None)
    wanted = feedback.feed_back(block, scale, factor, bits, residual_bits)
    same = (codes == wanted[0]).all(-1)
    assert same.float().mean() > 0.99
    torch.testing.assert_close(errors[same], wanted[1][same], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(losses, wanted[2], rtol=1e-3, atol=1e-5)
