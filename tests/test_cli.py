"""train.py and sample.py as they are called: what they draw, and what they say of mistakes."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, TINY
from PIL import Image

import sample
import train
from jaxdiff.cli import choose_labels
from jaxdiff.config import Config
from jaxdiff.errors import JaxdiffError
from jaxdiff.pipelines import Diffuser


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
    ],
)
def test_what_can_not_be_sampled(args, meant, tiny_run, tmp_path, one_sentence):
    assert meant in one_sentence(sample.main, ["--workdir", tiny_run, "--out", tmp_path / "a.npz", *args])
    assert not list(tmp_path.iterdir())


def test_there_is_no_run(tmp_path, one_sentence):
    said = one_sentence(sample.main, ["--workdir", tmp_path / "none"])
    assert f"There is no run in {tmp_path / 'none'}" in said
    assert not list(tmp_path.iterdir())


def test_there_is_no_recipe(tmp_path, one_sentence):
    said = one_sentence(train.main, ["--config", ROOT / "configs" / "digit.py", "--workdir", tmp_path])
    assert "cifar10.py, digits.py" in said
    (tmp_path / "broken.py").write_text("config = Config(")
    assert "broken.py" in one_sentence(train.main, ["--config", tmp_path / "broken.py", "--workdir", tmp_path / "a"])
    (tmp_path / "other.py").write_text("cfg = 3")
    said = one_sentence(train.main, ["--config", tmp_path / "other.py", "--workdir", tmp_path / "a"])
    assert "does not define" in said


@pytest.mark.parametrize(
    ("args", "meant"),
    [
        (["--train.steps", "-5"], "train.steps"),
        (["--diffusion.class-dropout", "1.5"], "diffusion.class_dropout"),
        (["--data.name", "no_such_data"], "no_such_data"),
        (["--data.split", "trian"], "train, test"),
        (["--data.name", "folder"], "data_dir"),
        (["--data.name", "folder", "--data.data-dir", "/no/such/folder"], "/no/such/folder"),
        (["--model.channels", "8", "8", "8", "8"], "8x8"),
        (["--model.num-groups", "3"], "num_groups"),
        (["--diffusion.class-dropout", "0"], "guidance_scale"),
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
    one_sentence(train.main, [*TINY, "--workdir", tmp_path / "run", "--diffusion.class-dropout", "0"])
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
