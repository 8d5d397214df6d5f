"""``torch.compile`` of whole models: one graph each, lengths do not pile up, ``generate`` with a static cache, adapters."""

import shutil

import pytest
import torch

transformers = pytest.importorskip("transformers")

from torch._dynamo.utils import counters  # noqa: E402

import turboquant_weights as tq  # noqa: E402

SIZES = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
KINDS = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig),
    "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config),
}
LENGTHS = (5, 9, 16, 31, 40)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def build(kind="llama", dtype=torch.float32, blocks=1, embeddings=None):
    torch.manual_seed(0)
    model_class, config_class = KINDS[kind]
    config = config_class(**SIZES, num_hidden_layers=blocks, tie_word_embeddings=True)
    model = model_class(config).to(dtype).eval()
    tq.quantize_model(model, tq.TurboQuantConfig(4, 2, embeddings=embeddings), progress=False)
    return model


def tokens(length):
    return torch.arange(length)[None] * 7 % 97


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("kind", "options"),
    [("qwen2", dict(dtype=torch.bfloat16)), ("llama", dict(embeddings={"model.embed_tokens": (4, 4)}))],
    ids=["qwen2, bfloat16", "llama, embeddings"],
)
@torch.no_grad()
def test_one_graph_for_all_lengths(kind, options):
    """The whole model is one graph; a second length makes it dynamic, and no later one compiles anything."""
    model = build(kind, **options)
    compiled = torch.compile(lambda ids: model(ids, use_cache=False).logits, fullgraph=True, backend="aot_eager")
    for count, length in enumerate(LENGTHS, 1):
        got, expected = compiled(tokens(length)), model(tokens(length), use_cache=False).logits
        torch.testing.assert_close(got, expected)
        assert graphs() == min(count, 2)
    assert not counters["graph_break"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs g++ to compile for CPUs")
@torch.no_grad()
def test_inductor():
    """The default backend, around this package's own CPU engine."""
    model = build()
    compiled = torch.compile(lambda ids: model(ids, use_cache=False).logits, fullgraph=True, dynamic=True)
    for length in LENGTHS[:3]:
        torch.testing.assert_close(compiled(tokens(length)), model(tokens(length), use_cache=False).logits)
    assert graphs() == 1


@pytest.mark.parametrize("embeddings", [None, {"model.embed_tokens": (4, 4)}], ids=["", "embeddings"])
def test_generate_with_a_static_cache(embeddings):
    """``generate`` compiles the step for one token: once for a size of the cache, whatever the prompt."""
    model = build(blocks=2, embeddings=embeddings)
    settings = transformers.CompileConfig(backend="aot_eager", fullgraph=True, dynamic=None, mode=None)
    settings._compile_all_devices = True  # Transformers would leave CPUs out
    options = dict(do_sample=False, pad_token_id=0, eos_token_id=None)
    for prompt, new in ((6, 12), (10, 8), (3, 15)):
        expected = model.generate(tokens(prompt), max_new_tokens=new, **options)
        got = model.generate(
            tokens(prompt), max_new_tokens=new, cache_implementation="static", compile_config=settings, **options
        )
        assert torch.equal(got, expected)
        assert graphs() == 1
    assert not counters["graph_break"]


def test_models_with_adapters():
    """Values and gradients of the adapters."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(build(), settings)

    def loss(ids):
        return model(ids, labels=ids, use_cache=False).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled):
        model.zero_grad()
        value = function(tokens(9))
        value.backward()
        results.append([value.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    torch.testing.assert_close(*results)
    assert graphs() == 1
