"""Configs: what is refused and in which words, the command line, and that they survive being saved."""

import dataclasses
import json
from pathlib import Path
from typing import get_args

import jax
import pytest

from jaxdiff import config as c
from jaxdiff import models
from jaxdiff.config import Config, Data, Diffusion, Optimizer, Sampling, SimpleUNet, Train, UNet
from jaxdiff.errors import JaxdiffError
from jaxdiff.guidance import THRESHOLDS
from jaxdiff.latents import make_autoencoder
from jaxdiff.losses import TIME_DISTRIBUTIONS, WEIGHTINGS
from jaxdiff.pipelines import check_sampling, init_params, make_diffuser
from jaxdiff.preconditioning import PREDICTIONS
from jaxdiff.schedules import BETA_SCHEDULES, CONTINUOUS_PROCESSES, FRAMES
from jaxdiff.solvers import GRIDS, SOLVERS

RECIPES = Path(__file__).parent.parent / "configs"
SHAPES = {"digits": (8, 8, 1), "cifar10": (32, 32, 3), "digit_pairs_text": (16, 16, 1)} | {
    "sd_vae": (256, 256, 3),
    "sd_small": (512, 512, 3),
}
AUTOENCODERS = {"fashion_mnist_latent_text": "fashion_mnist_vae", "sd_small": "sd_vae"}


def choices(section: type, name: str) -> tuple[str, ...]:
    """What a Literal allows, and a Literal | None beside None."""
    literal = {field.name: field.type for field in dataclasses.fields(section)}[name]
    return get_args(get_args(literal)[0]) or get_args(literal)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.py")), ids=lambda path: path.stem)
def test_recipes_load_survive_saving_and_fit_their_images(path):
    config = c.load_recipe(path)
    assert c.from_dict(type(config), c.to_dict(config)) == config
    shape = SHAPES.get(path.stem, (28, 28, 1))
    if isinstance(config, c.AutoencoderConfig):
        make_autoencoder(config, shape)
        return
    if config.text and config.text.vocabulary:  # a download, in whose place a small one does
        vocabulary = str(Path(__file__).parent / "fixtures" / "clip_tokenizer")
        config = dataclasses.replace(config, text=dataclasses.replace(config.text, vocabulary=vocabulary))
    autoencoder = config.latent and c.load_recipe(RECIPES / f"{AUTOENCODERS[path.stem]}.py").model
    assert config.latent is None or config.latent.run == f"runs/{AUTOENCODERS[path.stem]}"
    diffuser = make_diffuser(config, shape, [str(i) for i in range(10)], autoencoder)
    check_sampling(diffuser, config.sampling)


def test_cifar10_is_the_paper_s_network():
    diffuser = make_diffuser(c.load_recipe(RECIPES / "cifar10.py"), (32, 32, 3), ["a", "b"])
    params = jax.eval_shape(lambda: init_params(diffuser, jax.random.key(0)))
    assert sum(x.size for x in jax.tree.leaves(params)) == 35_746_307


def test_choices_are_the_registries():
    """The names that a config allows are the names that the library knows."""
    assert set(choices(c.Sampling, "solver")) == set(SOLVERS)
    assert set(choices(c.Sampling, "grid")) == set(GRIDS)
    assert set(choices(c.Sampling, "frame")) == set(FRAMES)
    assert set(choices(c.Sampling, "threshold")) == set(THRESHOLDS)
    assert set(choices(c.Diffusion, "prediction")) == set(PREDICTIONS)
    assert set(choices(c.Diffusion, "weighting")) == set(WEIGHTINGS)
    assert set(choices(c.Diffusion, "time_distribution")) == set(TIME_DISTRIBUTIONS)
    assert set(choices(c.Diffusion, "schedule")) == {*BETA_SCHEDULES, *CONTINUOUS_PROCESSES}


@pytest.mark.parametrize(
    ("section", "module"),
    [(UNet, models.UNet), (SimpleUNet, models.SimpleUNet), (c.AutoencoderKL, models.AutoencoderKL)],
)
def test_a_network_s_section_has_the_network_s_options_and_defaults(section, module):
    ours = {f.name: f.default for f in dataclasses.fields(section)}
    theirs = {f.name: f.default for f in dataclasses.fields(module)}
    beside = {"kind", "class_conditional", "dtype"}
    assert {name: ours[name] for name in ours if name not in beside} == {
        name: theirs[name] for name in ours if name not in beside
    }


def test_override():
    base = Config(data=Data(name="mnist"), model=SimpleUNet())
    args = ["--train.steps", "7", "--model.channels", "8", "16", "--data.flip", "--run.log-every", "3"]
    new = c.validate(c.override(base, args, "train.py"))
    assert (new.train.steps, new.model, new.data) == (7, SimpleUNet(channels=(8, 16)), Data(name="mnist", flip=True))
    assert c.differences(base, new, ignore=("run", "train.steps")) == [
        "data.flip: False and True",
        "model.channels: [64, 128, 256] and [8, 16]",
    ]


def test_how_to_sample_survives_the_command_line_and_being_saved():
    options = {"solver": "edm", "grid": "ays_sd", "final": "sigma_min", "frame": "flow", "guidance_rescale": 0.5}
    options |= {"s_churn": 3.0, "guidance_interval": (0.2, 8.0)}
    args = ["--sampling.solver", "edm", "--sampling.grid", "ays_sd", "--sampling.final", "sigma_min"]
    args += ["--sampling.frame", "flow", "--sampling.guidance-rescale", "0.5", "--sampling.s-churn", "3"]
    args += ["--sampling.guidance-interval", "0.2", "8", "--sampling.order", "None", "--sampling.eta", "None"]
    base = Config(sampling=Sampling(order=2, eta=0.5))
    config = c.validate(c.override(base, args, "train.py"))
    assert config.sampling == Sampling(**options)
    assert c.from_dict(Config, json.loads(json.dumps(c.to_dict(config)))) == config


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--train.stpes", "7"], "--train.steps"),
        (["--train.steps", "many"], "many"),
        (["--diffusion.prediction", "noise"], "eps"),
    ],
)
def test_a_wrong_option_leaves_with_what_is_allowed(args, said, capsys):
    with pytest.raises(SystemExit) as left:
        c.override(Config(), args, "train.py")
    assert left.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (Config(train=Train(steps=0)), "train.steps should be greater than 0, not 0."),
        (Config(train=Train(steps="all")), "train.steps should be a valid integer"),
        (Config(optimizer=Optimizer(ema_decay=1.0)), "optimizer.ema_decay should be less than 1, not 1.0."),
        (Config(diffusion=Diffusion(prediction="noise")), "'eps', 'x0', 'v', 'flow', 'score' or 'edm', not 'noise'."),
        (Config(model=UNet(channels=(64, 0))), "model.channels.1 should be greater than 0, not 0."),
        (Config(sampling=Sampling(solver="dpm")), "'predictor_corrector', not 'dpm'."),
        (Config(sampling=Sampling(shift=0.0)), "sampling.shift should be greater than 0, not 0.0."),
        (Config(sampling=Sampling(order=5)), "sampling.order should be less than or equal to 4, not 5."),
        (Config(sampling=Sampling(guidance_interval=(1.0,))), "sampling.guidance_interval.1"),
        (Config(sampling=Sampling(guidance_scale=float("inf"))), "sampling.guidance_scale"),
        (Config(optimizer=c.Optimizer(learning_rate=float("nan"))), "optimizer.learning_rate"),
        (Config(diffusion=Diffusion(zero_terminal_snr=True)), "choose v, x0, flow or edm."),
        (Config(diffusion=Diffusion(zero_terminal_snr=True, schedule="vp", prediction="v")), "choose linear, cosine"),
    ],
)
def test_a_wrong_value_is_told_with_what_is_allowed(config, said):
    with pytest.raises(JaxdiffError) as error:
        c.validate(config)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"trian": {}}, "There is no option trian; there are data, model, latent, text, diffusion"),
        ({"train": {"stpes": 1}}, "There is no option train.stpes; there are steps, batch_size"),
        ({"model": {"kind": "unet", "width": 1}}, "There is no option model.width; there are kind, channels"),
        ({"text": {"speed": 1}}, "There is no option text.speed; there are tokenizer, vocabulary"),
        ({"model": {"kind": "dit"}}, "model.kind must be one of simple_unet, unet."),
    ],
)
def test_a_wrong_name_is_told_with_what_there_is(values, said):
    with pytest.raises(JaxdiffError) as error:
        c.from_dict(Config, values)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("from jaxdiff.config import *\nconfig = Config(train=Train(stpes=3))", "stpes"),
        ("from jaxdiff.config import *\nconfig = Config(train=Train(steps=-3))", "train.steps should be greater"),
        ("config = 3", r"does not define `config = Config\(\.\.\.\)`"),
        ("config = (", "can not be read"),
    ],
)
def test_a_wrong_recipe_is_told(text, said, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(JaxdiffError, match=said):
        c.load_recipe(path)


def test_an_unknown_recipe_is_told_with_the_known_ones():
    with pytest.raises(JaxdiffError, match=r"cifar10.py, digit_pairs_text.py, digits.py, fashion_mnist.py"):
        c.load_recipe(RECIPES / "digit.py")
