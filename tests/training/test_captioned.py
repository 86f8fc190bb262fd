"""Text to image: captions reach the network, are withheld, and prompts become images on the command line."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

import sample
import train
from jaxdiff.config import SimpleUNet, load_recipe
from jaxdiff.data import open_dataset
from jaxdiff.errors import JaxdiffError
from jaxdiff.guidance import classifier_free_guidance, clip_x0
from jaxdiff.images import to_uint8
from jaxdiff.models import Condition
from jaxdiff.pipelines import (
    Request,
    attention_maps,
    check_sampling,
    condition_on,
    conditional_denoiser,
    generate,
    init_params,
    make_diffuser,
    null_prompt,
    prompt_of,
)
from jaxdiff.sampling import example_keys, initial_noise
from jaxdiff.sampling import sample as follow
from jaxdiff.training import Place
from jaxdiff.training.diffusion import example_losses, with_prompts

RECIPE = ROOT / "tests" / "fixtures" / "tiny_text_recipe.py"
CONFIG = load_recipe(RECIPE)
DIFFUSER = make_diffuser(CONFIG, (16, 16, 1), ())
PROMPTS = DIFFUSER.text.tokenizer.encode(["a three left of a seven", "8 above 2", ""])


@pytest.fixture(scope="module")
def params():
    """Of a network whose last layer is not zero, so that it says something before it is trained."""
    fresh = jax.jit(lambda: init_params(DIFFUSER, jax.random.key(0)))()
    leaves, tree = jax.tree.flatten(fresh)
    noise = [0.1 * jax.random.normal(jax.random.key(i), leaf.shape) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree, [leaf + grain for leaf, grain in zip(leaves, noise, strict=True)])


def test_the_parameters_are_those_of_the_network_and_the_text_encoder(params):
    assert set(params) == {"network", "text"}
    assert "transformer_blocks_0" in str(jax.tree_util.tree_structure(params["network"]))


def test_the_context_is_a_vector_a_token_or_one_for_all(params):
    cond = condition_on(DIFFUSER, params, PROMPTS)
    assert isinstance(cond, Condition)
    assert cond.context.shape == (3, 48, 16)
    np.testing.assert_array_equal(cond.context_mask.sum(1), [25, 11, 2])  # begin, bytes, end
    ablated = DIFFUSER._replace(config=replace(CONFIG, text=replace(CONFIG.text, pooled_only=True)))
    pooled = condition_on(ablated, params, PROMPTS)
    assert (pooled.context.shape, pooled.context_mask) == ((3, 1, 16), None)
    for row, end in enumerate([24, 10, 1]):
        np.testing.assert_allclose(pooled.context[row, 0], cond.context[row, end], rtol=1e-5)


def test_padding_is_not_looked_at(params):
    node_like = jnp.zeros((3, 16, 16, 1)), jnp.float32([1.0, 500.0, 900.0])
    tokens, mask = PROMPTS
    other = PROMPTS._replace(tokens=np.where(mask, tokens, 65))
    outputs = [
        DIFFUSER.model.apply({"params": params["network"]}, *node_like, condition_on(DIFFUSER, params, prompt))
        for prompt in (PROMPTS, other, PROMPTS._replace(tokens=np.where(tokens == 97, 98, tokens)))
    ]
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-5)
    assert np.abs(outputs[0] - outputs[2]).max() > 1e-3


def test_images_in_one_call_are_those_of_the_parts_one_by_one(params):
    sampling = CONFIG.sampling
    drawn = next(generate(DIFFUSER, params, Request(PROMPTS), sampling, seed=3)).images
    keys = example_keys(jax.random.key(3), jnp.arange(3))
    cond = condition_on(DIFFUSER, params, PROMPTS)
    null = condition_on(DIFFUSER, params, DIFFUSER.text.tokenizer.encode([""] * 3))
    denoise = classifier_free_guidance(conditional_denoiser(DIFFUSER, params), cond, null, sampling.guidance_scale)
    table = check_sampling(DIFFUSER, sampling)
    by_parts = to_uint8(follow(clip_x0(denoise), table, initial_noise(table, keys, (16, 16, 1)), keys))
    assert np.abs(drawn.astype(int) - np.asarray(by_parts)).max() <= 1


def test_attention_maps_say_where_each_token_is_looked_for(params):
    x, t = jax.random.normal(jax.random.key(0), (3, 16, 16, 1)), jnp.float32([100, 500, 900])
    maps = attention_maps(DIFFUSER, params, x, t, PROMPTS)
    assert maps.shape == (3, 48, 16, 16)
    np.testing.assert_allclose(maps.sum(1), 1, rtol=1e-4)
    assert np.abs(maps[~np.asarray(PROMPTS.mask)]).max() == 0  # padding
    assert np.ptp(maps[0, :25], axis=(1, 2)).max() > 1e-4  # not everywhere alike
    np.testing.assert_array_equal(maps[:, :, 0, 0], maps[:, :, 3, 3])  # a map has a place for each 4x4 pixels
    with pytest.raises(JaxdiffError, match="without captions"):
        attention_maps(DIFFUSER._replace(text=None), params, x, t, PROMPTS)


def test_a_negative_prompt_takes_the_place_of_the_empty_one(params):
    empty = DIFFUSER.text.tokenizer.encode([""] * 3)
    images = [
        next(generate(DIFFUSER, params, Request(PROMPTS, negative), CONFIG.sampling)).images.astype(int)
        for negative in (None, empty, DIFFUSER.text.tokenizer.encode(["9 below 9"] * 3))
    ]
    assert np.abs(images[0] - images[1]).max() <= 1
    assert np.abs(images[0] - images[2]).max() > 1
    with pytest.raises(JaxdiffError, match="a request's negative is"):
        next(generate(DIFFUSER, params, Request(PROMPTS, np.zeros(3, np.int32)), CONFIG.sampling))


def test_captions_are_withheld_whole_at_the_rate_asked_for(params):
    """A caption that is withheld gives the loss of the empty one."""
    dataset = with_prompts(DIFFUSER, open_dataset("digit_pairs"))
    batch = dataset.read(np.arange(64))
    empty = null_prompt(DIFFUSER, 64)
    bare = batch | {"tokens": empty.tokens, "mask": empty.mask}
    place = Place(jax.random.key(0), jnp.arange(64), 64)
    losses_of = jax.jit(
        lambda batch, dropout: example_losses(DIFFUSER, params, batch, place._replace(dropout_key=dropout))
    )
    trained, told, untold = losses_of(batch, jax.random.key(1)), losses_of(batch, None), losses_of(bare, None)
    withheld = np.isclose(trained, untold, rtol=1e-5) & ~np.isclose(told, untold, rtol=1e-5)
    assert 1 <= withheld.sum() <= 16  # a tenth of them
    np.testing.assert_allclose(np.asarray(trained)[~withheld], np.asarray(told)[~withheld], rtol=1e-4)


def test_the_text_encoder_learns_with_the_network(params):
    batch = with_prompts(DIFFUSER, open_dataset("digit_pairs")).read(np.arange(8))
    place = Place(jax.random.key(0), jnp.arange(8), 8)
    loss = lambda p: example_losses(DIFFUSER, p, batch, place).mean()  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(params)["text"]["text_model"]
    norms = jax.tree.map(lambda g: float(jnp.abs(g).max()), gradient)
    used = norms["embeddings"]["token_embedding"]["embedding"], norms["encoder"]["layers_0"]["mlp"]["fc1"]["kernel"]
    assert min(used) > 0


def test_classes_become_captions_where_a_model_reads_text():
    digits = with_prompts(DIFFUSER, open_dataset("digits"))
    batch = digits.read(np.arange(4))
    assert DIFFUSER.text.tokenizer.decode(prompt_of(DIFFUSER, batch).tokens)[:2] == ["a 0", "a 1"]
    bare = open_dataset("digit_pairs")
    assert set(with_prompts(DIFFUSER._replace(text=None), bare).read(np.arange(2))) == {"image", "label"}


@pytest.mark.slow
def test_train_and_sample_by_prompt(tmp_path, capfd, one_sentence):
    run = str(tmp_path / "run")
    assert train.main(["--config", str(RECIPE), "--workdir", run]) == 0
    assert (tmp_path / "run" / "samples" / "step_0000012.png").exists()

    def drawn(*args):
        capfd.readouterr()
        assert sample.main(["--workdir", run, "--out", str(tmp_path / "a.npz"), *args]) == 0
        told = json.loads(capfd.readouterr().out)
        with np.load(tmp_path / "a.npz") as content:
            return told, content["images"], content["prompts"].tolist()

    told, images, prompts = drawn("--num", "4", "--prompt", "a three left of a seven", "8 above 2")
    assert images.shape == (4, 16, 16, 1)
    assert prompts == ["a three left of a seven"] * 2 + ["8 above 2"] * 2
    assert told["evaluations"] == 3
    (tmp_path / "prompts.txt").write_text("a three left of a seven\n\n8 above 2\n", encoding="utf-8")
    _, again, same = drawn("--num", "4", "--prompts-file", str(tmp_path / "prompts.txt"))
    assert same == prompts
    np.testing.assert_array_equal(again, images)
    assert drawn("--num", "4", "--negative", "2 above 8")[2] == [""] * 4

    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("\n")
    for args, meant in (
        (["--labels", "3"], "was trained on captions"),
        (["--prompt", "x" * 47], "48"),
        (["--prompts-file", tmp_path / "latin.txt"], "can not be read"),
        (["--prompts-file", tmp_path / "none.txt"], "can not be read"),
        (["--prompts-file", tmp_path / "empty.txt"], "no prompt"),
        (["--prompts-file", tmp_path / "prompts.txt", "--prompt", "a 3"], "not by both"),
    ):
        assert meant in one_sentence(sample.main, ["--workdir", run, "--out", tmp_path / "b.npz", *args])


@pytest.mark.slow
def test_a_model_of_classes_reads_no_prompts(tiny_run, tmp_path, one_sentence):
    args = ["--workdir", tiny_run, "--out", tmp_path / "a.npz", "--prompt", "a three"]
    assert "without captions" in one_sentence(sample.main, args)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"tokenizer": "clip"}, "needs text.vocabulary"),
        ({"tokenizer": "clip", "vocabulary": "/no/such/folder"}, "there is no CLIP vocabulary"),
        ({"max_length": 1}, "a begin and an end"),
        ({"hidden_size": 30, "num_heads": 4}, "heads"),
    ],
)
def test_a_text_encoder_that_can_not_be_is_told(changed, said):
    with pytest.raises(JaxdiffError, match=said):
        make_diffuser(replace(CONFIG, text=replace(CONFIG.text, **changed)), (16, 16, 1), ())


def test_the_course_s_network_takes_no_captions():
    with pytest.raises(JaxdiffError, match="takes no captions"):
        make_diffuser(replace(CONFIG, model=SimpleUNet()), (16, 16, 1), ())
