"""The whole chain: an autoencoder is trained, its latents are diffused by captions, prompts become images."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import sample
import train
from jaxdiff import TextToImage
from jaxdiff import checkpoints as ckpt
from jaxdiff.config import AutoencoderConfig, Data, load_recipe
from jaxdiff.data import open_dataset
from jaxdiff.errors import JaxdiffError
from jaxdiff.guidance import classifier_free_guidance
from jaxdiff.images import to_float, to_uint8
from jaxdiff.latents import Autoencoder, decode, draw_latents, posterior
from jaxdiff.pipelines import Request, attention_maps, check_sampling, condition_on, conditional_denoiser, generate
from jaxdiff.sampling import example_keys, initial_noise
from jaxdiff.sampling import sample as follow
from jaxdiff.training import diffusion_learner, fit
from jaxdiff.training.loop import make_evaluation, open_learner

VAE = ROOT / "tests" / "fixtures" / "tiny_vae_recipe.py"
RECIPE = ROOT / "tests" / "fixtures" / "tiny_latent_recipe.py"
PROMPTS = ["a 3", "a picture of a 7", ""]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A folder with the runs vae and text, both finished."""
    folder = tmp_path_factory.mktemp("chain")
    assert train.main(["--config", str(VAE), "--workdir", str(folder / "vae")]) == 0
    assert train_text(folder / "text", folder / "vae") == 0
    return folder


def train_text(workdir, vae, *more):
    return train.main(["--config", str(RECIPE), "--workdir", str(workdir), "--latent.run", str(vae), *more])


def parameters(workdir, step="latest"):
    return ckpt.load_run(workdir, step)[1]


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def images(count=256):
    return to_float(open_dataset("digits").read(np.arange(count))["image"])


def test_the_autoencoder_s_run(chain):
    lines = [json.loads(line) for line in (chain / "vae" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    assert {"loss", "mse", "kl", "grad_norm"} <= trained[0].keys()
    evaluated = [line for line in lines if "eval_loss" in line]
    assert {"eval_mse", "eval_kl"} <= evaluated[0].keys()
    assert evaluated[-1]["eval_mse"] < 0.5 * trained[0]["mse"]  # it learns, if not to the end
    with Image.open(chain / "vae" / "samples" / "step_0000040.png") as picture:
        assert picture.size[0] == picture.size[1]  # 8 by 8: rows of images and of what becomes of them
    model, params, step = ckpt.load_run(chain / "vae", kind=Autoencoder)
    assert (step, set(params)) == (40, {"autoencoder"})
    assert isinstance(model.config, AutoencoderConfig)


def test_the_run_keeps_a_copy_of_what_it_takes_over(chain, tmp_path):
    params = parameters(chain / "text")
    assert set(params) == {"network", "text", "autoencoder", "latents"}
    assert_equal(params["autoencoder"], parameters_of_vae(chain))
    moved = Path(shutil.copytree(chain / "text", tmp_path / "moved"))  # without the autoencoder's run beside it
    assert_equal(parameters(moved), params)
    shutil.rmtree(moved / "frozen")
    with pytest.raises(JaxdiffError, match="frozen is missing"):
        ckpt.load_run(moved)


def parameters_of_vae(chain):
    return ckpt.load_run(chain / "vae", kind=Autoencoder)[1]["autoencoder"]


def test_latents_have_mean_0_and_variance_1_and_decode_to_the_images(chain):
    diffuser, params, _ = ckpt.load_run(chain / "text")
    x = images(1024)
    gaussian = posterior(diffuser.autoencoder, params, x)
    z = draw_latents(params, gaussian, example_keys(jax.random.key(0), jnp.arange(len(x))))
    assert z.shape[1:] == diffuser.shape == (4, 4, 2)
    np.testing.assert_allclose(z.mean((0, 1, 2)), 0, atol=0.05)
    np.testing.assert_allclose(z.var((0, 1, 2)), 1, atol=0.05)
    unscaled = diffuser.autoencoder.apply({"params": params["autoencoder"]}, gaussian.mode, method="decode")
    again = decode(diffuser.autoencoder, params, draw_latents(params, gaussian))
    np.testing.assert_allclose(again, unscaled, atol=1e-4)


def test_a_run_in_two_parts_is_one_whole_even_without_the_autoencoder(chain, tmp_path):
    vae = Path(shutil.copytree(chain / "vae", tmp_path / "vae"))
    assert train_text(tmp_path / "run", vae, "--train.steps", "6") == 0
    shutil.rmtree(vae)  # the run has a copy
    assert train_text(tmp_path / "run", vae) == 0
    assert_equal(parameters(tmp_path / "run"), parameters(chain / "text"))


def test_latents_encoded_before_or_in_the_step_are_the_same(chain, tmp_path):
    assert train_text(tmp_path / "run", chain / "vae", "--latent.no-cache") == 0
    cached, within = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (chain / "text", tmp_path / "run")
    )
    for one, other in zip(cached, within, strict=True):
        for name in {"loss", "eval_loss", "grad_norm"} & one.keys():
            np.testing.assert_allclose(one[name], other[name], rtol=1e-3)


def test_the_data_are_encoded_once_and_evaluation_reads_images(chain):
    config = replace(load_recipe(RECIPE), latent=replace(load_recipe(RECIPE).latent, run=str(chain / "vae")))
    dataset = open_dataset("digits", "test")
    learner = open_learner(config, dataset, chain / "text")
    batch = learner.prepare(dataset, cache=True).read(np.arange(5))
    assert {name: x.shape for name, x in batch.items()} == {
        "moments": (5, 4, 4, 4),
        "label": (5,),
        "tokens": (5, 32),
        "mask": (5, 32),
    }
    x = to_float(dataset.read(np.arange(5))["image"])
    gaussian = posterior(ckpt.read_run(chain / "text").autoencoder, learner.frozen, x)
    np.testing.assert_allclose(batch["moments"], np.concatenate(gaussian, -1), atol=1e-4)
    assert "image" in learner.prepare(dataset, cache=False).read(np.arange(5))
    evaluate = make_evaluation(learner, dataset, most=32)
    params = parameters(chain / "text")
    assert np.isfinite(evaluate({name: params[name] for name in learner.averaged})["eval_loss"])


def test_images_in_one_call_are_those_of_the_parts_one_by_one(chain):
    text_to_image = TextToImage.load(chain / "text")
    diffuser, params, _ = text_to_image
    drawn = text_to_image(PROMPTS, negative="a 1", guidance_scale=3.0, num_steps=4, solver="dpmpp_2m", seed=5)
    sampling = replace(diffuser.config.sampling, num_steps=4, solver="dpmpp_2m")
    keys = example_keys(jax.random.key(5), jnp.arange(3))
    encode = diffuser.text.tokenizer.encode
    cond, away = (condition_on(diffuser, params, encode(texts)) for texts in (PROMPTS, ["a 1"] * 3))
    denoise = classifier_free_guidance(conditional_denoiser(diffuser, params), cond, away, 3.0)
    table = check_sampling(diffuser, sampling)
    z = follow(denoise, table, initial_noise(table, keys, (4, 4, 2)), keys)
    by_parts = to_uint8(decode(diffuser.autoencoder, params, z))
    assert drawn.shape == (3, 8, 8, 1)
    assert drawn.dtype == np.uint8
    assert np.abs(drawn.astype(int) - np.asarray(by_parts)).max() <= 1
    assert np.ptp(drawn) > 20


def test_text_to_image_says_what_it_can_not_do(chain, tiny_run):
    text_to_image = TextToImage.load(chain / "text")
    one = text_to_image("a 3")
    assert_equal(one, text_to_image(["a 3"], negative=[""], batch_size=8))
    for arguments, options, said in (
        ((["x" * 40],), {}, "42 tokens long with begin and end, and 32 are allowed"),
        (([],), {}, "nothing to draw"),
        ((["a 3", "a 4"], ["a 1"]), {}, "a request's negative is"),
        ((["a 3"], "a 1"), {"guidance_scale": 1.0}, "choose a guidance_scale other than 1"),
        ((["a 3"],), {"speed": 3}, "the options are solver, num_steps"),
        ((["a 3"],), {"solver": "magic"}, "solver"),
        ((["a 3"],), {"threshold": "clip"}, "this model draws latents"),
    ):
        with pytest.raises(JaxdiffError, match=said):
            text_to_image(*arguments, **options)
    with pytest.raises(JaxdiffError, match="takes no prompts"):
        TextToImage.load(tiny_run)


def test_one_compiled_call_serves_all_prompts_solvers_and_scales(chain):
    text_to_image = TextToImage.load(chain / "text")
    text_to_image(PROMPTS, solver="unipc", num_steps=4, guidance_scale=2.0)
    compiled = text_to_image.draw._cache_size()
    text_to_image(["a 5", "a 6", "nothing"], solver="unipc", num_steps=4, guidance_scale=7.0, eta=None, seed=3)
    assert text_to_image.draw._cache_size() == compiled == 1


def test_sample_by_prompt_from_an_image_and_with_a_mask(chain, tmp_path, capfd):
    run, out = str(chain / "text"), tmp_path / "a.npz"

    def drawn(*args):
        assert sample.main(["--workdir", run, "--out", str(out), "--num", "4", "--prompt", "a 3", "a 8", *args]) == 0
        return np.load(out)["images"]

    fresh = drawn("--animation", str(tmp_path / "a.gif"))
    assert fresh.shape == (4, 8, 8, 1)
    with Image.open(tmp_path / "a.gif") as animation:
        assert animation.n_frames == 3
    digit = open_dataset("digits").read(np.arange(1))["image"][0, :, :, 0]
    Image.fromarray(digit).save(tmp_path / "digit.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[:, :4] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    _, params, _ = ckpt.load_run(run)
    diffuser = ckpt.read_run(run)
    z = draw_latents(params, posterior(diffuser.autoencoder, params, to_float(digit)[None, :, :, None]))
    rebuilt = to_uint8(decode(diffuser.autoencoder, params, z))
    error = lambda images: np.abs(images.astype(int) - np.asarray(rebuilt, int))  # noqa: E731
    half = error(drawn("--image", str(tmp_path / "digit.png"), "--mask", str(tmp_path / "mask.png")))
    assert half[:, :, :4].mean() < error(fresh)[:, :, :4].mean()  # what is drawn beside it shines through the decoder
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(tmp_path / "mask.png")
    assert error(drawn("--image", str(tmp_path / "digit.png"), "--mask", str(tmp_path / "mask.png"))).max() <= 1
    near = drawn("--image", str(tmp_path / "digit.png"), "--strength", "0.34")
    assert error(near).mean() < error(fresh).mean()


def test_where_a_latent_model_looks_for_words(chain):
    diffuser, params, _ = ckpt.load_run(chain / "text")
    tokens = diffuser.text.tokenizer.encode(["a 3"])
    maps = attention_maps(diffuser, params, jnp.zeros((1, 4, 4, 2)), jnp.full(1, 500.0), tokens)
    assert maps.shape == (1, 32, 4, 4)
    np.testing.assert_allclose(maps.sum(1), 1, rtol=1e-4)


def test_what_a_latent_recipe_can_not_do_is_told(chain, tmp_path, tiny_run, one_sentence):
    unfinished = tmp_path / "unfinished"
    ckpt.open_run(load_recipe(VAE), (8, 8, 1), (), unfinished)
    rgb = tmp_path / "rgb"
    ckpt.open_run(replace(load_recipe(VAE), data=Data(channels=3)), (8, 8, 3), (), rgb)
    for run, more, said in (
        (tmp_path / "none", [], "latent.run needs a trained autoencoder. There is no run in"),
        (unfinished, [], "has no checkpoint yet"),
        (tiny_run, [], "holds a diffusion model, and an autoencoder is needed"),
        (chain / "vae", ["--data.flip"], "latent.cache"),
        (chain / "vae", ["--data.channels", "3"], "of images of 1 channels, and these have 3"),
        (chain / "vae", ["--latent.checkpoint", "7"], "There is no checkpoint 7"),
        (chain / "vae", ["--sampling.threshold", "clip"], "latents have no such bounds"),
        (chain / "vae", ["--model.patch-size", "8"], "UNet"),
    ):
        args = ["--config", RECIPE, "--workdir", tmp_path / "run", "--latent.run", run, *more]
        assert said in one_sentence(train.main, args)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    drawing = ["--workdir", chain / "vae", "--out", tmp_path / "a.npz"]
    assert "draws nothing by itself" in one_sentence(sample.main, drawing)
    clipping = ["--workdir", chain / "text", "--out", tmp_path / "a.npz", "--threshold", "dynamic"]
    assert "this model draws latents" in one_sentence(sample.main, clipping)
    with pytest.raises(JaxdiffError, match="another config"):
        fit(load_recipe(VAE), chain / "text")


def test_a_text_encoder_taken_over_stays_as_it_is(chain, tmp_path, tiny_run, one_sentence):
    assert train_text(tmp_path / "run", chain / "vae", "--text.run", str(chain / "text")) == 0
    source, here = parameters(chain / "text"), parameters(tmp_path / "run")
    assert_equal(here["text"], source["text"])
    assert not np.allclose(
        here["network"]["conv_in"]["kernel"], source["network"]["conv_in"]["kernel"], atol=1e-6
    )  # trained beside another text encoder
    learner = diffusion_learner(ckpt.read_run(tmp_path / "run"))
    assert learner.averaged == ("network",)
    request = Request(ckpt.read_run(tmp_path / "run").text.tokenizer.encode(["a 3"]))
    diffuser, params, _ = ckpt.load_run(tmp_path / "run")
    assert next(generate(diffuser, params, request, diffuser.config.sampling)).images.shape == (1, 8, 8, 1)
    for run, more, said in (
        (tmp_path / "none", [], "text.run needs a trained model of captions"),
        (tiny_run, [], "reads none"),
        (chain / "text", ["--text.num-layers", "2"], "num_layers: 1 and 2"),
    ):
        args = ["--config", RECIPE, "--workdir", tmp_path / "other", "--latent.run", chain / "vae"]
        assert said in one_sentence(train.main, [*args, "--text.run", run, *more])
