"""``TurboQuantConfig``: bits by name, which are checked, frozen, hashable, and stored as JSON."""

import copy
import json
import pickle

import pytest

from turboquant_weights import ConfigError, TurboQuantConfig

MIXED = TurboQuantConfig(residual_bits=1, layer_bits={"*.q": (4, 2), "a.*": [3, 0], "a.q": (2, 4)})


def test_a_name_comes_before_patterns_and_the_first_pattern_wins():
    found = {name: MIXED.for_layer(name) for name in ("a.q", "b.q", "a.a.q", "a.v", "b.v")}
    assert {name: (c.bits, c.residual_bits) for name, c in found.items()} == {
        "a.q": (2, 4),
        "b.q": (4, 2),
        "a.a.q": (4, 2),
        "a.v": (3, 0),
        "b.v": (4, 1),
    }
    assert all(config.layer_bits is None for config in found.values())
    assert (MIXED.label, found["b.q"].label) == ("mixed", "4+2")


def test_exact_names_are_those_that_differ():
    exact = MIXED.exact(["a.q", "b.q", "b.v"], skip=["head"])
    assert exact.layer_bits == {"a.q": (2, 4), "b.q": (4, 2)}
    assert exact.skip == ("head",)
    assert exact.exact(["a.q", "b.q", "b.v"], skip=["head"]) == exact
    assert MIXED.exact(["b.v"], skip=[]).layer_bits is None
    assert MIXED.exact(["a.q", "b.q", "c.q"], skip=[]) == TurboQuantConfig(4, 2, skip=(), layer_bits={"a.q": (2, 4)})


def test_base_only():
    base = MIXED.base_only()
    assert base.residual_bits == 0
    assert base.layer_bits == {"*.q": (4, 0), "a.*": (3, 0), "a.q": (2, 0)}


def test_embeddings_have_bits_by_name_and_no_default():
    config = TurboQuantConfig(layer_bits={"*": (2, 0)}, embeddings={"*.embed": (4, 2), "wte": (3, 1)})
    assert config.for_embedding("wpe") is None
    assert config.for_embedding("a.embed") == TurboQuantConfig(bits=4, residual_bits=2)
    assert config.for_layer("a.embed") == TurboQuantConfig(bits=2)
    assert config.base_only().embeddings == {"*.embed": (4, 0), "wte": (3, 0)}
    assert config.to_dict()["embeddings"] == {"*.embed": [4, 2], "wte": [3, 1]}
    exact = config.exact(["q"], skip=[], embeddings={"wte": (3, 1)})
    assert exact == TurboQuantConfig(bits=2, skip=(), embeddings={"wte": (3, 1)})
    with pytest.raises(ConfigError, match=r"embeddings\['wte'\]: bits is 8"):
        TurboQuantConfig(embeddings={"wte": (8, 0)})


def test_immutable_hashable_and_stored():
    same = TurboQuantConfig.from_dict(json.loads(json.dumps(MIXED.to_dict())))
    for other in (same, copy.deepcopy(MIXED), pickle.loads(pickle.dumps(MIXED))):
        assert other == MIXED
        assert hash(other) == hash(MIXED)
    assert MIXED.to_dict()["layer_bits"] == {"*.q": [4, 2], "a.*": [3, 0], "a.q": [2, 4]}
    assert TurboQuantConfig(residual_bits=1) != MIXED
    with pytest.raises(TypeError):
        MIXED.layer_bits["x"] = (4, 4)


def test_nothing_by_name_is_not_stored():
    for nothing in (None, {}):
        config = TurboQuantConfig(layer_bits=nothing)
        assert config == TurboQuantConfig()
        assert "layer_bits" not in config.to_dict()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([("a", (4, 2))], "must map names"),
        ({1: (4, 2)}, "must map names"),
        ({"a": 4}, r"layer_bits\['a'\] is 4: it must be \(bits, residual_bits\)"),
        ({"a": (4,)}, r"layer_bits\['a'\] is \(4,\)"),
        ({"a": (5, 0)}, r"layer_bits\['a'\]: bits is 5: it must be one of 2, 3, 4"),
        ({"a": (4, 5)}, r"layer_bits\['a'\]: residual_bits is 5"),
        ({"a": (4, True)}, "residual_bits is True"),
        ({"a": (4.0, 0)}, "bits is 4.0"),
    ],
)
def test_bad_bits_by_name(value, message):
    with pytest.raises(ConfigError, match=message):
        TurboQuantConfig(layer_bits=value)
