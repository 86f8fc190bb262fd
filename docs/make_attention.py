"""Draw where a model of captions looks for each word: python docs/make_attention.py --workdir runs/digit_pairs_text.

Draws an image for a prompt, noises it to a few levels and averages the attention maps there. One row a prompt: the
image, then its map for each word, brighter where the network looks for it more than elsewhere.
"""

import argparse
import re

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw

from jaxdiff import node_at
from jaxdiff.checkpoints import load_run
from jaxdiff.images import to_float
from jaxdiff.pipelines import Request, attention_maps, generate

ZOOM, GAP = 6, 8
TIMES = (300, 500, 700, 850)


def word_maps(diffuser, params, image, prompt):
    """(words, maps [W, H, W]) of one image uint8 [H, W, C]: a word's bytes together, over the map's own mean."""
    tokens = diffuser.text.tokenizer.encode([prompt] * len(TIMES))
    noise = jax.random.normal(jax.random.key(0), (len(TIMES), *image.shape))
    t = jnp.float32(TIMES)
    node = node_at(diffuser.process, t)
    wide = lambda c: c[:, None, None, None]  # noqa: E731
    maps = attention_maps(diffuser, params, wide(node.alpha) * to_float(image) + wide(node.sigma) * noise, t, tokens)
    by_token = np.asarray(maps.mean(0))
    words, drawn = [], []
    for match in re.finditer(r"\S+", prompt):
        first, last = (len(prompt[:end].encode()) for end in match.span())
        words.append(match[0])
        drawn.append(by_token[1 + first : 1 + last].sum(0))  # after the begin token
    return words, np.array(drawn)


def main():
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="runs/digit_pairs_text")
    parser.add_argument("--out", default="docs/attention.png")
    parser.add_argument("--prompt", nargs="+", default=["a three left of a seven", "an 8 above a 2", "six under nine"])
    args = parser.parse_args()

    diffuser, params, _ = load_run(args.workdir)
    request = Request(diffuser.text.tokenizer.encode(args.prompt))
    images = next(generate(diffuser, params, request, diffuser.config.sampling, seed=1)).images
    side = diffuser.image_shape[0] * ZOOM
    most = max(len(prompt.split()) for prompt in args.prompt)
    canvas = Image.new("L", ((most + 1) * (side + GAP) + GAP, len(images) * (side + 3 * GAP) + GAP), 255)
    draw = ImageDraw.Draw(canvas)
    for row, (prompt, image) in enumerate(zip(args.prompt, images, strict=True)):
        words, maps = word_maps(diffuser, params, image, prompt)
        relative = maps / maps.mean(axis=(1, 2), keepdims=True)
        pictures = [image[..., 0], *np.clip(127 * relative, 0, 255).astype(np.uint8)]
        for column, (word, picture) in enumerate(zip(["", *words], pictures, strict=True)):
            x, y = GAP + column * (side + GAP), GAP + row * (side + 3 * GAP)
            canvas.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST), (x, y))
            draw.text((x, y + side + 2), word, fill=0)
    canvas.save(args.out)


if __name__ == "__main__":
    main()
