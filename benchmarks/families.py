"""Diffusion against GAN against VAE: the same data, as many parameters, as many seconds of training, several seeds.

python benchmarks/families.py --classifier runs/fashion_mnist_classifier.npz --seconds 180 --seeds 0 1 2

Nothing is told of classes. A JSON line a run: distances by the features of a classifier that was trained on real images
(benchmarks/classifier.py), classes that it reads among what is drawn and their entropy, images/s of sampling, and the
density in bits for a number of an image where the family has one. A run has failed where its loss is no number or fewer
than nine in ten classes are drawn. --table FILE prints the lines of a file as a table. For images of 28x28.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.cli import told_in_a_sentence
from jaxdiff.config import (
    AutoencoderConfig,
    AutoencoderKL,
    Config,
    Diffusion,
    Optimizer,
    Reconstruction,
    Sampling,
    Train,
    UNet,
)
from jaxdiff.data import batches, open_dataset, prefetched
from jaxdiff.errors import JaxdiffError
from jaxdiff.evaluate import compare, measure_bits
from jaxdiff.images import save_image, to_float, to_uint8
from jaxdiff.latents import latent_shape, make_autoencoder, posterior
from jaxdiff.likelihood import bits_per_dim, log_interval
from jaxdiff.metrics import classifier_features, extract
from jaxdiff.models import DiagonalGaussian
from jaxdiff.models.classifier import judge, load_classifier
from jaxdiff.models.layers import GroupNorm, conv3x3, depth_to_space, space_to_depth
from jaxdiff.pipelines import Request, generate, make_diffuser, make_sampler
from jaxdiff.sampling import example_keys
from jaxdiff.training import Learner, autoencoder_learner, diffusion_learner, init_state, make_train_step


class Family(NamedTuple):
    """A kind of generative model.

    learner: how it is trained. draw: (averaged params, num, seed) -> uint8 [num, H, W, C], compiled once.
    bits: (averaged params, data set, num) -> what is known of its density, {} where it has none.
    """

    learner: Learner
    draw: Callable[[Any, int, int], np.ndarray]
    bits: Callable[[Any, Any, int], dict[str, float]]


# --- diffusion ------------------------------------------------------------------------------------------------------


def diffusion(shape, seed, batch_size):
    """The network of configs/fashion_mnist.py without classes, drawn from with UniPC in 20 steps."""
    config = Config(
        model=UNet(
            channels=(128,),
            patch_size=4,
            layers_per_block=1,
            attention_levels=(),
            scale_shift=True,
            class_conditional=False,
        ),
        diffusion=Diffusion(schedule="cosine", prediction="v"),
        optimizer=Optimizer(learning_rate=1e-3, warmup_steps=100, ema_decay=0.998),
        train=Train(batch_size=batch_size, seed=seed),
        sampling=Sampling(solver="unipc", num_steps=20, grid="logsnr"),
    )
    diffuser = make_diffuser(config, shape, ())
    sampler = make_sampler(diffuser)

    def draw(params, num, seed):
        request = Request(np.zeros(num, np.int32))
        parts = generate(diffuser, params, request, config.sampling, seed=seed, batch_size=250, draw=sampler)
        return np.concatenate([part.images for part in parts])

    return Family(
        diffusion_learner(diffuser), draw, lambda params, data, num: measure_bits(diffuser, params, data, num)
    )


# --- VAE ------------------------------------------------------------------------------------------------------------


def vae(shape, seed, batch_size, kl_weight=0.02):
    """AutoencoderKL with 32 latents, drawn from N(0, I); its kl_weight makes the loss a bound on the likelihood.

    With a decoder of variance s^2 the bound is (error / 2 s^2 + divergence) up to a constant, so kl_weight is 2 s^2.
    """
    config = AutoencoderConfig(
        model=AutoencoderKL(latent_channels=2, channels=(128,), patch_size=7, layers_per_block=2),
        reconstruction=Reconstruction(error="l2", kl_weight=kl_weight),
        optimizer=Optimizer(learning_rate=1e-3, warmup_steps=100, ema_decay=0.998),
        train=Train(batch_size=batch_size, seed=seed),
    )
    autoencoder = make_autoencoder(config, shape)
    model = autoencoder.model

    @jax.jit
    def drawn(params, keys):
        z = jax.vmap(lambda key: jax.random.normal(key, latent_shape(model, shape)))(keys)
        return to_uint8(model.apply({"params": params["autoencoder"]}, z, method="decode"))

    @jax.jit
    def bound(params, images, keys):
        x = to_float(images)
        gaussian = posterior(model, params, x)
        mean = model.apply(
            {"params": params["autoencoder"]}, jax.vmap(DiagonalGaussian.sample)(gaussian, keys), method="decode"
        )
        decoded = log_interval(x, mean, (kl_weight / 2) ** 0.5, 256).sum((1, 2, 3))
        return bits_per_dim(decoded - gaussian.kl(), np.prod(shape))

    def bits(params, data, num):
        keys = example_keys(jax.random.key(0), jnp.arange(num))
        found = np.asarray(bound(params, data.read(np.arange(num))["image"], keys), np.float64)
        return {"bound_bits": found.mean(), "bound_bits_error": found.std() / np.sqrt(num)}

    return Family(autoencoder_learner(autoencoder), in_batches(drawn), bits)


# --- GAN ------------------------------------------------------------------------------------------------------------


class Generator(nn.Module):
    """Noise [B, 100] to images [B, 28, 28, C], 7x7 doubled twice (Radford et al. 2016, with sub-pixel convolutions)."""

    channels: int

    @nn.compact
    def __call__(self, z):
        """Draw."""
        x = nn.Dense(7 * 7 * 224, name="project")(z).reshape(-1, 7, 7, 224)
        x = nn.relu(GroupNorm(name="norm_0")(x))
        x = depth_to_space(conv3x3(4 * 64, name="up_0", dtype=x.dtype)(x), 2)
        x = nn.relu(GroupNorm(name="norm_1")(x))
        return jnp.tanh(depth_to_space(conv3x3(4 * self.channels, name="up_1", dtype=x.dtype)(x), 2))


class Discriminator(nn.Module):
    """Images [B, 28, 28, C] to logits [B], halved twice; a dense layer of them has parameters that cost little time."""

    @nn.compact
    def __call__(self, x):
        """Judge."""
        x = nn.leaky_relu(conv3x3(64, name="down_0", dtype=x.dtype)(space_to_depth(x, 2)), 0.2)
        x = nn.leaky_relu(conv3x3(96, name="down_1", dtype=x.dtype)(space_to_depth(x, 2)), 0.2)
        x = nn.leaky_relu(nn.Dense(232, name="dense")(x.reshape(len(x), -1)), 0.2)
        return nn.Dense(1, name="judge")(x)[:, 0]


def gan(shape, seed, batch_size, r1_weight=1.0):
    """A GAN of DCGAN's size, with the hinge loss (Lim & Ye 2017) and the R1 penalty (Mescheder et al. 2018)."""
    config = Config(
        optimizer=Optimizer(learning_rate=5e-4, b1=0.5, b2=0.99, clip_norm=0.0, ema_decay=0.998),
        train=Train(batch_size=batch_size, seed=seed),
    )
    generator, discriminator = Generator(shape[-1]), Discriminator()

    def init(key):
        keys = jax.random.split(key)
        return {
            "generator": generator.init(keys[0], jnp.zeros((1, 100)))["params"],
            "discriminator": discriminator.init(keys[1], jnp.zeros((1, *shape)))["params"],
        }

    def draw_noise(keys):
        return jax.vmap(lambda key: jax.random.normal(key, (100,)))(keys)

    def losses(params, batch, place):
        images = to_float(batch["image"])
        drawn = generator.apply({"params": params["generator"]}, draw_noise(example_keys(place.key, place.index)))
        judge = lambda params, x: discriminator.apply({"params": params}, x)  # noqa: E731
        # two games in one gradient, as in jaxdiff.training.autoencoder
        fooled = -judge(jax.lax.stop_gradient(params["discriminator"]), drawn)
        real, some = judge(params["discriminator"], images), images[: -(-len(images) // 4)]
        slope = jax.grad(lambda x: judge(params["discriminator"], x).sum())(some)  # of a quarter, for it costs the most
        penalty = 0.5 * r1_weight * jnp.sum(slope**2, (1, 2, 3)).mean()
        told_apart = nn.relu(1 - real) + nn.relu(1 + judge(params["discriminator"], jax.lax.stop_gradient(drawn)))
        return {"loss": fooled + told_apart + penalty, "discriminator": told_apart}

    learner = Learner(
        config=config,
        init=init,
        averaged=("generator",),
        frozen={},
        metrics=("loss", "discriminator"),
        losses=losses,
        prepare=lambda data, cache: data,
        make_preview=lambda data: None,
    )
    drawn = jax.jit(lambda params, keys: to_uint8(generator.apply({"params": params["generator"]}, draw_noise(keys))))
    return Family(learner, in_batches(drawn), lambda params, data, num: {})


FAMILIES = {"diffusion": diffusion, "vae": vae, "gan": gan}


def in_batches(drawn, batch_size=250):
    """draw(params, num, seed) from drawn(params, keys [batch_size])."""

    def draw(params, num, seed):
        key = jax.random.key(seed)
        parts = [drawn(params, example_keys(key, i + jnp.arange(batch_size))) for i in range(0, num, batch_size)]
        return np.concatenate(parts)[:num]

    return draw


# --- the race -------------------------------------------------------------------------------------------------------


def train(family, dataset, seconds):
    """The state after so many seconds of steps, those of compiling not counted, and whether its loss is a number."""
    config = family.learner.config
    data = family.learner.prepare(dataset, cache=True)
    source = prefetched(batches(data, config.train.batch_size, seed=config.train.seed))
    state = init_state(family.learner)
    step = jax.jit(make_train_step(family.learner), donate_argnums=0).lower(state, next(source), {}).compile()
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        for _ in range(10):
            state = step(state, next(source), {})
        jax.block_until_ready(state.step)
    source.close()
    return state, not float(state.sums["skipped"])


def measure(name, seed, args, dataset, test, classifier, real):
    """A run of a family, as a JSON line tells it; and a few of its images."""
    family = FAMILIES[name](dataset.image_shape, seed, args.batch_size)
    state, finite = train(family, dataset, args.seconds)
    params = state.ema_params
    told = {"benchmark": "families", "family": name, "seed": seed, "seconds": args.seconds, "steps": int(state.step)}
    told["parameters"] = sum(x.size for x in jax.tree.leaves(state.params))
    family.draw(params, 250, seed)  # compiles
    began = time.perf_counter()
    images = family.draw(params, args.num, seed)
    told["images_per_second"] = round(args.num / (time.perf_counter() - began), 1)
    told |= compare(real, extract(classifier_features(args.classifier), [images]))
    logits = [judge(classifier.model, classifier.params, to_float(part)).logits for part in np.array_split(images, 10)]
    shares = np.bincount(np.concatenate(logits).argmax(1), minlength=len(classifier.class_names)) / args.num
    told["classes"] = int(np.sum(shares > 0.01))
    told["class_entropy_bits"] = float(-np.sum(shares * np.log2(np.maximum(shares, 1e-12))))
    told["failed"] = not finite or told["classes"] < 0.9 * len(shares)
    told |= family.bits(params, test, args.bits_images) if finite and args.bits_images else {}
    return {key: round(value, 5) if isinstance(value, float) else value for key, value in told.items()}, images[:10]


COLUMNS = {
    "frechet": "Frechet distance",
    "kernel": "kernel distance",
    "precision": "precision",
    "recall": "recall",
    "classes": "classes",
    "class_entropy_bits": "their entropy, bits",
    "images_per_second": "images/s drawn",
    "bound_bits": "bits, bound",
    "flow_bits_gaussian": "bits, flow",
}


def table(lines):
    """The lines as a table in Markdown: mean and range over seeds."""
    names = list(dict.fromkeys(line["family"] for line in lines))
    rows = [["", *names], ["---"] * (len(names) + 1)]
    of = {name: [line for line in lines if line["family"] == name] for name in names}
    for column, title in COLUMNS.items():
        row = [title]
        for name in names:
            values = [line[column] for line in of[name] if column in line]
            row.append(f"{np.mean(values):.3g} ({min(values):.3g} to {max(values):.3g})" if values else "none")
        rows.append(row)
    for column, title in (("parameters", "parameters"), ("steps", "steps of training")):
        rows.append([title, *(f"{np.mean([line.get(column, 0) for line in of[name]]):,.0f}" for name in names)])
    failed = lambda name: sum(line.get("failed", False) for line in of[name])  # noqa: E731
    rows.append(["failed runs", *(f"{failed(name)} of {len(of[name])}" for name in names)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


@told_in_a_sentence
def main(argv):
    """Train, measure and tell; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classifier", default="runs/fashion_mnist_classifier.npz")
    parser.add_argument("--data", default="fashion_mnist")
    parser.add_argument("--data-dir")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument("--bits-images", type=int, default=64)
    parser.add_argument("--picture", help="ten images of each run, a row each")
    parser.add_argument("--table", help="a file of lines that this script printed, to be printed as a table")
    args = parser.parse_args(argv)
    if args.table:
        lines = [json.loads(line) for line in Path(args.table).read_text().splitlines() if line.startswith("{")]
        print(table(lines))
        return 0

    dataset, test = (open_dataset(args.data, split, data_dir=args.data_dir) for split in ("train", "test"))
    classifier = load_classifier(args.classifier)
    if dataset.image_shape != classifier.image_shape or dataset.image_shape[:2] != (28, 28):
        raise JaxdiffError(
            f"The networks are of 28x28, the classifier of {classifier.image_shape}, the data of {dataset.image_shape}."
        )
    images = test.read(np.arange(test.size))["image"]
    real = extract(classifier_features(args.classifier), [images])
    some = dataset.read(np.random.default_rng(0).choice(dataset.size, args.num, replace=False))["image"]
    floor = compare(real, extract(classifier_features(args.classifier), [some]))
    print(json.dumps({"benchmark": "families", "family": "training images", "num": args.num, **floor}), flush=True)
    rows = []
    for name in args.families:
        for seed in args.seeds:
            told, row = measure(name, seed, args, dataset, test, classifier, real)
            rows.append(row)
            print(json.dumps(told), flush=True)
    if args.picture:
        save_image(np.concatenate(rows), args.picture, columns=10)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
