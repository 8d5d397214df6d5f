"""Stacks of experts without Transformers: what they store, compute, refuse and are recognised by."""

import copy
import pickle

import format_oracle as oracle
import pytest
import torch
from torch import nn
from torch.nn import functional

from turboquant_weights import (
    ConfigError,
    QuantizationError,
    TurboQuantConfig,
    TurboQuantExperts,
    TurboQuantLinear,
    quantize_model,
    reference,
)
from turboquant_weights import model as walker
from turboquant_weights.experts import DenseExperts, ExpertMatrix, find_stacks
from turboquant_weights.reference import PackedWeight

E, N, K = 5, 24, 40  # 40 columns are stored as 64


class Experts(nn.Module):
    """Routed experts as models write them: ``in_out`` multiplies from the right."""

    def __init__(self, layout="out_in", hidden=K, inner=N, experts=E):
        super().__init__()
        self.layout = layout
        up, down = (2 * inner, hidden), (hidden, inner)
        if layout == "in_out":
            up, down = up[::-1], down[::-1]
        self.up = nn.Parameter(torch.randn(experts, *up) / hidden**0.5)
        self.down = nn.Parameter(torch.randn(experts, *down) / inner**0.5)

    def forward(self, x, chosen):
        out = torch.zeros_like(x)
        for e in chosen.unique():
            rows = (chosen == e).nonzero()[:, 0]
            if self.layout == "out_in":
                gate, up = functional.linear(x[rows], self.up[e]).chunk(2, -1)
                part = functional.linear(gate.tanh() * up, self.down[e])
            else:
                gate, up = (x[rows] @ self.up[e]).chunk(2, -1)
                part = torch.matmul(gate.tanh() * up, self.down[int(e)])
            out[rows] += part
        return out


class Block(nn.Module):
    def __init__(self, layout="out_in"):
        super().__init__()
        self.first = nn.Linear(K, K)
        self.experts = Experts(layout)

    def forward(self, x, chosen):
        return self.experts(self.first(x), chosen)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def stack_of(layout="out_in", bits=4, residual_bits=2, dtype=torch.float32):
    shape = (E, N, K) if layout == "out_in" else (E, K, N)
    return TurboQuantExperts.from_parameter(
        torch.randn(shape, dtype=dtype), layout, TurboQuantConfig(bits, residual_bits, seed=3)
    )


def oracle_matrix(stack, e):
    packed = PackedWeight(*(None if p is None else p[e] for p in stack.packed))
    return oracle.dequantize(packed, K, stack.bits, stack.residual_bits, 128, 3)


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize(("bits", "residual_bits"), [(4, 0), (4, 2), (3, 1), (2, 4)])
def test_planes_and_products(layout, bits, residual_bits):
    """Each expert is what the format says, stored row by row whichever way the parameter lies; products use it alone."""
    stack = stack_of(layout, bits, residual_bits)
    assert stack.codes.shape == (E, N, 64 * bits // 8)
    assert stack.scales.shape == (E, N, 2)
    assert stack.exponents.shape == (E, N)
    assert (stack.residual is None) == (residual_bits == 0)
    assert stack.shape == ((E, N, K) if layout == "out_in" else (E, K, N))
    x = torch.randn(7, K)
    ids = torch.tensor([3, 0, 3, 4, 0, 3, 1])
    expected = torch.stack([x[i].double() @ oracle_matrix(stack, e).T for i, e in enumerate(ids.tolist())])
    torch.testing.assert_close(stack(x, ids).double(), expected, rtol=0, atol=2e-5)
    for i, e in enumerate(ids.tolist()):
        torch.testing.assert_close(stack(x[i], e).double(), expected[i], rtol=0, atol=2e-5)
        product = functional.linear(x[i : i + 1], stack[e]) if layout == "out_in" else x[i : i + 1] @ stack[ids[i]]
        torch.testing.assert_close(product[0].double(), expected[i], rtol=0, atol=2e-5)
        own = oracle_matrix(stack, e)
        torch.testing.assert_close(stack[e] + 0.0, (own if layout == "out_in" else own.T).float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(stack.dequantize()[3], stack[3] + 0.0, rtol=0, atol=0)


def test_equal_to_a_linear_layer_of_each_expert():
    weight = torch.randn(E, N, K)
    config = TurboQuantConfig(4, 1, seed=9)
    stack = TurboQuantExperts.from_parameter(weight, "out_in", config)
    errors = []
    for e in range(E):
        linear = nn.Linear(K, N, bias=False)
        linear.weight = nn.Parameter(weight[e].clone())
        layer = TurboQuantLinear.from_linear(linear, config)
        for plane, tensor in layer.packed._asdict().items():
            assert torch.equal(tensor, getattr(stack, plane)[e])
        errors.append(layer.quantization_error * weight[e].square().sum())
    assert stack.quantization_error == pytest.approx(float(sum(errors) / weight.square().sum()), rel=1e-5)
    swapped = TurboQuantExperts.from_parameter(weight.transpose(1, 2), "in_out", config)
    assert torch.equal(swapped.codes, stack.codes)


def test_only_active_experts_are_decoded(monkeypatch):
    from turboquant_weights import reference

    decoded = []
    original = reference.dequantize_weight
    monkeypatch.setattr(
        reference, "dequantize_weight", lambda p, *a, **k: decoded.append(p.codes.shape) or original(p, *a, **k)
    )
    multiplied = []
    linear = reference.linear
    stack = stack_of(dtype=torch.float64)  # float64 runs the reference
    monkeypatch.setattr(
        "turboquant_weights.ops._linear",
        lambda x, codes, *a: multiplied.append(codes.shape) or linear_of(linear, x, codes, *a),
    )
    model = Block().double()
    quantize_model(model, TurboQuantConfig(4), progress=False)
    multiplied.clear()
    model.experts(torch.randn(6, K).double(), torch.tensor([2, 2, 4, 2, 4, 4]))
    assert len(multiplied) == 4  # two experts, up and down
    assert not decoded
    stack(torch.randn(3, K).double(), torch.tensor([1, 1, 1]))
    assert multiplied[-1] == stack.codes.shape[1:] or len(multiplied) == 4
    gathered = stack[torch.tensor([2, 2, 0])]
    assert gathered.shape == (3, N, K)
    assert decoded == [stack.codes.shape[1:]] * 2
    repr(stack[1])
    assert stack[1].shape == (N, K)
    assert stack[1].dtype == torch.float64


def linear_of(linear, x, codes, residual, scales, exponents, bias, in_features, bits, residual_bits, group_size, seed):
    packed = PackedWeight(codes, residual, scales, exponents)
    return linear(x, packed, bias, in_features, bits=bits, residual_bits=residual_bits, group_size=group_size, seed=seed)


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_a_model_computes_with_its_quantized_experts(layout):
    model = Block(layout)
    dense = copy.deepcopy(model)
    report = quantize_model(model, TurboQuantConfig(4, 4), progress=False)
    rows = {row.name: row for row in report.layers}
    assert (rows["experts.up"].kind, rows["experts.up"].experts) == ("experts", E)
    assert (rows["experts.up"].out_features, rows["experts.up"].in_features) == (2 * N, K)
    assert rows["experts.up"].bytes == model.experts.up.packed.nbytes
    assert report.other_bytes == 0
    assert report.dense == {}
    assert report.config.experts == {"experts.up": layout, "experts.down": layout}
    assert "2 stacks of 5 experts" in str(report)
    x, chosen = torch.randn(9, K), torch.randint(E, (9,))
    expected = dense(x, chosen)
    assert (model(x, chosen) - expected).norm() < 0.02 * expected.norm()
    with torch.no_grad():  # the same weights, dense
        dense.first.weight.copy_(model.first.dequantize())
        dense.experts.up.copy_(model.experts.up.dequantize())
        dense.experts.down.copy_(model.experts.down.dequantize())
    torch.testing.assert_close(model(x, chosen), dense(x, chosen), rtol=0, atol=1e-5)


def test_gradients_of_the_input():
    """Of a routed product, of a product with one expert, and the gradient of the gradient."""
    stack = stack_of()
    weight = stack.dequantize()
    x, ids, grad = torch.randn(6, K, requires_grad=True), torch.tensor([4, 1, 1, 0, 4, 1]), torch.randn(6, N)
    (found,) = torch.autograd.grad(stack(x, ids), x, grad)
    torch.testing.assert_close(found, torch.einsum("sn,snk->sk", grad, weight[ids]), rtol=0, atol=1e-4)
    (found,) = torch.autograd.grad(functional.linear(x, stack[2]), x, grad)
    torch.testing.assert_close(found, grad @ weight[2], rtol=0, atol=1e-4)
    grad.requires_grad_(True)
    (found,) = torch.autograd.grad(stack(x, ids), x, grad, create_graph=True)
    (again,) = torch.autograd.grad(found, grad, torch.ones_like(found))
    torch.testing.assert_close(again, weight[ids].sum(2), rtol=0, atol=1e-4)


@pytest.mark.parametrize("count", [0, 1])
def test_few_rows_and_absent_experts(count):
    stack = stack_of()
    assert stack(torch.randn(count, K), torch.zeros(count, dtype=torch.int64)).shape == (count, N)
    out = stack(torch.randn(3, K), torch.tensor([E, 2, E + 3]))  # beyond the last: computed elsewhere
    assert not out[0].any()
    assert out[1].any()
    assert not out[2].any()


def test_ops_are_sound():
    stack = stack_of()
    x, ids = torch.randn(6, K, requires_grad=True), torch.tensor([4, 1, 1, 0, 4, 1])
    layout = (K, 4, 2, 128, 3)
    planes = [plane.data for plane in stack.packed]
    torch.library.opcheck(torch.ops.turboquant_weights.experts.default, (x, ids, *planes, *layout))
    grad = torch.randn(6, N, requires_grad=True)
    torch.library.opcheck(torch.ops.turboquant_weights.experts_input_gradient.default, (grad, ids, *planes, *layout))


def test_compiles_without_a_graph_break():
    stack = stack_of()
    compiled = torch.compile(lambda x, ids: stack(x.relu(), ids) * 2, fullgraph=True, backend="aot_eager")
    for rows in (3, 8):
        x, ids = torch.randn(rows, K), torch.randint(E, (rows,))
        torch.testing.assert_close(compiled(x, ids), stack(x.relu(), ids) * 2)


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_a_compiled_routed_loop_falls_back_and_computes_the_same():
    model = Block()
    quantize_model(model, progress=False)
    x, chosen = torch.randn(9, K), torch.randint(E, (9,))
    expected = model(x, chosen)
    torch.testing.assert_close(torch.compile(model, backend="eager")(x, chosen), expected)


def test_batched_products_and_anything_else():
    for layout in ("in_out", "out_in"):
        stack = stack_of(layout)
        weight = stack.dequantize()
        x = torch.randn(E, 4, weight.shape[1])
        torch.testing.assert_close(torch.bmm(x, stack), torch.bmm(x, weight), rtol=0, atol=1e-4)
        torch.testing.assert_close(x @ stack, x @ weight, rtol=0, atol=1e-4)
        turned = torch.randn(E, 4, weight.shape[2])
        torch.testing.assert_close(torch.bmm(turned, stack.transpose(1, 2)), torch.bmm(turned, weight.transpose(1, 2)))
        assert torch.equal(stack[1:3], weight[1:3])
        assert torch.equal(torch.cat([stack, stack]), torch.cat([weight, weight]))
        assert len(stack) == E
        assert torch.equal(stack[-1] + 0, weight[-1])
    with pytest.raises(IndexError, match="expert 5 of 5"):
        stack[5]
    with pytest.raises(AttributeError):
        _ = stack.no_such_thing
    with pytest.raises(QuantizationError, match=r"tensor \[\.\.\., 40\] is needed"):
        stack(torch.randn(2, 39), 0)


def test_copies_state_dicts_and_dtypes():
    stack = stack_of(dtype=torch.bfloat16)
    assert stack.dtype == torch.bfloat16
    half = copy.deepcopy(stack).half()
    assert half.codes.dtype == torch.uint8
    assert half.dtype == torch.float16
    again = pickle.loads(pickle.dumps(stack))
    assert torch.equal(again.dequantize(), stack.dequantize())
    empty = TurboQuantExperts(E, K, N, "out_in", TurboQuantConfig(4, 2, seed=3))
    assert not empty.dequantize().any()
    empty.load_state_dict(stack.state_dict())
    assert torch.equal(empty.codes, stack.codes)
    with pytest.raises(RuntimeError, match="quantized with seed 3"):
        TurboQuantExperts(E, K, N, "out_in", TurboQuantConfig(4, 2)).load_state_dict(stack.state_dict())
    base = stack.base_only_()
    assert base.residual is None
    assert base.label == "4"
    assert base(torch.randn(2, K).bfloat16(), 1).dtype == torch.bfloat16


def test_autocast():
    stack = stack_of()
    with torch.autocast("cpu", torch.bfloat16):
        assert stack(torch.randn(2, K), torch.tensor([0, 1])).dtype == torch.bfloat16
        assert stack(torch.randn(2, K), 1).dtype == torch.bfloat16


def module_with(*shapes, **attributes):
    module = nn.Module()
    for i, shape in enumerate(shapes):
        module.register_parameter(f"p{i}", nn.Parameter(torch.zeros(shape), requires_grad=False))
    for name, value in attributes.items():
        setattr(module, name, value)
    return nn.ModuleDict({"m": module})


@pytest.mark.parametrize(
    ("shapes", "attributes", "expected"),
    [
        ([(3, 16, 5), (3, 5, 8)], {}, ["out_in", "out_in"]),  # gate and up in one, down
        ([(3, 5, 16), (3, 8, 5)], {}, ["in_out", "in_out"]),
        ([(3, 8, 16), (3, 16, 4)], {}, ["out_in", "out_in"]),
        ([(3, 8, 5), (3, 5, 8)], {}, []),  # up and down: both ways fit
        ([(3, 8, 5), (3, 5, 8)], {"is_transposed": False}, ["out_in", "out_in"]),
        ([(3, 8, 5), (3, 5, 8)], {"is_transposed": True}, ["in_out", "in_out"]),
        ([(3, 8, 5)], {"num_experts": 3, "input_size": 5, "output_size": 8}, ["out_in"]),
        ([(3, 8, 5)], {"groups": 3, "in_features": 8, "out_features": 5}, ["in_out"]),
        ([(3, 8, 8)], {"num_experts": 3, "input_size": 8, "output_size": 8}, []),
        ([(1, 197, 16), (1, 1, 16)], {}, []),  # position embeddings, a class token
        ([(3, 8, 8, 2)], {}, []),
    ],
)
def test_what_is_recognised(shapes, attributes, expected):
    model = module_with(*shapes, **attributes)
    stacks, left = find_stacks(model, TurboQuantConfig())
    assert list(stacks.values()) == expected
    undecided = [name for name, p in model.named_parameters() if p.dim() == 3 and min(p.shape) > 1 and name not in stacks]
    assert list(left) == undecided
    assert all("experts={" in reason for reason in left.values())
    meta, _ = find_stacks(copy.deepcopy(model).to("meta"), TurboQuantConfig())
    assert meta == stacks


def test_convolutions_are_no_stacks():
    model = nn.Sequential(nn.Conv1d(8, 16, 4), nn.Linear(8, 8))
    assert find_stacks(model, TurboQuantConfig()) == ({}, {})
    report = quantize_model(model, progress=False)
    assert report.reasons == {"0.weight": "in a Conv1d, which is no linear layer"}


def test_layouts_can_be_told():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "m": module_with((3, 8, 8))["m"]})
    report = quantize_model(copy.deepcopy(model), progress=False)
    assert "experts={'m.p0': 'out_in'}, or 'in_out'" in report.reasons["m.p0"]
    assert report.dense == {"m.p0": 4 * 3 * 64}
    assert "left as it was: m.p0" in str(report)
    report = quantize_model(model, TurboQuantConfig(experts={"*.p0": "in_out"}), progress=False)
    assert report.config.experts == {"m.p0": "in_out"}
    assert isinstance(model.m.p0, TurboQuantExperts)
    for value, message in [
        ({"*.p0": "up"}, "must be 'out_in'"),
        ("m.p0", "must map names"),
        ({1: "out_in"}, "must map names"),
    ]:
        with pytest.raises(ConfigError, match=message):
            TurboQuantConfig(experts=value)


def test_patterns_reach_stacks():
    config = TurboQuantConfig(4, layer_bits={"experts.down": (3, 1), "first": (4, 2)})
    model = Block()
    report = quantize_model(model, config, skip=["*.up"], progress=False)
    assert {row.name: row.label for row in report.layers} == {"first": "4+2", "experts.down": "3+1"}
    assert report.skipped == {"experts.up": "matches skip pattern '*.up'"}
    assert report.skipped_bytes == report.other_bytes == 4 * E * 2 * N * K
    assert report.dense == {}
    assert report.config.skip == ("experts.up",)
    assert "skipped layers" in str(report)
    x, chosen = torch.randn(4, K), torch.randint(E, (4,))
    assert model(x, chosen).isfinite().all()
    for wrong in (dict(layer_bits={"*.gate": (4, 0)}), dict(experts={"*.gate": "out_in"}), dict(skip=["*.gate"])):
        with pytest.raises(ConfigError, match=r"'\*\.gate'.* matches no"):
            quantize_model(Block(), TurboQuantConfig(**wrong), progress=False)


def test_stacks_that_cannot_be_cut_are_named_with_their_bytes():
    model = Block()
    model.experts.up.data = model.experts.up.data.to(torch.float8_e4m3fn)
    model.other = nn.Module()
    model.other.twin = model.experts.down  # shared by two modules
    report = quantize_model(model, progress=False)
    assert "only float32, float16 and bfloat16" in report.reasons["experts.up"]
    assert report.reasons["experts.down"] == "2 modules share this stack"
    assert report.dense["experts.down"] == 4 * E * N * K
    assert report.config.experts is None
    with pytest.raises(QuantizationError, match=r"no linear layer to quantize.*experts\.up: experts in torch.float8"):
        quantize_model(nn.ModuleDict({"experts": model.experts, "other": model.other}), progress=False)


def test_bad_weights_name_expert_and_position():
    model = Block()
    with torch.no_grad():
        model.experts.down[2, 3, 4] = torch.inf
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(QuantizationError, match=r"^experts\.down\[2\]\[3, 4\] is inf"):
        quantize_model(model, progress=False)
    assert list(model.state_dict()) == list(before)


def test_a_bare_experts_module():
    model = Experts()
    quantize_model(model, progress=False)
    assert isinstance(model.up, TurboQuantExperts)
    assert walker.dense_parameters(model) == {}


def test_dense_stacks_compute_what_the_parameter_does():
    for layout in ("out_in", "in_out"):
        weight = nn.Parameter(torch.randn((E, N, K) if layout == "out_in" else (E, K, N)))
        stack = DenseExperts(weight, layout)
        x, ids = torch.randn(6, K), torch.tensor([4, 1, 1, 0, 4, 1])
        matrices = weight if layout == "out_in" else weight.transpose(1, 2)
        expected = torch.einsum("sk,snk->sn", x, matrices[ids])
        torch.testing.assert_close(stack(x, ids), expected, rtol=0, atol=1e-4)
        product = functional.linear(x, stack[1]) if layout == "out_in" else x @ stack[1]
        torch.testing.assert_close(product, x @ matrices[1].T, rtol=0, atol=1e-4)
        assert isinstance(stack[0], ExpertMatrix)


def test_experts_that_are_elsewhere_give_zeros():
    x = torch.randn(5, 4)
    out = reference.routed(x, torch.tensor([1, -1, 0, 2, 7]), 2, 4, lambda rows, expert: rows * (expert + 1))
    torch.testing.assert_close(out, torch.stack([x[0] * 2, x[1] * 0, x[2], x[3] * 0, x[4] * 0]))
