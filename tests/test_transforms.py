"""``torch.func`` and forward mode: quantized modules have the derivatives of dense ones with the same weights."""

import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import turboquant_weights as tq
from turboquant_weights import QuantizationError

K, N, E = 40, 24, 4


@pytest.fixture(autouse=True)
def no_warnings():
    """Above all none of vmap's about missing batching rules."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def pair():
    """A quantized network and the dense one with the same weights, in float64."""
    model = nn.Sequential(nn.Linear(K, N), nn.Tanh(), nn.Linear(N, 7, bias=False)).double()
    tq.quantize_model(model, tq.TurboQuantConfig(4, 2), progress=False)
    dense = nn.Sequential(nn.Linear(K, N), nn.Tanh(), nn.Linear(N, 7, bias=False)).double()
    with torch.no_grad():
        dense[0].weight.copy_(model[0].dequantize())
        dense[0].bias.copy_(model[0].bias)
        dense[2].weight.copy_(model[2].dequantize())
    return model, dense


def stacks():
    """The same for routed experts of a stack."""
    stack = tq.TurboQuantExperts.from_parameter(torch.randn(E, N, K).double(), "out_in", tq.TurboQuantConfig(4, 2))
    weight = stack.dequantize()
    return stack, lambda x, ids: torch.einsum("sk,snk->sn", x, weight[ids])


X, T = torch.randn(2, 5, K, generator=torch.Generator().manual_seed(1)).double()
TRANSFORMS = {
    "grad": lambda f: grad(lambda x: f(x).square().sum())(X),
    "vjp": lambda f: vjp(f, X)[1](f(X)),
    "jvp": lambda f: torch.stack(jvp(f, (X,), (T,))),
    "jacrev": lambda f: jacrev(f)(X[:2]),
    "jacfwd": lambda f: jacfwd(f)(X[:2]),
    "vmap": lambda f: vmap(f)(X[:, None]),
    "vmap over columns": lambda f: vmap(f, in_dims=1)(X[:, None].expand(5, 3, K)),
    "vmap of vmap": lambda f: vmap(vmap(f))(X[None, :, None]),
    "vmap of grad": lambda f: vmap(grad(lambda x: f(x[None]).square().sum()))(X),
    "grad of grad": lambda f: grad(lambda x: grad(lambda x: f(x).square().sum())(x).square().sum())(X),
    "hessian": lambda f: hessian(lambda x: f(x[None]).square().sum())(X[0]),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_layers(transform):
    model, dense = pair()
    torch.testing.assert_close(transform(model), transform(dense), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["grad", "vjp", "jvp", "jacrev", "jacfwd", "grad of grad"])
def test_experts(name):
    stack, dense = stacks()
    ids = torch.tensor([2, 0, 3, 2, 2])
    transform = TRANSFORMS[name]
    torch.testing.assert_close(
        transform(lambda x: stack(x, ids[: len(x)])), transform(lambda x: dense(x, ids[: len(x)])), rtol=1e-3, atol=1e-3
    )


def test_experts_over_batches_of_rows_and_of_choices():
    stack, dense = stacks()
    x, ids = torch.randn(3, 5, K).double(), torch.randint(E, (3, 5))
    expected = torch.stack([dense(*row) for row in zip(x, ids, strict=True)])
    torch.testing.assert_close(vmap(stack)(x, ids), expected, rtol=1e-3, atol=1e-3)
    fixed = torch.stack([dense(rows, ids[0]) for rows in x])
    torch.testing.assert_close(vmap(stack, in_dims=(0, None))(x, ids[0]), fixed, rtol=1e-3, atol=1e-3)
    moved = torch.stack([dense(x[0], row) for row in ids])
    torch.testing.assert_close(vmap(stack, in_dims=(None, 0))(x[0], ids), moved, rtol=1e-3, atol=1e-3)


def test_forward_mode_without_functorch():
    model, dense = pair()
    with torch.autograd.forward_ad.dual_level():
        tangents = [
            torch.autograd.forward_ad.unpack_dual(f(torch.autograd.forward_ad.make_dual(X, T))).tangent
            for f in (model, dense)
        ]
    torch.testing.assert_close(*tangents, rtol=1e-3, atol=1e-3)


def test_functional_call():
    model, dense = pair()
    parameters = dict(model.named_parameters())
    assert torch.equal(functional_call(model, parameters, X), model(X))
    bias = torch.randn(6, N).double()
    for transform in (
        lambda f: f({"0.bias": bias[0]}),
        lambda f: vmap(lambda b: f({"0.bias": b}))(bias),
        lambda f: grad(lambda b: f({"0.bias": b}).square().sum())(bias[0]),
        lambda f: torch.stack(jvp(lambda b: f({"0.bias": b}), (bias[0],), (bias[1],))),
    ):
        expected = transform(lambda changed: functional_call(dense, changed, X))
        torch.testing.assert_close(
            transform(lambda changed: functional_call(model, changed, X)), expected, rtol=1e-3, atol=1e-3
        )


def test_embeddings():
    embedding = tq.TurboQuantEmbedding.from_embedding(nn.Embedding(20, K), tq.TurboQuantConfig(4, 2))
    ids = torch.arange(12).view(3, 4)
    assert torch.equal(vmap(embedding)(ids), embedding(ids))
    assert torch.equal(vmap(embedding, in_dims=1)(ids), embedding(ids).transpose(0, 1))
    model = nn.Sequential(nn.Linear(K, 3))
    scale = torch.ones(K, requires_grad=False)
    assert grad(lambda s: model(embedding(ids) * s).sum())(scale).abs().sum() > 0
    with pytest.raises(NotImplementedError, match="one after the other"):
        vmap(lambda codes: functional_call(embedding, {"codes": codes}, ids))(torch.stack([embedding.codes] * 2))


def test_models_on_top_of_one_another():
    """vmap over the planes of several models computes each; a derivative inside it is refused, not zero."""
    models = [pair()[0] for _ in range(2)]
    planes = {
        name: torch.stack([dict(m.named_parameters())[name] for m in models]) for name, _ in models[0].named_parameters()
    }

    def call(parameters, x):
        return functional_call(models[0], parameters, x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = vmap(call, in_dims=(0, None))(planes, X)
    torch.testing.assert_close(out, torch.stack([m(X) for m in models]), rtol=0, atol=1e-6)
    with pytest.raises(QuantizationError, match="one by one"):
        vmap(lambda p: jvp(lambda x: call(p, x), (X,), (T,))[1])(planes)
