"""The text model holds transformers' weights under their published names, and computes what transformers computes."""

import json
import re
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.errors import JaxdiffError
from jaxdiff.models.clip_text import CLIPTextModel

FIXTURES = Path(__file__).parent.parent / "fixtures"
REFERENCES = ["clip_text_quick_gelu", "clip_text_gelu"]
TINY = CLIPTextModel(
    vocab_size=30, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, max_length=9, eos_token_id=29
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 29, (3, 9)))
APPLY = jax.jit(TINY.apply)


@pytest.fixture(scope="module")
def params():
    return jax.jit(TINY.init)(jax.random.key(0), TOKENS)


def from_transformers(state: dict[str, np.ndarray], wanted: dict) -> dict:
    """Rename as clip_text.py promises, and transpose the kernels of dense layers."""
    params = {}
    for name, weight in state.items():
        *path, leaf = re.sub(r"\.(\d+)", r"_\1", name).split(".")
        if leaf == "weight":
            leaf = next(leaf for leaf in ("kernel", "scale", "embedding") if (*path, leaf) in wanted)
        params[*path, leaf] = weight.T if leaf == "kernel" else weight
    return params


def network(config: dict) -> CLIPTextModel:
    """Our model for a transformers configuration."""
    names = {
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "max_position_embeddings": "max_length",
    }
    return CLIPTextModel(**{names.get(name, name): value for name, value in config.items() if name != "bos_token_id"})


def flat_shapes(model: CLIPTextModel) -> dict:
    tokens = jnp.zeros((1, model.max_length), jnp.int32)
    return flax.traverse_util.flatten_dict(jax.eval_shape(model.init, jax.random.key(0), tokens)["params"])


def load(name: str):
    """A model, its parameters and the reference that they come from."""
    reference = np.load(FIXTURES / f"{name}.npz")
    model = network(json.loads(str(reference["@config"])))
    wanted = flat_shapes(model)
    given = from_transformers({k: reference[k] for k in reference.files if not k.startswith("@")}, wanted)
    assert {k: v.shape for k, v in given.items()} == {k: v.shape for k, v in wanted.items()}
    return model, {"params": flax.traverse_util.unflatten_dict(given)}, reference


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("name", REFERENCES)
def test_output_equals_transformers(name, masked):
    model, params, reference = load(name)
    mask = jnp.asarray(reference["@mask"]) if masked else None
    hidden, pooled = jax.jit(model.apply)(params, reference["@tokens"], mask)
    suffix = "_masked" * masked
    expected = reference["@hidden" + suffix]
    assert expected.dtype == np.float64
    assert np.std(expected) > 0.5
    np.testing.assert_allclose(hidden, expected, rtol=0, atol=3e-5 * np.abs(expected).max())
    np.testing.assert_allclose(pooled, reference["@pooled" + suffix], rtol=0, atol=3e-5 * np.abs(expected).max())


def test_references_tell_the_masks_the_activations_and_the_end_rules_apart():
    for name in REFERENCES:
        model, params, reference = load(name)
        gap = np.abs(reference["@hidden"] - reference["@hidden_masked"]).max(axis=(1, 2))
        assert (gap[[0, 2, 4]] > 0.1).all()
        other = model.clone(
            hidden_act="gelu" if model.hidden_act == "quick_gelu" else "quick_gelu",
            eos_token_id=40 if model.eos_token_id == 2 else 2,
        )
        hidden, pooled = jax.jit(other.apply)(params, reference["@tokens"])
        assert np.abs(hidden - reference["@hidden"]).max() > 1e-3
        assert np.abs(pooled - reference["@pooled"]).max() > 0.1


def test_the_published_text_model_has_the_same_parameters():
    layout = json.loads((FIXTURES / "clip_text_layout.json").read_text())
    model = network(layout["config"])
    assert model == CLIPTextModel()
    wanted = flat_shapes(model)
    given = from_transformers({k: np.empty(v, np.bool_) for k, v in layout["parameters"].items()}, wanted)
    assert {k: v.shape for k, v in given.items()} == {k: v.shape for k, v in wanted.items()}
    assert sum(v.size for v in wanted.values()) == 123_060_480


def test_pooled_is_the_first_end_token_s_vector(params):
    tokens = TOKENS.at[0, 4:6].set(29).at[1, 8].set(29)
    hidden, pooled = APPLY(params, tokens)
    np.testing.assert_array_equal(pooled, [hidden[0, 4], hidden[1, 8], hidden[2, 0]])
    by_highest = jax.jit(TINY.clone(eos_token_id=2).apply)(params, tokens).pooled
    np.testing.assert_array_equal(by_highest, [hidden[0, 4], hidden[1, 8], hidden[2, jnp.argmax(tokens[2])]])


def test_a_later_token_changes_no_earlier_vector(params):
    before = APPLY(params, TOKENS).hidden
    for place in (3, 8):
        after = APPLY(params, TOKENS.at[:, place].set((TOKENS[:, place] + 1) % 29)).hidden
        np.testing.assert_array_equal(after[:, :place], before[:, :place])
        assert (jnp.abs(after - before)[:, place:].max(-1) > 1e-3).all()


def test_a_masked_token_changes_no_other_vector(params):
    mask = jnp.ones(TOKENS.shape, bool).at[:, 4].set(False)
    before = APPLY(params, TOKENS, mask).hidden
    after = APPLY(params, TOKENS.at[:, 4].set((TOKENS[:, 4] + 1) % 29), mask).hidden
    others = np.delete(np.arange(9), 4)
    np.testing.assert_array_equal(after[:, others], before[:, others])
    np.testing.assert_array_equal(APPLY(params, TOKENS, mask.astype(int)).hidden, before)
    full = APPLY(params, TOKENS, jnp.ones(TOKENS.shape, bool)).hidden
    np.testing.assert_array_equal(full, APPLY(params, TOKENS).hidden)


def test_shorter_sequences_are_the_beginning_of_longer_ones(params):
    np.testing.assert_allclose(APPLY(params, TOKENS[:, :5]).hidden, APPLY(params, TOKENS).hidden[:, :5], atol=1e-5)


def test_bfloat16_keeps_parameters_and_output_in_float32(params):
    model = TINY.clone(dtype=jnp.bfloat16)
    half_init = jax.jit(model.init)(jax.random.key(0), TOKENS)
    jax.tree.map(np.testing.assert_array_equal, half_init, params)
    half, whole = jax.jit(model.apply)(params, TOKENS), APPLY(params, TOKENS)
    assert {x.dtype for x in half} == {jnp.float32.dtype}
    np.testing.assert_allclose(half.hidden, whole.hidden, atol=0.1)
    assert jnp.abs(half.hidden - whole.hidden).max() > 1e-4  # it did compute in bfloat16


def test_fresh_weights_have_the_paper_s_scales():
    model = CLIPTextModel(vocab_size=100, hidden_size=64, intermediate_size=256, num_layers=2, num_heads=2)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 3), jnp.int32))["params"]["text_model"]
    layer = params["encoder"]["layers_1"]
    for kernel, std in (
        (params["embeddings"]["token_embedding"]["embedding"], 0.02),
        (params["embeddings"]["position_embedding"]["embedding"], 0.01),
        (layer["self_attn"]["k_proj"]["kernel"], 64**-0.5),
        (layer["self_attn"]["out_proj"]["kernel"], 256**-0.5),
        (layer["mlp"]["fc1"]["kernel"], 128**-0.5),
        (layer["mlp"]["fc2"]["kernel"], 256**-0.5),
    ):
        np.testing.assert_allclose(np.std(kernel), std, rtol=0.05)


@pytest.mark.parametrize(
    ("options", "tokens", "mask", "words"),
    [
        ({}, (1, 10), None, "at most max_length 9"),
        ({}, (9,), None, "needs tokens"),
        ({}, (2, 9), (2, 8), "The mask must be"),
        ({"num_heads": 3}, (1, 9), None, "must divide into num_heads 3"),
        ({"hidden_act": "relu"}, (1, 9), None, "quick_gelu, gelu"),
    ],
)
def test_mistakes_are_told_in_a_sentence(options, tokens, mask, words):
    mask = None if mask is None else jnp.ones(mask, bool)
    with pytest.raises(JaxdiffError, match=words):
        jax.eval_shape(TINY.clone(**options).init, jax.random.key(0), jnp.zeros(tokens, jnp.int32), mask)
