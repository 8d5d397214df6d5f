"""The benchmark's own parts: GPTQ, the merging of results, the second text, the tables."""

from __future__ import annotations

import contextlib
import copy
import importlib
from pathlib import Path

import pytest
import torch
from tiny_model import tiny_llama
from torch import Tensor

from turboquant_weights import TurboQuantConfig, quantize

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def loss(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    error = (weight - rounded).double()
    return (error @ hessian.double() * error).sum().item()


def test_gptq_without_correlation_is_rounding(benchmark) -> None:
    gptq = benchmark("gptq")
    torch.manual_seed(0)
    weight = torch.randn(24, 96)
    groups = weight.view(24, -1, 32)
    rounded = gptq.round_to_grid(groups, *gptq.integer_grid(groups, 4, search=True), 4).view(24, 96)
    hessian = torch.diag(torch.rand(96) + 0.1)
    assert torch.allclose(gptq.quantize_weight(weight, hessian, 4, 32, search=True), rounded, atol=1e-6)


def test_gptq_takes_nine_tenths_of_the_loss_of_rounding(benchmark) -> None:
    gptq = benchmark("gptq")
    torch.manual_seed(0)
    weight = torch.randn(48, 256)
    x = torch.randn(2000, 40) @ torch.randn(40, 256) + 0.1 * torch.randn(2000, 256)
    x[:, 7] = 0  # a dead input
    hessian = x.T @ x / len(x)
    groups = weight.view(48, -1, 128)
    nearest = gptq.round_to_grid(groups, *gptq.integer_grid(groups, 4, search=True), 4).view(48, 256)
    fed_back = gptq.quantize_weight(weight, hessian, 4, 128, search=True)
    assert loss(weight, fed_back, hessian) < 0.1 * loss(weight, nearest, hessian)
    assert fed_back[:, 7].abs().max() == 0
    # Nothing but 16 levels of the group's grid.
    assert max(len(row.unique()) for row in fed_back.view(-1, 128)) <= 16


def test_a_searched_grid_is_better_than_min_max(benchmark) -> None:
    gptq = benchmark("gptq")
    torch.manual_seed(0)
    groups = torch.randn(200, 64)
    error = [
        (gptq.round_to_grid(groups, *gptq.integer_grid(groups, 4, search), 4) - groups).square().mean().item()
        for search in (False, True)
    ]
    assert error[1] < 0.95 * error[0]


@pytest.mark.parametrize("family", ["Llama", "Gemma3"])
def test_gptq_of_a_model_goes_layer_by_layer_on_quantized_inputs(benchmark, family: str) -> None:
    """Every layer's Hessian comes from the inputs that the finished layers before it give."""
    transformers = pytest.importorskip("transformers")
    gptq = benchmark("gptq")
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    if family == "Llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    else:  # its blocks get other masks and position embeddings: local and global attention
        layers = ["sliding_attention", "full_attention"]
        config = transformers.Gemma3TextConfig(
            **sizes, num_key_value_heads=1, head_dim=16, sliding_window=4, layer_types=layers
        )
        model = transformers.Gemma3ForCausalLM(config).eval()
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"]
    original, windows = copy.deepcopy(model), torch.randint(0, 50, (16, 12))
    gptq.quantize_blocks(model, names, windows, 4, 32, search=False)
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        inputs: list[Tensor] = []
        hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
        with torch.no_grad():
            model(windows, use_cache=False)
        hook.remove()
        x = inputs[0].flatten(0, 1)
        expected = gptq.quantize_weight(original.get_submodule(name).weight.detach(), x.T @ x / len(x), 4, 32, search=False)
        assert (model.get_submodule(name).weight - expected).abs().max() < 1e-4, name


def test_a_peer_counts_what_it_stores(benchmark) -> None:
    transformers = pytest.importorskip("transformers")
    peers = benchmark("peers")
    torch.manual_seed(0)
    sizes = dict(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.LlamaConfig(**sizes, tie_word_embeddings=True)
    reference = transformers.LlamaForCausalLM(config).eval()
    windows = torch.randint(0, 96, (8, 16))
    linears, embedding, norms = 4 * 64 * 64 + 3 * 64 * 128, 96 * 64, 3 * 64
    # 4 bits, and 20 bits of scale and zero point per block: 64 columns, and 128 in the layer that has 128.
    bits = linears * 4 + 20 * ((4 * 64 * 64 + 2 * 64 * 128) / 64 + 64 * 128 / 128)
    for name in ("integer RTN, 128", "GPTQ, 128"):
        peer = peers.PEERS[name](reference, windows)
        assert (peer.weights, peer.stored, peer.total) == (linears, bits / 8, bits / 8 + 2 * (embedding + norms))
        assert torch.equal(peer.model.get_input_embeddings().weight, reference.get_input_embeddings().weight)
    peer = peers.PEERS["GPTQ, 128, embedding 8 bits"](reference, windows)
    bits += embedding * 8 + 24 * embedding / 64
    assert (peer.weights, peer.stored, peer.total) == (linears + embedding, bits / 8, bits / 8 + 2 * norms)
    assert peer.model.lm_head.weight is peer.model.get_input_embeddings().weight
    assert not torch.equal(peer.model.lm_head.weight, reference.lm_head.weight)


def result(seeds: list[int], method: str = "ours 4") -> dict:
    return {
        "command": "quality.py",
        "model": "m.gguf",
        "hardware": "a",
        "torch": "2",
        "transformers": "5",
        "turboquant_weights": "0",
        "texts": {"t": {"windows": 1, "length": 8, "reference_perplexity": 20.0, "noise_floor_kl": 0.0}},
        "rows": [
            {
                "method": method,
                "note": "",
                "seeds": seeds,
                **{key: [float(s) for s in seeds] for key in ("bits", "bytes", "ratio", "error", "seconds")},
                "scores": {"t": {"kl_mean": [float(s) for s in seeds]}},
            }
        ],
    }


def test_parts_are_merged_by_row_and_seed(benchmark) -> None:
    merge = benchmark("merge_quality").merge
    merged = merge([result([0, 1]), result([2]), result([0], "NF4")])
    assert [(row["method"], row["seeds"]) for row in merged["rows"]] == [("ours 4", [0, 1, 2]), ("NF4", [0])]
    assert merged["rows"][0]["scores"]["t"]["kl_mean"] == [0.0, 1.0, 2.0]
    with pytest.raises(ValueError, match="seeds"):
        merge([result([0]), result([0])])


@pytest.mark.parametrize(
    ("key", "value"),
    [("model", "n.gguf"), ("hardware", "b"), ("texts", {"t": {"windows": 2, "length": 8, "reference_perplexity": 20.0}})],
)
def test_parts_that_do_not_compare_are_refused(benchmark, key: str, value: object) -> None:
    with pytest.raises(ValueError, match="differ in"):
        benchmark("merge_quality").merge([result([0]), result([1]) | {key: value}])


def test_parts_of_two_machines_need_the_same_reference(benchmark) -> None:
    merge = benchmark("merge_quality").merge
    other = result([1]) | {"hardware": "b"}
    merged = merge([result([0], "NF4"), other], allow_hardware=True)
    assert [row["environment"].split(",")[0] for row in merged["rows"]] == ["hardware a", "hardware b"]
    other["texts"]["t"]["reference_perplexity"] = 20.01
    with pytest.raises(ValueError, match="perplexity"):
        merge([result([0], "NF4"), other], allow_hardware=True)


def test_the_remembered_reference_is_the_reference(benchmark) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    quality = benchmark("quality")
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    reference, runs = quality.Remembered(model), []
    model.model.register_forward_hook(lambda *_: runs.append(1))
    first, second = torch.randint(0, 50, (2, 1, 9))
    with torch.no_grad():
        for window in (first, second, first, second):
            expected = model(input_ids=window, use_cache=False).logits
            before = len(runs)
            assert torch.equal(reference(input_ids=window, use_cache=False).logits, expected)
            runs[before:] = ["reference"] * (len(runs) - before)
    assert runs.count("reference") == 2  # the decoder ran once per window
    gemma = transformers.Gemma2Config(**sizes, num_key_value_heads=2, head_dim=16, final_logit_softcapping=5.0)
    capped = quality.Remembered(transformers.Gemma2ForCausalLM(gemma).eval())
    with torch.no_grad(), pytest.raises(SystemExit, match="after the output head"):
        capped(input_ids=first, use_cache=False)


def test_sensitivities_that_are_measured_unit_by_unit(benchmark, capsys) -> None:
    """They agree with the Fisher information's where a model is linear enough, and the model is left as it was."""
    pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    ablation = benchmark("calibration_ablation")
    torch.manual_seed(0)
    model = tiny_llama(initializer_range=0.1, hidden_size=64).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokens = torch.randint(0, 97, (16, 64))
    found = {}
    for name in ("3.2x, as shipped", "3.2x, Fisher information alone", *(n for n in ablation.BUDGET if "measured" in n)):
        change = ablation.BUDGET[name]
        with change() if change else contextlib.nullcontext():
            plan = quantize.plan_bits(model, TurboQuantConfig(), tokens=tokens, progress=False)
        found[name] = {unit.names: unit.sensitivity for unit in plan.units}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    shipped, fisher, free, calibrated = found.values()
    assert all(fisher[names] != value for names, value in shipped.items() if "model.embed_tokens" not in names)
    for values in (free, calibrated):
        assert values.keys() == shipped.keys()
        assert all(0.2 < values[names] / value < 5 for names, value in shipped.items())
    printed = capsys.readouterr().out
    assert printed.count("correlation of the logarithms 0.9") == 2, printed


def test_experts(benchmark) -> None:
    """The error of a quantized block against its decoded weights is that of bf16."""
    rows = benchmark("experts").measure(4, 64, 32, 2, [1, 9], torch.device("cpu"))
    assert [(row["weights"], row["tokens"]) for row in rows] == [(w, m) for m in (1, 9) for w in ("bf16", "4", "4+4")]
    assert all(0 < row["error"] < 0.02 for row in rows)
    assert rows[0]["decoded"] == "2 of 4"
    assert rows[1]["megabytes"] < rows[0]["megabytes"] / 2


def decode_module(benchmark):
    """The benchmark of decoding, which needs Transformers and, for its random planes, Triton."""
    pytest.importorskip("transformers")
    pytest.importorskip("triton")
    return benchmark("decode")


@pytest.mark.parametrize(
    ("weights", "products"),
    [
        ("bf16", 0),
        ("4", 14),
        ("4 fused", 8),
        ("4+4 fused, head 4+4", 9),
        ("4 fused, head 4+2", 9),
        ("3.2x mix fused, head 4+2", 9),
    ],
)
def test_a_compiled_step_is_one_graph_with_one_op_per_product(benchmark, weights, products) -> None:
    decode = decode_module(benchmark)
    graphs = []

    def backend(module, inputs):
        graphs.append(module.graph)
        return module

    with torch.inference_mode():
        step = decode.Step(decode.build("tiny", weights, "cpu"), batch=1, context=64, device="cpu")
        step.rewind()
        expected = step()
        call, _ = decode.compiled(step, backend)
        step.rewind()
        assert torch.equal(call(), expected)
    assert step.cache.layers[0].cumulative_length == 65  # and not the first token of an empty cache
    (graph,) = graphs
    ops = [node for node in graph.nodes if node.target is torch.ops.turboquant_weights.linear_inference.default]
    assert len(ops) == products
    # Fused layers read their joined bias: nothing is put together in a step.
    assert all(node.args[5] is None or node.args[5].op == "placeholder" for node in ops)


def test_the_mix_of_a_3_2x_file_has_its_size(benchmark) -> None:
    """Planes and scales of a decoder layer of 7B: 16 / 3.2 bits per weight, and every width of a budget but the coarsest."""
    decode = decode_module(benchmark)
    sizes = decode.SHAPES["7b"]
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    keys = hidden // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    shapes = dict(q_proj=hidden * hidden, k_proj=keys * hidden, v_proj=keys * hidden, o_proj=hidden * hidden)
    shapes |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), inner * hidden)
    assert shapes.keys() == decode.MIX.keys()
    stored = total = 0.0
    for name, weights in shapes.items():
        for label in decode.MIX[name]:
            settings = decode.bits_of(label)
            stored += weights * (settings.bits + settings.residual_bits + 8 / 32)
            total += weights
    assert stored / total == pytest.approx(16 / 3.2, rel=0.01)
    assert {label for labels in decode.MIX.values() for label in labels} == {"3", "4", "4+1", "4+2", "4+3"}


def test_the_table_of_decoding(benchmark) -> None:
    decode = decode_module(benchmark)
    cells = [dict(context=128, batch=1, graph_ms=10.0, compiled_ms=8.0), dict(context=128, batch=8, graph_ms=16.0)]
    profile = dict(groups={"cuBLAS": dict(us=6000.4, kernels=282), "rest": dict(us=300.0, kernels=200)})
    memory = dict(shape="7b", linear_GB=13.05, resident_GB=15.28, peak_GB=20.7, prefill_2048_ms=56.8)
    rows = [
        dict(memory, weights="bf16", decode=[dict(cells[0], profile=profile), cells[1]]),
        dict(memory, weights="4", decode=[dict(cells[0], compiled_ms=4.0), cells[1]]),
    ]
    about = dict(gpu="GPU", torch="2", triton="3", transformers="5", date="today", command="python benchmarks/decode.py")
    lines = decode.table(dict(about, rows=rows)).splitlines()
    assert lines[2].startswith("| shape | weights | context | batch | compiled | graph | linear layers, GB |")
    assert lines[4] == "| 7b | bf16 | 128 | 1 | 125 | 100 | 13.05 | 15.3 / 20.7 | 56.8 |"
    assert lines[6] == "| 7b | 4 | 128 | 1 | 250 (2.00) | 100 (1.00) | 13.05 | 15.3 / 20.7 | 56.8 |"
    assert lines[7] == "| 7b | 4 | 128 | 8 |  | 500 (1.00) |  |  |  |"
    assert lines[-1] == "| 7b | bf16 | 128 | 8000 |  |  | 6000 (282) | 300 (200) |"
