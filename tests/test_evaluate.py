"""A run is measured: one JSON line with distances, what they cost, and bits."""

import json

import numpy as np
import pytest
from scipy import ndimage

from jaxdiff import evaluate
from jaxdiff.checkpoints import load_run
from jaxdiff.data import open_dataset
from jaxdiff.metrics import PIXELS, extract
from jaxdiff.models import UNet

NUMBERS = ("frechet", "kernel", "kernel_error", "precision", "recall", "density", "coverage")


def lines(capfd, *args):
    assert evaluate.main([str(arg) for arg in args]) == 0
    return json.loads(capfd.readouterr().out)


def test_real_images_beside_real_and_blurred_ones():
    images = open_dataset("digits").read(np.random.default_rng(0).permutation(1000))[
        "image"
    ]  # in order they are 0 to 9 in turn
    blurred = ndimage.gaussian_filter(images[1::2], (0, 0.8, 0.8, 0))
    real, other, worse = (extract(PIXELS, [part]) for part in (images[::2], images[1::2], blurred))
    near, far = evaluate.compare(real, other), evaluate.compare(real, worse)
    assert far["frechet"] > 5 * near["frechet"]
    assert abs(near["kernel"]) < 4 * near["kernel_error"]
    assert far["kernel"] > 4 * far["kernel_error"]
    assert near["recall"] > 0.8
    assert far["recall"] < 0.2


@pytest.mark.slow
def test_a_run_is_measured_in_one_line(tiny_run, capfd):
    args = ("--workdir", tiny_run, "--num", 96, "--num-steps", 3, "--batch-size", 32)
    told = lines(capfd, *args, "--bits-images", 20, "--bound-terms", 5, "--rtol", 1e-2)
    assert (told["num"], told["num_steps"], told["split"], told["seed"]) == (96, 3, "test", 0)
    assert told["nfe"] >= 3
    assert told["images_per_second"] > 0
    assert set(told["pixels"]) == set(NUMBERS)
    assert all(np.isfinite(told["pixels"][name]) for name in NUMBERS)
    diffuser, _, _ = load_run(tiny_run)
    assert isinstance(diffuser.model, UNet)
    for name in ("bound_bits", "flow_bits_uniform", "flow_bits_gaussian"):
        assert 0 < told[name] < 20
        assert 0 < told[f"{name}_error"] < told[name]
    assert len(list((tiny_run / "features").iterdir())) == 1
    again = lines(capfd, *args)
    assert again["pixels"] == told["pixels"]  # the same seed, and features from the cache
    assert "bound_bits" not in again
    other = lines(capfd, *args, "--seed", 1)
    assert other["pixels"] != told["pixels"]


def test_what_can_not_be_measured_is_told(tiny_run, one_sentence):
    for args, said in (
        (["--classifier", "none.npz"], "There is no classifier none.npz"),
        (["--inception", "none.pth"], "no weights of Inception at none.pth: fetch https://"),
        (["--split", "valid"], "valid"),
        (["--num", "20", "--num-steps", "1"], "64 features needs more samples than that, and there are 20"),
        (["--rtol", "0"], "rtol"),
    ):
        assert said in one_sentence(evaluate.main, ["--workdir", tiny_run, *args])
