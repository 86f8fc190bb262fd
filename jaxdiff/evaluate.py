"""Measure a run: python -m jaxdiff.evaluate --workdir runs/digits --num 1000 --bits-images 256.

Draws images as the data's own classes or captions ask for, compares them with the real ones by each extractor of
features, and tells how many bits the model needs for held-out images. Prints one JSON line.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxdiff import hosts
from jaxdiff.checkpoints import load_run
from jaxdiff.cli import parse_evaluate_options, told_in_a_sentence
from jaxdiff.config import Sampling
from jaxdiff.data import ImageDataset, open_dataset
from jaxdiff.devices import fetch, over_devices, put
from jaxdiff.errors import JaxdiffError
from jaxdiff.guidance import clip_x0, condition
from jaxdiff.images import to_float
from jaxdiff.likelihood import bits_per_dim, flow_log_likelihood, variational_bound
from jaxdiff.metrics import (
    PIXELS,
    Extractor,
    classifier_features,
    dataset_features,
    extract,
    frechet_distance,
    inception_features,
    kernel_distance,
    moments,
    neighbours,
)
from jaxdiff.pipelines import Diffuser, Request, check_sampling, condition_on, conditional_denoiser, generate, prompt_of
from jaxdiff.sampling import example_keys
from jaxdiff.solvers import make_grid
from jaxdiff.training.diffusion import with_prompts


def compare(real: np.ndarray, drawn: np.ndarray, k: int = 5) -> dict[str, float]:
    """All that `jaxdiff.metrics` tells of features [N, F] of real images and [M, F] of drawn ones."""
    kernel = kernel_distance(real, drawn)
    return {
        "frechet": frechet_distance(moments(real), moments(drawn)),
        "kernel": kernel.value,
        "kernel_error": kernel.standard_error,
        **neighbours(real, drawn, k)._asdict(),
    }


def draw(
    diffuser: Diffuser, params: Any, dataset: ImageDataset, sampling: Sampling, num: int, seed: int, batch_size: int
) -> np.ndarray:
    """Images uint8 [num, H, W, C] by the classes or captions of a data set's examples, in turn."""
    prompts = prompt_of(diffuser, with_prompts(diffuser, dataset).read(np.arange(num) % dataset.size))
    parts = generate(diffuser, params, Request(prompts), sampling, seed=seed, batch_size=batch_size)
    images = []
    with tqdm(total=num, unit="image", disable=None) as progress:
        for part in parts:
            images.append(part.images)
            progress.update(len(part.images))
    return np.concatenate(images)


def measure_bits(
    diffuser: Diffuser,
    params: Any,
    dataset: ImageDataset,
    num: int,
    *,
    seed: int = 0,
    batch_size: int = 256,
    num_terms: int = 20,
    rtol: float = 1e-4,
) -> dict[str, float]:
    """Bits a number that a model needs for the first `num` images, given their classes or captions; means and errors.

    "flow_bits_uniform" and "flow_bits_gaussian" are by the probability flow with either dequantisation, each with one
    Hutchinson estimate an image; "bound_bits" is DDPM's bound over all steps of the process (1,000 of a continuous
    one), of which num_terms are drawn for each image. "_error" is the standard error over images.
    Raises JaxdiffError for a model of latents, whose density is not one of images.
    """
    if diffuser.autoencoder:
        raise JaxdiffError("This model draws latents, of which images have no density: leave --bits-images at 0.")
    split, whole = over_devices()
    process, size = diffuser.process, int(np.prod(diffuser.image_shape))
    grid = make_grid(process, process.timesteps or 1000)

    @jax.jit
    def bits(params: Any, images: jax.Array, prompt: Any, keys: jax.Array) -> dict[str, jax.Array]:
        denoise = condition(conditional_denoiser(diffuser, params), condition_on(diffuser, params, prompt))
        x_0 = to_float(images)
        flow = {
            f"flow_bits_{kind}": flow_log_likelihood(
                denoise, process, x_0, keys, dequantisation=kind, rtol=rtol, atol=rtol
            ).log_density
            for kind in ("uniform", "gaussian")
        }
        bound = variational_bound(clip_x0(denoise), grid, x_0, keys, num_terms=min(num_terms, grid.num_steps - 1)).total
        return {name: bits_per_dim(value, size) for name, value in (flow | {"bound_bits": -bound}).items()}

    read = with_prompts(diffuser, dataset).read
    num, params = min(num, dataset.size), put(params, whole)
    batch_size = -(-min(batch_size, num) // jax.device_count()) * jax.device_count()
    found = []
    with tqdm(total=num, unit="image", disable=None) as progress:
        for begin in range(0, num, batch_size):
            index = np.arange(begin, begin + batch_size)
            batch = read(np.minimum(index, num - 1))  # a last batch of the same size, for one compilation
            keys = example_keys(jax.random.key(seed), index)
            rows = put((batch["image"], prompt_of(diffuser, batch), keys), split)
            count = min(batch_size, num - begin)
            found.append({name: value[:count] for name, value in fetch(bits(params, *rows)).items()})
            progress.update(count)
    together = {name: np.concatenate([part[name] for part in found]).astype(np.float64) for name in found[0]}
    told = {name: float(value.mean()) for name, value in together.items()}
    return told | {f"{name}_error": float(value.std() / np.sqrt(num)) for name, value in together.items()}


@told_in_a_sentence
def main(args: Sequence[str]) -> int:
    """Measure, and return the exit status."""
    options = parse_evaluate_options(args, description=__doc__)
    extractors: list[Extractor] = [PIXELS] if options.pixels else []
    extractors += [classifier_features(options.classifier)] if options.classifier else []
    extractors += [inception_features(options.inception)] if options.inception else []
    hosts.join(options.hosts)
    diffuser, params, step = load_run(options.workdir, options.checkpoint)
    data = diffuser.config.data
    split = options.split or data.eval_split or data.split
    source = {"name": data.name, "split": split, "image_size": data.image_size, "channels": data.channels}
    source |= {"data_dir": options.data_dir or data.data_dir}
    dataset = open_dataset(**source)
    if dataset.image_shape != diffuser.image_shape:
        raise JaxdiffError(f"The model draws {diffuser.image_shape}, and the data are {dataset.image_shape}.")

    told = {"workdir": options.workdir, "step": step, "split": split, "seed": options.seed, **vars(options.sampling)}
    if extractors:
        table = check_sampling(diffuser, options.sampling)
        began = time.perf_counter()
        images = draw(diffuser, params, dataset, options.sampling, options.num, options.seed, options.batch_size)
        seconds = time.perf_counter() - began
        told |= {
            "num": len(images),
            "num_real": dataset.size,
            "nfe": len(table.t) * (1 + (options.sampling.guidance_scale != 1)),
        }
        told |= {"seconds": round(seconds, 2), "images_per_second": round(len(images) / seconds, 2)}
        for extractor in extractors:
            real = dataset_features(extractor, dataset, source, Path(options.workdir) / "features")
            told[extractor.name] = compare(real, extract(extractor, [images]), options.k)
    if options.bits_images:
        told |= {"bits_images": min(options.bits_images, dataset.size)}
        told |= measure_bits(
            diffuser,
            params,
            dataset,
            options.bits_images,
            seed=options.seed,
            batch_size=options.batch_size,
            num_terms=options.bound_terms,
            rtol=options.rtol,
        )
    if hosts.is_leader():
        print(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
