"""The recipes at Stable Diffusion's shapes, narrower and on small images: one step each, from captions to latents."""

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from jaxdiff import checkpoints as ckpt
from jaxdiff.config import Latent, load_recipe
from jaxdiff.latents import Autoencoder
from jaxdiff.training import fit

ONCE = {"log_every": 1, "checkpoint_every": 0, "sample_every": 0, "tensorboard": False}


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
    vae = load_recipe(ROOT / "configs" / "sd_vae.py")
    vae = replace(
        vae,
        data=replace(vae.data, data_dir=str(folder), image_size=64, eval_split=None),
        model=replace(vae.model, channels=(32, 32, 32, 32), layers_per_block=1, dtype="float32"),  # slow without XLA
        reconstruction=replace(vae.reconstruction, perceptual_weight=0.0, adversarial_start=0),  # no files of VGG here
        train=replace(vae.train, steps=1, batch_size=8),
        run=replace(vae.run, **ONCE),
    )
    assert fit(vae, tmp_path / "vae") == 1
    told = json.loads((tmp_path / "vae" / "metrics.jsonl").read_text().splitlines()[0])
    assert told["discriminator"] > 0
    model, _, _ = ckpt.load_run(tmp_path / "vae", kind=Autoencoder)
    assert (model.model.downsampling, model.model.latent_channels) == (8, 4)

    small = load_recipe(ROOT / "configs" / "sd_small.py")
    small = replace(
        small,
        data=replace(small.data, data_dir=str(folder), image_size=64, eval_split=None),
        latent=Latent(str(tmp_path / "vae"), cache=small.latent.cache),
        model=replace(small.model, channels=(32, 64, 64, 64), layers_per_block=1),
        text=replace(
            small.text,
            vocabulary=str(ROOT / "tests" / "fixtures" / "clip_tokenizer"),
            hidden_size=48,
            intermediate_size=96,
            num_layers=2,
        ),
        train=replace(small.train, steps=1, batch_size=16, accumulate=2),
        run=replace(small.run, **ONCE),
    )
    assert fit(small, tmp_path / "run") == 1
    told = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert 0.5 < told["loss"] < 2  # of a network whose last layer is zero: the variance of eps
    diffuser, params, _ = ckpt.load_run(tmp_path / "run")
    assert diffuser.shape == (8, 8, 4)
    assert set(params) == {"network", "text", "autoencoder", "latents"}
