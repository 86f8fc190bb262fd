"""Draw samples from a run: python sample.py --workdir runs/digits --labels 3 7 --num 64 --out digits.png.

The i-th image follows the i-th label, the labels repeated as often as needed; a model of captions takes --prompt
"a three left of a seven" instead, and draws as many images of each. Writes a grid as a picture (.png), or images with
their labels or prompts as arrays for scripts (.npz), and prints one JSON line about what it drew.
"""

import json
import sys
import time

import numpy as np
from tqdm import tqdm

from jaxdiff import hosts
from jaxdiff.checkpoints import load_run
from jaxdiff.cli import (
    default_columns,
    describe_samplers,
    make_request,
    parse_sample_options,
    prompt_arrays,
    told_in_a_sentence,
)
from jaxdiff.images import save_animation, save_arrays, save_image
from jaxdiff.pipelines import check_sampling, generate

FRAMES = 60  # of an animation, at most


@told_in_a_sentence
def main(args: list[str]) -> int:
    """Sample, and return the exit status."""
    options = parse_sample_options(args, description=__doc__)
    if options.list:
        print(describe_samplers())
        return 0
    hosts.join(options.hosts)
    diffuser, params, step = load_run(options.workdir, options.checkpoint)
    request = make_request(diffuser, options)
    columns = options.columns or default_columns(diffuser, options)

    began = time.perf_counter()
    images, frames = [], []
    with tqdm(total=options.num, unit="image", disable=None if hosts.is_leader() else True) as progress:
        for part in generate(
            diffuser,
            params,
            request,
            options.sampling,
            strength=options.strength,
            seed=options.seed,
            batch_size=options.batch_size,
            frames=FRAMES if options.animation else 0,
        ):
            images.append(part.images)
            frames.append(part.frames)
            progress.update(len(part.images))
    images = np.concatenate(images)
    seconds = time.perf_counter() - began
    if not hosts.is_leader():
        return 0

    if options.out.endswith(".npz"):
        save_arrays(options.out, images=images, **prompt_arrays(diffuser, request.prompt))
    else:
        save_image(images, options.out, columns)
    if options.animation:
        save_animation(np.concatenate(frames, axis=1), options.animation, columns)
    told = {
        "out": options.out,
        "images": len(images),
        "step": step,
        "seed": options.seed,
        **vars(options.sampling),
        "evaluations": len(check_sampling(diffuser, options.sampling, options.strength).t),
        "seconds": round(seconds, 2),
        "images_per_second": round(len(images) / seconds, 1),
    }
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
