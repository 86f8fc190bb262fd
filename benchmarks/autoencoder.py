"""How well an autoencoder's latents keep images it was not trained on, and how they lie once they are scaled.

python benchmarks/autoencoder.py --workdir runs/fashion_mnist_vae

One JSON line on the run's evaluation split: the PSNR in dB of uint8 images against what becomes of them, by the most
likely latents and by drawn ones; numbers of an image for each of its latents; mean and variance of each channel of
drawn latents, scaled by factors that were measured on the training split.
"""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.checkpoints import load_run
from jaxdiff.data import open_dataset
from jaxdiff.images import to_float, to_uint8
from jaxdiff.latents import Autoencoder, decode, draw_latents, latent_shape, measure_scaling, posterior
from jaxdiff.sampling import example_keys


def psnr(images, others):
    """Of uint8 images, in dB: 10 log10(255^2 / mean squared error over all pixels)."""
    return round(float(10 * np.log10(255**2 / np.mean((images.astype(float) - others) ** 2))), 3)


def main():
    """Encode, decode and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="runs/fashion_mnist_vae")
    parser.add_argument("--data-dir", help="in the place of the run's")
    parser.add_argument("--num", type=int, default=10_000)
    args = parser.parse_args()

    autoencoder, params, step = load_run(args.workdir, kind=Autoencoder)
    data = autoencoder.config.data
    options = {"data_dir": args.data_dir or data.data_dir, "image_size": data.image_size, "channels": data.channels}
    train, test = (open_dataset(data.name, split, **options) for split in (data.split, data.eval_split))
    encode = jax.jit(lambda images: posterior(autoencoder.model, params, to_float(images)))
    params["latents"] = measure_scaling(lambda index: encode(train.read(index)["image"]), train.size)

    @jax.jit
    def rebuild(images, keys):
        gaussian = posterior(autoencoder.model, params, to_float(images))
        likely, drawn = draw_latents(params, gaussian), draw_latents(params, gaussian, keys)
        return drawn, *(to_uint8(decode(autoencoder.model, params, z)) for z in (likely, drawn))

    index = np.arange(min(args.num, test.size))
    images = test.read(index)["image"]
    parts = [
        rebuild(images[rows], example_keys(jax.random.key(0), jnp.asarray(rows)))
        for rows in np.array_split(index, -(-len(index) // 250))
    ]
    latents, likely, drawn = (np.concatenate(part) for part in zip(*parts, strict=True))
    shape = latent_shape(autoencoder.model, autoencoder.image_shape)
    told = {"benchmark": "autoencoder", "workdir": args.workdir, "step": step, "split": data.eval_split}
    told |= {"num": len(index), "latent_shape": shape, "times_fewer": np.prod(images.shape[1:]) / np.prod(shape)}
    told |= {"psnr": psnr(images, likely), "psnr_of_drawn_latents": psnr(images, drawn)}
    told |= {
        "latent_mean": latents.mean((0, 1, 2)).round(4).tolist(),
        "latent_variance": latents.var((0, 1, 2)).round(4).tolist(),
    }
    print(json.dumps(told | {name: x.round(5).tolist() for name, x in params["latents"].items()}))


if __name__ == "__main__":
    main()
