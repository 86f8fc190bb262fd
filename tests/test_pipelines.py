"""From a config to a model, and from a model to images that depend on seed, place and options alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.config import Config, Diffusion, Sampling, SimpleUNet, UNet
from jaxdiff.errors import JaxdiffError
from jaxdiff.pipelines import Diffuser, Request, check_sampling, generate, init_params, make_diffuser, make_sampler
from jaxdiff.schedules import make_process

SHAPE = (4, 4, 1)
LABELS = np.arange(20) % 3


class Grey(nn.Module):
    """Predicts an image of one grey for each class, 0.0 for none, and a little of what it sees."""

    @nn.compact
    def __call__(self, x, t, cond, *, train=False):
        greys = self.param("greys", lambda key: jnp.asarray([-0.25, 0.1, 0.25, 0.0]))
        return greys[cond.label][:, None, None, None] + 0.1 * jnp.tanh(x)


def make(**diffusion):
    config = Config(diffusion=Diffusion(schedule="cosine", prediction="x0", **diffusion))
    return Diffuser(config, Grey(), make_process("cosine"), SHAPE, ("a", "b", "c"))


def draw(diffuser, sampling, labels=LABELS, **options):
    params = init_params(diffuser, jax.random.key(0))
    parts = list(generate(diffuser, params, Request(labels), sampling, **options))
    return np.concatenate([part.images for part in parts]), parts


def assert_close(one, other):
    assert one.shape == other.shape
    assert np.abs(one.astype(int) - other).max() <= 1


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_an_image_does_not_depend_on_the_batch_it_is_drawn_in(solver):
    sampling = Sampling(solver=solver, num_steps=5)
    whole, parts = draw(make(), sampling)
    assert whole.shape == (20, *SHAPE)
    assert whole.dtype == np.uint8
    assert len(parts) == 1
    for batch_size in (1, 3, 16):  # rounded up to eight devices
        images, parts = draw(make(), sampling, batch_size=batch_size)
        assert [len(part.images) for part in parts] == ([16, 4] if batch_size == 16 else [8, 8, 4])
        assert_close(images, whole)
    assert_close(draw(make(), sampling, LABELS[:7])[0], whole[:7])
    assert np.abs(whole[0].astype(int) - whole[3]).max() > 1  # of one class, and not the same


def test_an_image_depends_on_the_seed_and_its_label():
    sampling = Sampling(num_steps=5)
    images, _ = draw(make(), sampling)
    np.testing.assert_array_equal(draw(make(), sampling)[0], images)
    assert not np.array_equal(draw(make(), sampling, seed=1)[0], images)
    changed = LABELS.copy()
    changed[4] = 2
    other, _ = draw(make(), sampling, changed)
    assert [i for i in range(20) if not np.array_equal(other[i], images[i])] == [4]


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
def test_guidance_scales_what_the_class_adds(scale):
    images, _ = draw(make(), Sampling(num_steps=5, guidance_scale=scale))
    greys = scale * np.array([-0.25, 0.1, 0.25])[LABELS] * 127.5 + 127.5
    assert np.abs(images.reshape(20, -1) - greys[:, None]).max() <= 0.1 * 127.5 + 1


def test_guidance_of_one_costs_one_evaluation_a_row_and_is_what_the_others_tend_to():
    plain, _ = draw(make(), Sampling(num_steps=5, guidance_scale=1.0))
    near, _ = draw(make(), Sampling(num_steps=5, guidance_scale=1.0 + 1e-6))
    assert_close(near, plain)


def test_the_frames_lead_to_the_images():
    sampling = Sampling(num_steps=10)
    plain, _ = draw(make(), sampling)
    for wanted, got in ((4, 4), (60, 10)):
        images, parts = draw(make(), sampling, frames=wanted, batch_size=16)
        assert_close(images, plain)
        assert [part.frames.shape for part in parts] == [(got, 16, *SHAPE), (got, 4, *SHAPE)]
        assert_close(parts[1].frames[-1], parts[1].images)  # a solver's last row ends on the x_0 it predicts


def test_a_sampler_is_compiled_once_for_all_solvers_of_as_many_rows():
    diffuser = make()
    sampler = make_sampler(diffuser)
    for scale, grid in ((2.0, "trailing"), (3.0, "leading"), (0.5, "linspace")):
        draw(diffuser, Sampling(num_steps=5, guidance_scale=scale, grid=grid), draw=sampler, batch_size=8)
    assert sampler._cache_size() == 1


@pytest.mark.parametrize("class_names", [(), ("a", "b", "c")])
def test_guidance_needs_classes_and_that_they_were_withheld(class_names):
    diffuser = make(class_dropout=0.0)._replace(class_names=class_names)
    for scale in (0.0, 1.5):
        with pytest.raises(JaxdiffError, match="needs a model that was trained with classes"):
            check_sampling(diffuser, Sampling(guidance_scale=scale))
    check_sampling(diffuser, Sampling(guidance_scale=1.0))


TINY = UNet(channels=(8,), num_groups=4, layers_per_block=1, attention_levels=(), mid_attention=False)


def test_a_network_takes_classes_where_there_are_some_and_they_are_wanted():
    assert make_diffuser(Config(model=TINY), SHAPE, ("a", "b")).model.num_class_embeds == 3
    assert make_diffuser(Config(model=TINY), SHAPE, ()).model.num_class_embeds is None
    without = make_diffuser(Config(model=SimpleUNet(channels=(8,))), SHAPE, ("a", "b"))
    assert without.class_names == ()
    unwanted = UNet(**{**vars(TINY), "class_conditional": False})
    assert make_diffuser(Config(model=unwanted), SHAPE, ("a", "b")).class_names == ()


@pytest.mark.parametrize(
    "change",
    [
        {"channels": (8,) * 4},
        {"patch_size": 3},
        {"num_groups": 5},
        {"attention_levels": (3,)},
        {"mid_attention": True, "num_heads": 3},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_network_that_does_not_fit_is_told_before_it_is_compiled(change):
    with pytest.raises(JaxdiffError):
        make_diffuser(Config(model=UNet(**{**vars(TINY), **change})), SHAPE, ())
