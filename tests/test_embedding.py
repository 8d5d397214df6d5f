"""``TurboQuantEmbedding``: the rows of the decoded weight, for plain embeddings and for models' own subclasses."""

import copy
import io
import pickle

import format_oracle as oracle
import pytest
import tiny_checkpoint
import torch
from torch import nn
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

from turboquant_weights import QuantizationError, TurboQuantConfig, TurboQuantEmbedding, TurboQuantLinear, reference
from turboquant_weights.cpu.library import chosen
from turboquant_weights.cpu.linear import look_up
from turboquant_weights.embedding import quantized_class
from turboquant_weights.planes import PLANES, LazyWeight

CONFIG = TurboQuantConfig(bits=4, residual_bits=2, seed=3)
N, K = 37, 96


def dense(dtype=torch.float32, **options):
    torch.manual_seed(0)
    return nn.Embedding(N, K, **options).to(dtype)


def scaled(dtype=torch.bfloat16):
    torch.manual_seed(0)
    module = Gemma3TextScaledWordEmbedding(N, K, padding_idx=0, embed_scale=K**0.5).to(dtype)
    return module.eval()


IDS = [torch.tensor([[0, 36, 5], [5, 5, 1]]), torch.tensor(7), torch.empty(2, 0, dtype=torch.long), torch.arange(N).int()]


@pytest.mark.parametrize(("bits", "residual_bits"), oracle.COMBINATIONS)
@pytest.mark.parametrize("k", [1, 40, 96])
def test_rows_are_those_of_the_oracle(bits, residual_bits, k):
    columns = -(-k // 32) * 32
    packed = tiny_checkpoint.planes(9, columns, bits, residual_bits)
    config = TurboQuantConfig(bits=bits, residual_bits=residual_bits, group_size=64, seed=5)
    module = TurboQuantEmbedding.from_packed(packed, nn.Embedding(9, k), config)
    expected = oracle.dequantize(packed, k, bits, residual_bits, 64, 5)
    ids = torch.tensor([[8, 0], [3, 3]])
    scale = float(oracle.dequantize(packed, columns, bits, residual_bits, 64, 5).abs().max())
    torch.testing.assert_close(module(ids).double(), expected[ids], rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.skipif(chosen() is None, reason="this machine has no engine")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("k", "group_size"), [(1, 128), (100, 32), (192, 64), (1664, 128)])
def test_the_engine_looks_up_what_the_reference_does(k, group_size, dtype):
    """Any number of ids, on any number of threads; the same numbers, but for the order of sums."""
    layout = dict(bits=4, residual_bits=2, group_size=group_size, seed=9)
    weight = torch.randn(50, k, generator=torch.Generator().manual_seed(k)) * torch.logspace(0, 3, 50)[:, None]
    packed = reference.quantize_weight(weight, **layout).weight
    before = torch.get_num_threads()
    for count in (0, 1, 5, 1000):
        ids = torch.randint(0, 50, (count, 2), generator=torch.Generator().manual_seed(count))
        want = reference.embedding(ids, packed, k, **layout, dtype=dtype)
        for given in (ids, ids.int(), ids.T.contiguous().T):
            results = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                results.append(look_up(given, packed, k, tuple(layout.values()), dtype))
            torch.set_num_threads(before)
            assert torch.equal(*results)
            # To the last digit, or a few of those of the largest entry of the row: the order of sums differs.
            error, size = (results[0].double() - want.double()).abs(), want.double().abs()
            assert bool((error <= torch.finfo(dtype).eps * size + 1e-6 * size.amax(-1, keepdim=True)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ids", IDS, ids=lambda ids: str(tuple(ids.shape)))
def test_shape_dtype_and_values(dtype, ids):
    original = dense(dtype)
    module = TurboQuantEmbedding.from_embedding(original, CONFIG)
    out = module(ids)
    assert (out.shape, out.dtype) == (original(ids).shape, dtype)
    assert not out.requires_grad
    torch.testing.assert_close(out, module.dequantize()[ids.long()], rtol=0.01, atol=1e-6)
    torch.testing.assert_close(out.float(), original(ids).float(), rtol=0, atol=0.2)


def test_error_and_planes_are_those_of_the_linear_layer_with_that_weight():
    original = dense()
    module = TurboQuantEmbedding.from_embedding(original, CONFIG)
    linear = nn.Linear(K, N, bias=False)
    linear.weight = original.weight
    head = TurboQuantLinear.from_linear(linear, CONFIG)
    assert all(torch.equal(getattr(head, plane), getattr(module, plane)) for plane in PLANES)
    assert module.quantization_error == head.quantization_error > 0
    assert module.bits_per_weight == head.bits_per_weight


@pytest.mark.parametrize("ids", [[0, N], [-1], [[5], [-(2**62)]], [2**31 - 1]])
def test_ids_out_of_range(ids):
    module = TurboQuantEmbedding.from_embedding(dense(), CONFIG)
    with pytest.raises(IndexError):
        module(torch.tensor(ids))
    with pytest.raises(IndexError):
        module.double()(torch.tensor(ids))  # by the reference


def test_ids_must_be_integers():
    with pytest.raises(QuantizationError, match=r"ids of torch.float32: int32 or int64"):
        TurboQuantEmbedding(4, 32)(torch.zeros(2))


def test_dtype_follows_conversions():
    module = TurboQuantEmbedding.from_embedding(dense(), CONFIG)
    assert module.half()(IDS[0]).dtype == torch.float16
    assert module.bfloat16().weight.dtype == torch.bfloat16
    assert module.codes.dtype == torch.uint8


def test_new_module_is_zero_and_lists_what_it_is():
    module = TurboQuantEmbedding(4, 32, padding_idx=1, config=CONFIG)
    assert not module(torch.arange(4)).any()
    assert repr(module) == "TurboQuantEmbedding(4, 32, padding_idx=1, bits=4+2, bits_per_weight=6.500, seed=3)"


def test_base_only():
    module = TurboQuantEmbedding.from_embedding(dense(), CONFIG)
    full = module(IDS[0])
    assert module.base_only_() is module
    assert module.residual is None
    assert not torch.equal(module(IDS[0]), full)
    torch.testing.assert_close(module(IDS[0]), module.dequantize()[IDS[0]])


def test_state_dict_checks_settings():
    module = TurboQuantEmbedding.from_embedding(dense(), CONFIG)
    again = TurboQuantEmbedding(N, K, config=CONFIG)
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(IDS[0]), module(IDS[0]))
    other = TurboQuantEmbedding(N, K, config=TurboQuantConfig(bits=4, residual_bits=2, seed=4))
    with pytest.raises(RuntimeError, match="quantized with seed 3, this layer has 4"):
        other.load_state_dict(module.state_dict())


def test_operator_contract():
    module = TurboQuantEmbedding.from_embedding(dense(), CONFIG)
    layout = (K, module.bits, module.residual_bits, module.group_size, module.seed, torch.float16)
    for ids in IDS:
        torch.library.opcheck(torch.ops.turboquant_weights.embedding, (ids, *module.packed, *layout))


@pytest.mark.parametrize("build", [dense, scaled])
def test_compile(build):
    module = TurboQuantEmbedding.from_embedding(build(), CONFIG)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS[0]), module(IDS[0]))
    read_weight = torch.compile(lambda: module.weight.sum(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(read_weight(), module.dequantize().sum(), rtol=0.02, atol=0.02)


# -- models' own embeddings


def test_a_subclass_keeps_its_class_and_what_it_computes(monkeypatch):
    original = scaled()
    module = TurboQuantEmbedding.from_embedding(original, CONFIG)
    assert isinstance(module, Gemma3TextScaledWordEmbedding)
    assert isinstance(module, TurboQuantEmbedding)
    assert type(module) is quantized_class(Gemma3TextScaledWordEmbedding, TurboQuantEmbedding)
    assert (module.padding_idx, module.scalar_embed_scale) == (0, K**0.5)
    expected = module.to_embedding()
    assert type(expected) is Gemma3TextScaledWordEmbedding
    monkeypatch.setattr(TurboQuantEmbedding, "dequantize", None)  # a lookup must not decode everything
    torch.testing.assert_close(module(IDS[0]), expected(IDS[0]), rtol=0.01, atol=0.01)
    assert "weight" in original._parameters


@pytest.mark.parametrize("build", [dense, scaled])
def test_copies_and_pickles(build):
    module = TurboQuantEmbedding.from_embedding(build(), CONFIG)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False)):
        assert type(other) is type(module)
        assert torch.equal(other(IDS[0]), module(IDS[0]))
        assert other.codes is not module.codes


def test_back_to_dense():
    original = dense(padding_idx=3)
    module = TurboQuantEmbedding.from_embedding(original, CONFIG)
    again = module.to_embedding()
    assert type(again) is nn.Embedding
    assert vars(again).keys() == vars(original).keys()
    assert list(again.state_dict()) == ["weight"]
    torch.testing.assert_close(again(IDS[0]), module(IDS[0]))


class Odd(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * ("weight" in self._parameters)


class Whole(nn.Embedding):
    def forward(self, ids):
        return nn.functional.embedding(ids, self.weight) * 2


class Other(nn.Embedding):
    def forward(self, ids, scale):
        return super().forward(ids) * scale


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (dense(max_norm=1.0), "embed has max_norm 1.0"),
        (nn.EmbeddingBag(4, 32), "embed is a EmbeddingBag"),
        (TurboQuantEmbedding(4, 32), "embed is a TurboQuantEmbedding"),
        (Odd(N, K), "embed, a Odd, cannot be quantized.*computes something else"),
        (Other(N, K), "embed, a Other, cannot be quantized.*raised TypeError"),
        (OPTLearnedPositionalEmbedding(16, 32), "a OPTLearnedPositionalEmbedding, cannot be quantized.*raised IndexError"),
        (dense().to("meta"), "embed: the weight is on the meta device"),
        (nn.utils.parametrizations.weight_norm(dense()), "a forward or a weight of its own"),
    ],
)
def test_embeddings_that_cannot_be_quantized(module, message):
    with pytest.raises(QuantizationError, match=message):
        TurboQuantEmbedding.from_embedding(module, CONFIG, name="embed")


def test_an_embedding_that_counts_positions_itself():
    module = TurboQuantEmbedding.from_embedding(BartLearnedPositionalEmbedding(16, K), CONFIG)
    ones = torch.ones(1, 5, dtype=torch.long)
    torch.testing.assert_close(module(ones), module.to_embedding()(ones))


def test_a_replaced_forward_is_an_error():
    module = dense()
    module.forward = module.forward
    with pytest.raises(QuantizationError, match="a forward or a weight of its own"):
        TurboQuantEmbedding.from_embedding(module, CONFIG)


def test_bad_weights_name_the_position():
    module = dense()
    with torch.no_grad():
        module.weight[3, 5] = torch.inf
    with pytest.raises(QuantizationError, match=r"^embed: weight\[3, 5\] is inf"):
        TurboQuantEmbedding.from_embedding(module, CONFIG, name="embed")


# -- the weight attribute


def test_a_weight_is_decoded_when_its_values_are_used(monkeypatch):
    module = TurboQuantEmbedding.from_embedding(dense(torch.bfloat16), CONFIG)
    decoded = module.dequantize()
    calls = []
    original = TurboQuantEmbedding.dequantize
    monkeypatch.setattr(TurboQuantEmbedding, "dequantize", lambda self: calls.append(1) or original(self))
    weight = module.weight
    assert isinstance(weight, LazyWeight)
    assert (weight.dtype, weight.device, weight.shape, weight.size(0)) == (torch.bfloat16, module.codes.device, (N, K), N)
    assert (weight.dim(), weight.numel(), len(weight), weight.is_floating_point()) == (2, N * K, N, True)
    assert not weight.requires_grad
    assert calls == []
    x = torch.randn(2, K, dtype=torch.bfloat16)
    assert torch.equal(nn.functional.linear(x, weight), x @ decoded.T)
    assert torch.equal(x @ weight.T, x @ decoded.T)
    assert torch.equal(weight[3], decoded[3])
    assert weight.float().numpy().tolist() == decoded.tolist()
    assert type(weight.detach()) is type(weight.clone()) is torch.Tensor
    assert torch.equal(copy.deepcopy(weight), decoded)
    assert torch.equal(pickle.loads(pickle.dumps(weight)), decoded)
    assert weight.data_ptr() != 0
    assert calls == [1]


def test_a_forward_that_reads_the_whole_weight_is_right():
    module = TurboQuantEmbedding.from_embedding(Whole(N, K), CONFIG)
    torch.testing.assert_close(module(IDS[0]), 2 * module.dequantize()[IDS[0]])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("ids", IDS, ids=lambda ids: str(tuple(ids.shape)))
@pytest.mark.parametrize("build", [dense, scaled])
def test_on_the_gpu(build, ids):
    module = TurboQuantEmbedding.from_embedding(build(), CONFIG)
    expected = module(ids)
    module.to("cuda")
    assert module.weight.device.type == "cuda"
    torch.testing.assert_close(module(ids.cuda()).cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lookups_are_contiguous_whatever_the_width(dtype):
    """As the fake kernel of the op says."""
    quantized = TurboQuantEmbedding.from_embedding(torch.nn.Embedding(9, 40, dtype=dtype))
    ids = torch.tensor([[1, 2, 8], [0, 0, 3]])
    found = quantized(ids)
    assert found.is_contiguous()
    assert found.untyped_storage().nbytes() == found.nbytes
    arguments = (ids, *quantized.packed, 40, *quantized.settings.values(), dtype)
    torch.library.opcheck(torch.ops.turboquant_weights.embedding.default, arguments, test_utils=("test_faketensor",))
