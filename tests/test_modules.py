"""Checkpoints of modules that Transformers does not know: the same folders, loaded into a dense module's architecture."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

import turboquant_weights as tq
from turboquant_weights import ConfigError, FormatError, TurboQuantConfig, TurboQuantLinear, load, quantize_model, save
from turboquant_weights.checkpoint import validate, verify
from turboquant_weights.planes import PackedPlanes


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 64, 40) / 6)
        self.down = nn.Parameter(torch.randn(3, 40, 32) / 6)

    def forward(self, x):
        parts = [functional.linear(x, self.up[e]).chunk(2, -1) for e in range(3)]
        return sum(functional.linear(gate.tanh() * up, self.down[e]) for e, (gate, up) in enumerate(parts))


class Everything(nn.Module):
    """An embedding with a tied head, a module in two places, two layers with one weight, experts, a norm, buffers of both
    kinds."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 40)
        self.first = nn.Linear(40, 40)
        self.again = self.first
        self.twin = nn.Linear(40, 40, bias=False)
        self.twin.weight = self.first.weight
        self.experts = Routed()
        self.norm = nn.BatchNorm1d(40)
        self.head = nn.Linear(40, 50, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.linspace(0, 1, 40), persistent=False)

    def forward(self, ids):
        x = self.again(self.first(self.embed(ids))) + self.twin(self.embed(ids))
        x = self.norm((x + self.table).transpose(1, 2)).transpose(1, 2)
        return self.head(x + self.experts(x))


IDS = torch.arange(24).view(2, 12)
CONFIG = TurboQuantConfig(4, 2, embeddings={"embed": (4, 1)}, layer_bits={"*.down": (3, 2)})


@pytest.fixture
def model():
    torch.manual_seed(0)
    out = Everything()
    out(IDS)  # running statistics
    return out.eval()


@pytest.fixture
def saved(model, tmp_path):
    quantize_model(model, CONFIG, progress=False)
    save(model, tmp_path / "out")
    return tmp_path / "out"


def test_round_trip(model, saved):
    assert verify(saved).manifest_checked
    names = set(load_file(saved / "model.safetensors"))
    assert not [name for name in names if name.startswith(("again.", "head.", "table"))]  # stored once, or not at all
    assert {name for name in names if name.startswith("twin")} == set()
    torch.manual_seed(1)
    like = Everything()
    before = copy.deepcopy(like.state_dict())
    again = load(saved, model=like).eval()
    assert torch.equal(again(IDS), model(IDS))
    assert again.again is again.first
    assert again.twin.codes is again.first.codes
    assert again.head.codes is again.embed.codes
    assert all(torch.equal(a, b) for a, b in zip(like.state_dict().values(), before.values(), strict=True))
    assert {n: m.settings for n, m in again.named_modules() if isinstance(m, PackedPlanes)} == {
        n: m.settings for n, m in model.named_modules() if isinstance(m, PackedPlanes)
    }
    save(again, saved, overwrite=True)
    assert torch.equal(load(saved, model=like).eval()(IDS), model(IDS))


def test_layers_of_one_weight_may_have_planes_of_their_own(model, tmp_path):
    """As calibration leaves them, which rounds each for the inputs of its own."""
    quantize_model(model, CONFIG, progress=False)
    model.twin = TurboQuantLinear.from_linear(nn.Linear(40, 40, bias=False), TurboQuantConfig(4, 2)).eval()
    save(model, tmp_path / "out")
    like = Everything()
    assert like.twin.weight is like.first.weight
    again = load(tmp_path / "out", model=like).eval()
    assert torch.equal(again(IDS), model(IDS))
    assert again.again is again.first
    assert torch.equal(again.twin.codes, model.twin.codes)
    assert not torch.equal(again.twin.codes, again.first.codes)
    save(again, tmp_path / "out", overwrite=True)
    assert torch.equal(load(tmp_path / "out", model=like).eval()(IDS), model(IDS))


def test_on_meta_with_a_dtype_and_base_planes_alone(model, saved):
    with torch.device("meta"):
        like = Everything()
    like.table = torch.linspace(0, 1, 40)
    again = load(saved, model=like, device_map="cpu").eval()
    assert torch.equal(again(IDS), model(IDS))
    base = load(saved, model=Everything(), base_only=True).eval()
    assert not [name for name, _ in base.named_parameters() if name.endswith("residual")]
    assert not torch.equal(base(IDS), model(IDS))
    half = load(saved, model=Everything().bfloat16()).eval()
    assert half.norm.weight.dtype == torch.bfloat16
    assert half(IDS).dtype == torch.bfloat16


def test_without_importing_transformers(saved):
    code = f"""
import sys, torch
import turboquant_weights as tq
from torch import nn
model = nn.Sequential(nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 3))
tq.quantize_model(model, progress=False)
tq.save(model, {str(saved.parent / "plain")!r})
again = tq.load({str(saved.parent / "plain")!r}, model=nn.Sequential(nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 3)))
x = torch.randn(2, 40)
assert torch.equal(again(x), model(x))
assert "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_other_architectures_are_refused(saved):
    for change, message in [
        (lambda m: setattr(m, "first", nn.Linear(40, 32)), "first.codes is U8|first.* has another|first"),
        (lambda m: delattr(m, "norm"), r"norm\.\w+ is stored, but this Everything has no tensor of that name"),
        (lambda m: setattr(m, "extra", nn.LayerNorm(3)), r"extra\.weight is missing"),
        (lambda m: setattr(m, "embed", nn.Linear(40, 50)), "no embedding of that name"),
        (lambda m: setattr(m.experts, "up", nn.Parameter(torch.zeros(3, 64))), "no 3-D parameter of that name"),
        (lambda m: setattr(m.experts, "up", nn.Parameter(torch.zeros(4, 64, 40))), r"experts\.up\.\w+ is \w+ \[3,"),
    ]:
        like = Everything()
        change(like)
        with pytest.raises(FormatError, match=message):
            load(saved, model=like)


def test_damaged_files_are_refused(saved):
    tensors = load_file(saved / "model.safetensors")
    (saved / "turboquant_weights.json").unlink()
    save_file({**tensors, "norm.num_batches_tracked": torch.ones(())}, saved / "model.safetensors")
    with pytest.raises(FormatError, match="num_batches_tracked is F32"):
        load(saved, model=Everything())
    save_file({**tensors, "first.scales": tensors["first.scales"][:, :1].contiguous()}, saved / "model.safetensors")
    with pytest.raises(FormatError, match="first"):
        load(saved, model=Everything())


def test_wrong_calls(model, saved, tmp_path):
    with pytest.raises(ConfigError, match="not quantized by this package"):
        save(nn.Linear(3, 3), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ConfigError, match="the dense architecture"):
        load(saved, model=model)
    with pytest.raises(ConfigError, match="no dtype"):
        load(saved, model=Everything(), dtype=torch.float16)
    with pytest.raises(ConfigError, match="without a tokenizer"):
        save(model, tmp_path / "new", tokenizer=object())
    with pytest.raises(FileExistsError):
        save(model, saved)
    pytest.importorskip("transformers")
    with pytest.raises(ConfigError, match=r"holds a Everything, which is no Transformers model"):
        load(saved)
    model.first.seed = 4
    with pytest.raises(ConfigError, match="a checkpoint has one seed"):
        save(model, tmp_path / "new")


def test_the_tripwire_and_the_config(saved):
    info = validate(saved)
    assert info.architecture == "Everything"
    assert info.config.experts == {"experts.down": "out_in", "experts.up": "out_in"}
    assert info.config.skip == ()
    content = json.loads((saved / "config.json").read_text())
    assert content["quantization_config"]["source"] == {"turboquant_weights": tq.__version__}
    assert [t for t in load_file(saved / "model.safetensors").values() if t.numel() == 0]


def test_conv1d_and_fused_layers(tmp_path):
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)

    def build():
        out = nn.Module()
        out.q_proj, out.k_proj, out.v_proj = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16)
        out.conv = Conv1D(24, 64)
        return out

    model = build()
    quantize_model(model, progress=False)
    x, y = torch.randn(3, 32), torch.randn(3, 64)
    expected = [model.q_proj(x), model.v_proj(x), model.conv(y)]
    assert tq.fuse_projections(model)
    save(model, tmp_path / "out")
    again = load(tmp_path / "out", model=build())
    for a, b in zip(expected, [again.q_proj(x), again.v_proj(x), again.conv(y)], strict=True):
        assert torch.equal(a, b)
    assert type(again.conv) is TurboQuantLinear
