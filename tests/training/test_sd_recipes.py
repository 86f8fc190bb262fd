"""The recipes at Stable Diffusion's shapes, narrower and on small images: one step each, from captions to latents."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from jaxdiff import checkpoints as ckpt
from jaxdiff.config import load_recipe
from jaxdiff.data import batches, open_dataset
from jaxdiff.training import init_state, make_train_step
from jaxdiff.training.loop import open_learner


def take_a_step(learner, dataset):
    """The states before and after one step on the first batch."""
    train = learner.config.train
    batch = batches(learner.prepare(dataset, cache=True), train.batch_size, flip=learner.config.data.flip)[0]
    state = jax.jit(lambda: init_state(learner))()
    return state, jax.jit(make_train_step(learner))(state, batch, learner.frozen)


@pytest.fixture
def folder(tmp_path):
    """Four pictures with captions."""
    rng = np.random.default_rng(0)
    images = tmp_path / "images"
    images.mkdir()
    lines = []
    for name in ("red", "green", "blue", "grey"):
        Image.fromarray(rng.integers(0, 256, (64, 80, 3), dtype=np.uint8)).save(images / f"{name}.png")
        lines.append(json.dumps({"file_name": f"{name}.png", "caption": f"a photo of {name} noise"}))
    (images / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return images


@pytest.mark.slow
def test_a_step_of_the_autoencoder_and_one_of_what_diffuses_its_latents(folder, tmp_path):
    dataset = open_dataset("folder", data_dir=str(folder), image_size=64, channels=3)
    vae = load_recipe(ROOT / "configs" / "sd_vae.py")
    vae = replace(
        vae,
        model=replace(vae.model, channels=(32, 32, 32, 32), layers_per_block=1),
        reconstruction=replace(vae.reconstruction, perceptual_weight=0.0, adversarial_start=0),  # no files of VGG here
        train=replace(vae.train, batch_size=2),
    )
    _, state = take_a_step(open_learner(vae, dataset, tmp_path / "vae"), dataset)
    assert float(state.sums["discriminator"]) > 0
    with ckpt.open_checkpoints(tmp_path / "vae") as checkpoints:
        ckpt.save(checkpoints, 1, {"ema_params": jax.device_get(state.ema_params)})

    small = load_recipe(ROOT / "configs" / "sd_small.py")
    small = replace(
        small,
        latent=replace(small.latent, run=str(tmp_path / "vae")),
        model=replace(small.model, channels=(32, 64, 64, 64), layers_per_block=1),
        text=replace(
            small.text,
            vocabulary=str(ROOT / "tests" / "fixtures" / "clip_tokenizer"),
            hidden_size=48,
            intermediate_size=96,
            num_layers=2,
        ),
        train=replace(small.train, batch_size=4, accumulate=2),
    )
    learner = open_learner(small, dataset, tmp_path / "run")
    assert ckpt.read_run(tmp_path / "run").shape == (8, 8, 4)
    assert set(learner.frozen) == {"autoencoder", "latents"}
    fresh, state = take_a_step(learner, dataset)
    assert 0.5 < float(state.sums["loss"]) < 2  # of a network whose last layer is zero: the variance of eps
    before, after = (s.params["network"]["conv_out"]["kernel"] for s in (fresh, state))
    assert float(jnp.abs(after - before).max()) > 0
