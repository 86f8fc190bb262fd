"""From a config to a model, and from a model to images that depend on seed, place and options alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.config import Config, Diffusion, Sampling, SimpleUNet, UNet
from jaxdiff.errors import JaxdiffError
from jaxdiff.images import to_uint8
from jaxdiff.pipelines import Diffuser, Request, check_sampling, generate, init_params, make_diffuser, make_sampler
from jaxdiff.sampling import example_keys, noised
from jaxdiff.schedules import make_process
from jaxdiff.solvers import ddim, ddpm, deis, heun, make_grid

SHAPE = (4, 4, 1)
LABELS = np.arange(20) % 3
GREYS = np.array([-0.25, 0.1, 0.25, 0.0])
"""Of the classes, and of none."""
IMAGES = np.random.default_rng(0).uniform(-0.9, 0.9, (20, *SHAPE)).astype(np.float32)
KEPT = np.asarray(to_uint8(jnp.asarray(IMAGES)))
MASKS = np.random.default_rng(1).uniform(size=(20, *SHAPE)) < 0.5


class Grey(nn.Module):
    """Predicts an image of one grey for each class, 0.0 for none, and a little of what it sees."""

    contrast: float = 0.0  # more of what it sees for light classes, and less for dark ones

    @nn.compact
    def __call__(self, x, t, cond, *, train=False):
        greys = self.param("greys", lambda key: jnp.asarray(GREYS, jnp.float32))
        grey = greys[cond.label][:, None, None, None]
        return grey + 0.1 * (1 + self.contrast * grey) * jnp.tanh(x)


def make(prediction="x0", **diffusion):
    config = Config(diffusion=Diffusion(schedule="cosine", prediction=prediction, **diffusion))
    return Diffuser(config, Grey(), make_process("cosine"), SHAPE, ("a", "b", "c"))


def draw(diffuser, sampling, labels=LABELS, *, negative=None, image=None, mask=None, **options):
    params = init_params(diffuser, jax.random.key(0))
    parts = list(generate(diffuser, params, Request(labels, negative, image, mask), sampling, **options))
    return np.concatenate([part.images for part in parts]), parts


def assert_grey(images, greys):
    """Images of these greys [B], and the little that the network sees."""
    assert np.abs(images.reshape(len(greys), -1) - (greys[:, None] * 127.5 + 127.5)).max() <= 0.1 * 127.5 + 1


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
    assert_grey(images, scale * GREYS[LABELS])


def test_guidance_of_one_costs_one_evaluation_a_row_and_is_what_the_others_tend_to():
    plain, _ = draw(make(), Sampling(num_steps=5, guidance_scale=1.0))
    near, _ = draw(make(), Sampling(num_steps=5, guidance_scale=1.0 + 1e-6))
    assert_close(near, plain)


def test_guidance_leads_away_from_the_negative_class():
    sampling, sampler = Sampling(num_steps=5, guidance_scale=2.0), make_sampler(make())
    drawn = lambda negative: draw(make(), sampling, negative=negative, draw=sampler)[0]  # noqa: E731
    for negative in ((LABELS + 1) % 3, (LABELS + 2) % 3, LABELS):
        assert_grey(drawn(negative), GREYS[negative] + 2 * (GREYS[LABELS] - GREYS[negative]))
    np.testing.assert_array_equal(drawn(np.full(20, make().null_label)), drawn(None))


def test_guidance_stays_within_its_noise_levels():
    sampler = make_sampler(make())

    def within(*interval, scale=3.0):
        sampling = Sampling(num_steps=5, guidance_scale=scale, guidance_interval=interval or None)
        return draw(make(), sampling, draw=sampler)[0]

    never = within(scale=1.0)
    assert_close(within(0.0, 1e-6), never)
    np.testing.assert_array_equal(within(0.0, np.inf), within())
    assert_grey(within(0.0, 1.0), 3 * GREYS[LABELS])  # the last prediction is the image
    assert_grey(within(1.0, np.inf), GREYS[LABELS])
    assert not np.array_equal(within(1.0, np.inf), never)


def test_rescaled_guidance_has_the_contrast_of_none():
    """In one step, so that all predict from the same noise."""
    diffuser = make()._replace(model=Grey(contrast=2.0))
    sampler = make_sampler(diffuser, threshold="none")

    def contrast(**options):
        return draw(diffuser, Sampling(num_steps=1, **options), draw=sampler)[0].std((1, 2, 3))

    plain, guided = contrast(), contrast(guidance_scale=3.0)
    half, whole = (contrast(guidance_scale=3.0, guidance_rescale=phi) for phi in (0.5, 1.0))
    np.testing.assert_allclose(whole, plain, atol=0.3)
    np.testing.assert_allclose(half, (plain + guided) / 2, atol=0.3)
    assert (guided - plain)[LABELS == 2].min() > 1


# --- from an image ----------------------------------------------------------------------------------------------------


def test_an_image_is_where_it_starts_with_noise_of_its_own():
    """One step of the network's formula, in batches of which the last is smaller."""
    sampling = Sampling(num_steps=10)
    images, parts = draw(make(), sampling, image=IMAGES, strength=0.1, seed=3, batch_size=8)
    assert [len(part.images) for part in parts] == [8, 8, 4]
    table = check_sampling(make(), sampling, 0.1)
    assert len(table.t) == 1
    x = noised(table, jnp.asarray(IMAGES), example_keys(jax.random.key(3), jnp.arange(20)))
    assert_close(images, np.asarray(to_uint8(GREYS[LABELS][:, None, None, None] + 0.1 * np.tanh(x))))


def test_little_strength_stays_close_to_the_image_and_all_of_it_forgets_the_image():
    """Under EDM's preconditioning the network only adds to what is best for data of its standard deviation."""
    diffuser = make("edm")
    sampler = make_sampler(diffuser)

    def drawn(strength, image=IMAGES):
        images, _ = draw(diffuser, Sampling(num_steps=50), image=image, strength=strength, draw=sampler)
        return images.astype(int)

    away = [np.abs(drawn(strength) - KEPT).mean() for strength in (0.02, 0.5, 1.0)]
    assert away[0] < 8 < away[1] < away[2]
    assert_close(drawn(1.0), drawn(1.0, -IMAGES))
    assert np.abs(drawn(0.5) - drawn(0.5, -IMAGES)).mean() > 10


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpmpp_2m", "heun", "unipc"])
def test_what_is_masked_is_kept_exactly_and_the_rest_is_drawn(solver):
    for guidance, strength, mask in ((1.0, 1.0, MASKS), (3.0, 0.5, np.float32(MASKS))):
        sampling = Sampling(solver=solver, num_steps=6, guidance_scale=guidance)
        images, _ = draw(make(), sampling, image=IMAGES, mask=mask, strength=strength)
        np.testing.assert_array_equal(images[MASKS], KEPT[MASKS])
        assert np.mean(images[~MASKS] == KEPT[~MASKS]) < 0.1


def test_a_request_s_rows_stay_together_in_batches():
    sampling, sampler = Sampling(solver="ddpm", num_steps=6, guidance_scale=2.0), make_sampler(make("edm"))
    parts = {"negative": (LABELS + 1) % 3, "image": IMAGES, "mask": MASKS}

    def drawn(batch_size, **changed):
        options = {"strength": 0.5, "batch_size": batch_size, "draw": sampler}
        return draw(make("edm"), sampling, **{**parts, **changed}, **options)[0]

    batched = drawn(8)
    assert_close(batched, drawn(20))
    np.testing.assert_array_equal(batched[MASKS], KEPT[MASKS])
    for name, change in {"negative": LABELS, "image": -IMAGES, "mask": ~MASKS}.items():
        changed = parts[name].copy()
        changed[18] = change[18]
        other = drawn(8, **{name: changed})
        assert [i for i in range(20) if not np.array_equal(other[i], batched[i])] == [18]


@pytest.mark.parametrize(
    ("sampling", "options", "said"),
    [
        (Sampling(), {"negative": LABELS}, "choose a guidance_scale other than 1"),
        (Sampling(), {"mask": MASKS}, "are of an image, and there is none"),
        (Sampling(), {"strength": 0.5}, "are of an image, and there is none"),
        (Sampling(), {"image": IMAGES, "strength": 0.0}, r"strength must lie in \(0, 1\]"),
        (Sampling(), {"image": IMAGES, "strength": 1.5}, r"strength must lie in \(0, 1\]"),
        (Sampling(num_steps=4), {"image": IMAGES, "strength": 0.1}, "at least one of the 4 steps"),
        (Sampling(), {"image": np.zeros((20, 8, 8, 1))}, r"\(20, 4, 4, 1\).*not \(20, 8, 8, 1\)"),
        (Sampling(), {"image": IMAGES[:5]}, r"\(20, 4, 4, 1\).*not \(5, 4, 4, 1\)"),
        (Sampling(), {"image": IMAGES, "mask": MASKS[:, :3]}, r"mask.*\(20, 4, 4, 1\).*not \(20, 3, 4, 1\)"),
        (Sampling(guidance_scale=2.0), {"negative": np.arange(30) % 3}, r"negative.*\(20,\).*not \(30,\)"),
    ],
)
def test_a_request_that_does_not_fit_is_told(sampling, options, said):
    with pytest.raises(JaxdiffError, match=said):
        draw(make(), sampling, **options)


# --- solvers ----------------------------------------------------------------------------------------------------------


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


def test_a_sampler_is_compiled_once_for_all_solvers_of_as_many_rows_and_images():
    """A step of two evaluations here and of one there, the last of one in all: 7 rows of 2 images."""
    diffuser = make()
    sampler = make_sampler(diffuser)
    twice = ["heun", "edm", "dpm2", "dpm2_ancestral", "dpmpp_2s_ancestral"]
    solvers = [*((name, 4) for name in twice), *((name, 7) for name in ("dpm_2m", "dpmpp_2m", "dpmpp_2m_sde"))]
    drawn = set()
    for solver, num_steps in solvers:
        sampling = Sampling(solver=solver, num_steps=num_steps)
        assert check_sampling(diffuser, sampling).v.shape == (7, 2)
        drawn.add(draw(diffuser, sampling, draw=sampler, batch_size=8)[0].tobytes())
    assert len(drawn) == 8
    assert sampler._cache_size() == 1


COSINE, FLOW = make_process("cosine"), make_process("flow")


@pytest.mark.parametrize(
    ("process", "options", "table"),
    [
        (COSINE, {"solver": "ddim", "eta": 0.5}, lambda: ddim(make_grid(COSINE, 6), 0.5)),
        (COSINE, {"solver": "ddim", "grid": "karras"}, lambda: ddim(make_grid(COSINE, 6, "karras"))),
        (COSINE, {"solver": "ddpm_large"}, lambda: ddpm(make_grid(COSINE, 6), "large")),
        (COSINE, {"solver": "deis", "order": 2}, lambda: deis(make_grid(COSINE, 6), 2)),
        (COSINE, {"solver": "heun", "s_churn": 2.0}, lambda: heun(make_grid(COSINE, 6), 2.0)),
        (COSINE, {"solver": "heun", "final": "sigma_min"}, lambda: heun(make_grid(COSINE, 6, final="sigma_min"))),
        (COSINE, {"solver": "heun", "frame": "noise"}, lambda: heun(make_grid(COSINE, 6, frame="noise"))),
        (FLOW, {"solver": "ddim", "shift": 3.0}, lambda: ddim(make_grid(FLOW, 6, shift=3.0))),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_the_options_reach_the_table(process, options, table):
    diffuser = make()._replace(process=process)
    got = check_sampling(diffuser, Sampling(num_steps=6, **options))
    jax.tree.map(np.testing.assert_array_equal, got, table())
    default = check_sampling(diffuser, Sampling(solver=options["solver"].removesuffix("_large"), num_steps=6))
    assert jax.tree.map(np.shape, got) != jax.tree.map(np.shape, default) or any(
        not np.array_equal(one, other) for one, other in zip(got, default, strict=True)
    )


def test_strength_leaves_the_last_of_the_rows():
    whole, part = (check_sampling(make(), Sampling(num_steps=10), strength) for strength in (1.0, 0.3))
    jax.tree.map(lambda one, other: np.testing.assert_array_equal(one[-3:], other), whole, part)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"solver": "ddpm", "eta": 0.5}, "eta is no option of the solver 'ddpm'"),
        ({"solver": "ddim", "order": 2}, "order is no option of the solver 'ddim': it has eta"),
        ({"solver": "unipc", "s_churn": 1.0}, "s_churn is no option of the solver 'unipc': it has order"),
        ({"solver": "rk4", "eta": 0.0}, "eta is no option of the solver 'rk4': it has none"),
        ({"solver": "unipc", "order": 4}, "The order of this solver is 1 to 3, not 4"),
        ({"shift": 2.0}, "the flow process alone; it is 2.0"),
        ({"num_steps": 2000}, "between 1 and the process's 1000 timesteps"),
    ],
)
def test_an_option_that_the_solver_or_the_process_does_not_have_is_told(options, said):
    with pytest.raises(JaxdiffError, match=said):
        check_sampling(make(), Sampling(**options))


@pytest.mark.parametrize("class_names", [(), ("a", "b", "c")])
def test_guidance_needs_classes_and_that_they_were_withheld(class_names):
    diffuser = make(condition_dropout=0.0)._replace(class_names=class_names)
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


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"guidance_interval": (0.3, 5.0)}, "need guidance"),
        ({"guidance_rescale": 0.5}, "need guidance"),
        ({"guidance_scale": 2.0, "guidance_interval": (5.0, 0.3)}, "not from 5.0 to 0.3"),
    ],
)
def test_guidance_options_that_would_do_nothing_are_told(options, said):
    with pytest.raises(JaxdiffError, match=said):
        check_sampling(make(), Sampling(**options))
