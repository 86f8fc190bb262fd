"""train.py and sample.py as they are called: what they draw, and what they say of mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY
from PIL import Image

import sample
import train
from jaxdiff.cli import SampleOptions, choose_labels, make_request, parse_sample_options, read_image
from jaxdiff.config import Config
from jaxdiff.errors import JaxdiffError
from jaxdiff.pipelines import Diffuser
from jaxdiff.solvers import SOLVERS, describe_grids

DIGITS = ROOT / "docs" / "digits.png"


def sampled(workdir, out, capfd, *args):
    """Call sample.py; what it tells on standard output."""
    capfd.readouterr()
    assert sample.main(["--workdir", str(workdir), "--out", str(out), *map(str, args)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 1
    return json.loads(lines[0])


def arrays(path):
    with np.load(path) as content:
        return content["images"], content["labels"]


def picture(path, pixels):
    """Write a picture; its path."""
    Image.fromarray(np.uint8(pixels)).save(path)
    return path


# --- samples ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_arrays_and_what_is_told_of_them(tiny_run, tmp_path, capfd):
    told = sampled(tiny_run, tmp_path / "a.npz", capfd, "--num", 12, "--labels", "3", "7", "--seed", 5)
    images, labels = arrays(tmp_path / "a.npz")
    assert images.shape == (12, 8, 8, 1)
    assert images.dtype == np.uint8
    assert labels.tolist() == [3, 7] * 6
    assert (told["images"], told["step"], told["seed"], told["out"]) == (12, 60, 5, str(tmp_path / "a.npz"))
    assert told["solver"] == "ddim"
    assert told["num_steps"] == 4  # as the run's config says
    assert told["guidance_scale"] == 1.5


@pytest.mark.slow
def test_the_same_images_from_any_batch_size_and_any_number_of_devices(tiny_run, tmp_path, capfd):
    sampled(tiny_run, tmp_path / "a.npz", capfd, "--num", 20)
    sampled(tiny_run, tmp_path / "b.npz", capfd, "--num", 13, "--batch-size", 8)
    environment = {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")}
    command = [sys.executable, str(ROOT / "sample.py"), "--workdir", str(tiny_run), "--num", "20", "--batch-size", "6"]
    done = subprocess.run([*command, "--out", str(tmp_path / "c.npz")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == 20
    assert done.stderr == ""
    (a, labels), (b, _), (c, c_labels) = (arrays(tmp_path / f"{name}.npz") for name in "abc")
    assert labels.tolist() == c_labels.tolist() == [*range(10), *range(10)]
    assert np.abs(a[:13].astype(int) - b).max() <= 1
    assert np.abs(a.astype(int) - c).max() <= 1
    assert len(np.unique(a.reshape(20, -1), axis=0)) == 20


@pytest.mark.slow
def test_the_options_change_the_images(tiny_run, tmp_path, capfd):
    def drawn(*args):
        sampled(tiny_run, tmp_path / "a.npz", capfd, "--num", 8, *args)
        return arrays(tmp_path / "a.npz")[0].astype(int)

    base = drawn()
    np.testing.assert_array_equal(drawn("--guidance-scale", 1.5), base)
    for change in (
        ("--guidance-scale", 1),
        ("--guidance-scale", 6),
        ("--eta", 1),
        ("--seed", 1),
        ("--labels", "4"),
    ):
        assert np.abs(drawn(*change) - base).max() > 1, change


@pytest.mark.slow
def test_a_picture_and_an_animation(tiny_run, tmp_path, capfd):
    args = ("--num", 8, "--labels", "1", "2", "--animation", tmp_path / "a.gif")
    sampled(tiny_run, tmp_path / "new" / "a.png", capfd, *args)
    with Image.open(tmp_path / "new" / "a.png") as picture, Image.open(tmp_path / "a.gif") as animation:
        assert picture.height == 2 * picture.width  # a column for each label
        assert animation.size == picture.size
        assert animation.n_frames == 4


@pytest.mark.slow
def test_what_a_solver_s_steps_cost_is_told(tiny_run, tmp_path, capfd):
    told = sampled(tiny_run, tmp_path / "a.npz", capfd, "--num", 8, "--solver", "heun", "--grid", "karras")
    assert (told["solver"], told["grid"], told["num_steps"], told["evaluations"]) == ("heun", "karras", 4, 7)
    args = ("--solver", "deis", "--order", 2, "--frame", "flow", "--final", "sigma_min", "--guidance-interval", 0.1, 9)
    told = sampled(tiny_run, tmp_path / "a.npz", capfd, "--num", 8, *args, "--guidance-rescale", 0.7)
    assert (told["order"], told["frame"], told["final"], told["evaluations"]) == (2, "flow", "sigma_min", 4)
    assert (told["guidance_interval"], told["guidance_rescale"], told["eta"]) == ([0.1, 9.0], 0.7, None)


@pytest.mark.slow
def test_from_a_picture_of_another_size_and_in_colour(tiny_run, tmp_path, capfd):
    def drawn(grey, *args):
        path = picture(tmp_path / f"{grey}.png", np.full((24, 16, 3), grey))
        told = sampled(tiny_run, tmp_path / "a.npz", capfd, "--num", 8, "--image", path, *args)
        return arrays(tmp_path / "a.npz")[0].astype(int), told["evaluations"]

    (dark, evaluations), (light, _) = (drawn(grey, "--strength", 0.5) for grey in (20, 230))
    assert evaluations == 2  # of the run's 4 steps
    assert (light - dark).mean() > 30
    assert np.abs(drawn(20)[0] - drawn(230)[0]).max() <= 1  # all of the strength leaves nothing of it


@pytest.mark.slow
def test_the_white_parts_of_a_mask_are_kept(tiny_run, tmp_path, capfd):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8))
    white = np.arange(8) < 3
    args = ("--image", picture(tmp_path / "image.png", pixels))
    args += ("--mask", picture(tmp_path / "mask.png", np.tile(255 * white, (8, 1))))
    sampled(tiny_run, tmp_path / "a.npz", capfd, "--num", 12, "--batch-size", 8, *args)
    images = arrays(tmp_path / "a.npz")[0][..., 0]
    assert (images[:, :, white] == pixels[:, white]).all()
    assert np.mean(images[:, :, ~white] == pixels[:, ~white]) < 0.5
    assert len(np.unique(images.reshape(12, -1), axis=0)) == 12


@pytest.mark.slow
def test_away_from_classes(tiny_run, tmp_path, capfd):
    def drawn(*args):
        sampled(tiny_run, tmp_path / "a.npz", capfd, "--num", 8, "--guidance-scale", 4, *args)
        return arrays(tmp_path / "a.npz")[0].astype(int)

    base, away = drawn(), drawn("--negative", "3", "7")
    assert np.abs(away - base).max() > 1
    by_name = drawn("--negative", "7", "3")
    assert np.abs(by_name - away).max() > 1
    np.testing.assert_array_equal(drawn("--negative", "3", "7", "3", "7"), away)


@pytest.mark.slow
def test_checkpoints_by_name_and_step(tiny_run, tmp_path, capfd, one_sentence):
    assert sampled(tiny_run, tmp_path / "a.npz", capfd, "--num", 8, "--checkpoint", 48)["step"] == 48
    losses = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    best = min((line for line in losses if "eval_loss" in line), key=lambda line: line["eval_loss"])["step"]
    assert sampled(tiny_run, tmp_path / "a.npz", capfd, "--num", 8, "--checkpoint", "best")["step"] == best
    said = one_sentence(sample.main, ["--workdir", tiny_run, "--checkpoint", 50, "--out", tmp_path / "b.npz"])
    assert "There is no checkpoint 50" in said
    assert "48" in said
    assert not (tmp_path / "b.npz").exists()


def test_labels_by_number_and_by_name():
    diffuser = Diffuser(Config(), None, None, (8, 8, 1), ("cat", "dog", "7"))
    assert choose_labels(diffuser, (), 5).tolist() == [0, 1, 2, 0, 1]
    assert choose_labels(diffuser, ("dog", "0"), 3).tolist() == [1, 0, 1]
    assert choose_labels(diffuser, ("7",), 2).tolist() == [2, 2]  # a name before a number
    for wrong in ("3", "cow", "-1", "²", "1.0", ""):
        with pytest.raises(JaxdiffError, match=r"There is no class .* 0 to 2, or cat, dog, 7"):
            choose_labels(diffuser, (wrong,), 3)
    unconditional = diffuser._replace(class_names=())
    assert choose_labels(unconditional, (), 3).tolist() == [0, 0, 0]
    with pytest.raises(JaxdiffError, match="without classes"):
        choose_labels(unconditional, ("0",), 3)


def test_a_request_has_what_was_asked_for_and_no_more(tmp_path):
    diffuser = Diffuser(Config(), None, None, (4, 4, 3), ("cat", "dog"))
    assert make_request(diffuser, SampleOptions(num=3))[1:] == (None, None, None)
    image = picture(tmp_path / "image.png", np.full((9, 6), 51))
    mask = picture(tmp_path / "mask.png", np.repeat([[0, 255]], [4, 4], axis=1).repeat(8, axis=0))
    options = SampleOptions(num=3, labels=("dog",), negative=("0", "dog"), image=str(image), mask=str(mask))
    request = make_request(diffuser, options)
    assert (request.prompt.tolist(), request.negative.tolist()) == ([1, 1, 1], [0, 1, 0])
    assert request.image.shape == (3, 4, 4, 3)
    np.testing.assert_allclose(request.image, 51 / 127.5 - 1, atol=1e-6)
    assert request.mask.shape == (3, 4, 4, 1)
    assert request.mask[:, :, 2:].all()
    assert not request.mask[:, :, :2].any()


def test_a_picture_for_a_model_that_is_not_square(tmp_path):
    pixels = np.arange(24).reshape(4, 6)
    np.testing.assert_allclose(read_image(picture(tmp_path / "a.png", pixels), (4, 6, 1))[..., 0], pixels / 127.5 - 1)
    with pytest.raises(JaxdiffError, match=r"a\.png is 6x4, and this model draws 4x6"):
        read_image(tmp_path / "a.png", (6, 4, 1))


def test_solvers_and_grids_are_told_without_a_run(tmp_path, capfd):
    capfd.readouterr()
    assert sample.main(["--list", "--workdir", str(tmp_path / "none")]) == 0
    told = [line.split(maxsplit=1) for line in capfd.readouterr().out.splitlines() if line.startswith("  ")]
    abouts = {name: solver.about for name, solver in SOLVERS.items()} | describe_grids()
    assert told == [[name, about] for name, about in abouts.items()]
    assert not list(tmp_path.iterdir())


def test_another_solver_does_not_inherit_the_options_of_the_run_s(tiny_copy):
    path = tiny_copy / "config.json"
    content = json.loads(path.read_text())
    content["config"]["sampling"] |= {"solver": "ddim", "eta": 0.5, "num_steps": 7}
    path.write_text(json.dumps(content))
    parse = lambda *args: parse_sample_options(["--workdir", str(tiny_copy), *args], "").sampling  # noqa: E731
    assert (parse().eta, parse("--num-steps", "3").eta) == (0.5, 0.5)
    unipc = parse("--solver", "unipc", "--order", "3")
    assert (unipc.solver, unipc.eta, unipc.order, unipc.num_steps) == ("unipc", None, 3, 7)
    assert parse("--solver=ddim").eta == 0.5


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "meant"),
    [
        (["--trian.steps", "5"], "--train.steps"),
        (["--optimizer.learning-rat", "5"], "--optimizer.learning-rate"),
        (["--train.steps", "many"], "train.steps"),
        (["--diffusion.schedule", "cosin"], "cosine"),
    ],
)
def test_an_option_that_does_not_exist_or_parse(args, meant, tmp_path, capfd):
    with pytest.raises(SystemExit) as left:
        train.main([*TINY, "--workdir", str(tmp_path / "run"), *args])
    err = capfd.readouterr().err
    assert left.value.code == 2
    assert meant in err
    assert "Traceback" not in err
    assert len(err.splitlines()) < 25
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "meant"),
    [
        (["--labels", "11"], "There is no class '11'"),
        (["--labels", "cow"], "0 to 9"),
        (["--out", "samples.txt"], ".npz"),
        (["--animation", "a.mp4"], ".gif"),
        (["--eta", "2"], "eta"),
        (["--num", "0"], "num"),
        (["--num-steps", "5000"], "5000"),
        (["--checkpoint", "newest"], "latest"),
        (["--image", ROOT / "sample.py"], "sample.py cannot be read"),
        (["--image", ROOT / "none.png"], "none.png"),
        (["--image", DIGITS, "--mask", ROOT / "sample.py"], "sample.py cannot be read"),
        (["--mask", DIGITS], "are of an image, and there is none"),
        (["--strength", "0.5"], "are of an image, and there is none"),
        (["--image", DIGITS, "--strength", "0"], "strength should be greater than 0"),
        (["--image", DIGITS, "--strength", "1.5"], "strength should be less than or equal to 1"),
        (["--image", DIGITS, "--strength", "0.1"], "at least one of the 4 steps"),
        (["--negative", "3", "--guidance-scale", "1"], "choose a guidance_scale other than 1"),
        (["--negative", "cow"], "There is no class 'cow'"),
        (["--solver", "dpmpp_3m", "--num-steps", "2"], "Order 3 needs at least 3 steps, and the grid has 2"),
        (["--solver", "ddpm", "--eta", "0.5"], "eta is no option of the solver 'ddpm'"),
        (["--order", "7"], "order should be less than or equal to 4, not 7"),
        (["--order", "2"], "order is no option of the solver 'ddim': it has eta"),
        (["--shift", "3"], "moves the times of the flow process alone"),
        (["--guidance-interval", "-1", "2"], "guidance_interval.0 should be greater than or equal to 0"),
        (["--grid", "ays_svd", "--num-steps", "50"], "more than this process has"),
    ],
    ids=lambda value: " ".join(Path(arg).name for arg in value) if isinstance(value, list) else "",
)
def test_what_can_not_be_sampled(args, meant, tiny_run, tmp_path, one_sentence):
    assert meant in one_sentence(sample.main, ["--workdir", tiny_run, "--out", tmp_path / "a.npz", *args])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "meant"),
    [
        (["--guidance-interval", "1", "2", "3"], "3"),
        (["--guidance-interval", "1"], "guidance-interval"),
        (["--solver", "dpmp_2m"], "dpmpp_2m"),
        (["--grid", "karas"], "karras"),
        (["--frame", "flo"], "flow"),
        (["--strenght", "1"], "--strength"),
    ],
)
def test_an_option_of_sampling_that_does_not_exist_or_parse(args, meant, tiny_run, tmp_path, capfd):
    with pytest.raises(SystemExit) as left:
        sample.main(["--workdir", str(tiny_run), "--out", str(tmp_path / "a.npz"), *args])
    err = capfd.readouterr().err
    assert left.value.code == 2
    assert meant in err
    assert "Traceback" not in err
    assert len(err.splitlines()) < 25
    assert not list(tmp_path.iterdir())


def test_there_is_no_run(tmp_path, one_sentence):
    said = one_sentence(sample.main, ["--workdir", tmp_path / "none"])
    assert f"There is no run in {tmp_path / 'none'}" in said
    assert not list(tmp_path.iterdir())


def test_there_is_no_recipe(tmp_path, one_sentence):
    said = one_sentence(train.main, ["--config", ROOT / "configs" / "digit.py", "--workdir", tmp_path])
    assert "cifar10.py, digit_pairs_text.py, digits.py" in said
    (tmp_path / "broken.py").write_text("config = Config(")
    assert "broken.py" in one_sentence(train.main, ["--config", tmp_path / "broken.py", "--workdir", tmp_path / "a"])
    (tmp_path / "other.py").write_text("cfg = 3")
    said = one_sentence(train.main, ["--config", tmp_path / "other.py", "--workdir", tmp_path / "a"])
    assert "does not define" in said


@pytest.mark.parametrize(
    ("args", "meant"),
    [
        (["--train.steps", "-5"], "train.steps"),
        (["--diffusion.condition-dropout", "1.5"], "diffusion.condition_dropout"),
        (["--data.name", "no_such_data"], "no_such_data"),
        (["--data.split", "trian"], "train, test"),
        (["--data.name", "folder"], "data_dir"),
        (["--data.name", "folder", "--data.data-dir", "/no/such/folder"], "/no/such/folder"),
        (["--model.channels", "8", "8", "8", "8"], "8x8"),
        (["--model.num-groups", "3"], "num_groups"),
        (["--diffusion.condition-dropout", "0"], "guidance_scale"),
        (["--model.no-class-conditional"], "guidance_scale"),
        (["--diffusion.zero-terminal-snr", "--diffusion.prediction", "eps"], "zero_terminal_snr"),
        (["--sampling.num-steps", "2000"], "2000"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_can_not_be_trained(args, meant, tmp_path, one_sentence):
    assert meant in one_sentence(train.main, [*TINY, "--workdir", tmp_path / "run", *args])
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_mistake_leaves_nothing_that_stands_in_the_way(tmp_path, one_sentence):
    """After a config that can not be trained, the right one may use the same workdir."""
    one_sentence(train.main, [*TINY, "--workdir", tmp_path / "run", "--diffusion.condition-dropout", "0"])
    assert not (tmp_path / "run").exists()


def test_an_image_of_a_folder_can_not_be_read(tmp_path, one_sentence):
    for i, noise in enumerate(np.random.default_rng(0).integers(0, 256, (3, 8, 8), np.uint8)):
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:80])
    args = ["--data.name", "folder", "--data.data-dir", tmp_path, "--data.eval-split", "None"]
    args += ["--sampling.guidance-scale", "1"]  # there are no classes
    said = one_sentence(train.main, [*TINY, "--workdir", tmp_path / "run", *args])
    assert str(tmp_path / "1.png") in said


def test_as_a_program_it_leaves_with_a_status_and_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), *TINY, "--workdir", str(tmp_path / "run")]
    done = subprocess.run([*command, "--train.batch-size", "3"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: train.batch_size 3 does not divide")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
