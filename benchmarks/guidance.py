"""What guidance trades: how often a classifier reads the asked class, and how much images of a class differ, by scale.

python benchmarks/guidance.py --workdir runs/fashion_mnist_latent_text --classifier runs/fashion_mnist_classifier.npz \
    --num 1000 --scales 0 1 2 3 4 6 8 --picture guidance.png

Draws as many images of each class for every scale, from the same noise, by captions or by labels as the model takes
them. A JSON line a scale, and one for the real test images (--data, --data-dir), which are what both are compared to.
Options of sampling (--solver unipc --num-steps 20) hold for all scales. --keep FOLDER keeps what was drawn, and a run
with the same options takes it from there; --from-lines draws the picture again.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from jaxdiff.checkpoints import load_run
from jaxdiff.cli import told_in_a_sentence
from jaxdiff.config import override
from jaxdiff.data import open_dataset
from jaxdiff.data.captions import NUM_VARIANTS, describe
from jaxdiff.errors import JaxdiffError
from jaxdiff.images import save_arrays, to_float
from jaxdiff.models.classifier import judge, load_classifier
from jaxdiff.pipelines import Request, check_sampling, guidance_of, make_sampler
from jaxdiff.sampling import example_keys


def read(classifier, images, batch_size=250):
    """The classes that the classifier reads [N], and its features [N, F], of uint8 images."""
    seen = [
        judge(classifier.model, classifier.params, to_float(images[i : i + batch_size]))
        for i in range(0, len(images), batch_size)
    ]
    return np.concatenate([out.logits for out in seen]).argmax(1), np.concatenate([out.features for out in seen])


def within_class_variance(x, labels):
    """The variance of each number within a class, averaged over numbers and classes; x is [N, ...]."""
    flat = x.reshape(len(x), -1).astype(np.float64)
    return float(np.mean([flat[labels == label].var(0, ddof=1).mean() for label in np.unique(labels)]))


def measure(classifier, images, labels):
    """What a JSON line tells of images uint8 [N, H, W, C] that were asked to be of `labels` [N]."""
    found, features = read(classifier, images)
    right = found == labels
    names = classifier.class_names
    return {
        "num": len(images),
        "agreement": round(float(right.mean()), 4),
        "diversity": round(within_class_variance(to_float(images), labels), 5),
        "feature_diversity": round(within_class_variance(features, labels), 5),
        "by_class": {names[i]: round(float(right[labels == i].mean()), 4) for i in np.unique(labels)},
    }


def prompts_for(diffuser, classifier, labels):
    """Labels as they are, or a caption for each: the ways to say a class in turn."""
    if diffuser.image_shape != classifier.image_shape:  # which it would read too, and understand nothing
        raise JaxdiffError(
            f"The classifier reads {classifier.image_shape}, and the model draws {diffuser.image_shape}."
        )
    class_names = classifier.class_names
    if diffuser.text is None:
        if diffuser.class_names != class_names:
            raise JaxdiffError(f"The classifier knows {class_names}, and the model draws {diffuser.class_names}.")
        return labels
    turns = np.arange(len(labels)) // len(class_names) % NUM_VARIANTS
    texts = [describe(class_names[label], int(turn)) for label, turn in zip(labels, turns, strict=True)]
    return diffuser.text.tokenizer.encode(texts)


def make_drawing(diffuser, params, sampling, prompt, batch_size):
    """draw(scale, seed) -> images uint8 [N, H, W, C]: one compiled program for all scales, 1 included."""
    guided = replace(sampling, guidance_scale=2.0)  # any but 1, which would be another program
    table, guidance = check_sampling(diffuser, guided), guidance_of(guided)
    sampler = make_sampler(diffuser, threshold=sampling.threshold)
    num = len(jax.tree.leaves(prompt)[0])
    batch_size = min(batch_size, num)

    def draw(scale, seed):
        images = []
        for begin in range(0, num, batch_size):
            index = np.minimum(np.arange(begin, begin + batch_size), num - 1)
            request = Request(jax.tree.map(lambda rows, index=index: rows[index], prompt))
            keys = example_keys(jax.random.key(seed), index)
            drawn = sampler(params, table, keys, request, guidance._replace(scale=float(scale)))
            images.append(np.asarray(drawn.images))
        return np.concatenate(images)[:num]

    return draw


def kept(folder, scale, draw):
    """The images of a scale that a folder keeps, drawn now if it does not yet; without a folder, drawn."""
    if folder is None:
        return draw()
    path = Path(folder) / f"scale_{scale:g}.npz"
    if not path.exists():
        save_arrays(path, images=draw())
    with np.load(path) as content:
        return content["images"]


def lines_from(path):
    """The JSON lines that an earlier run printed; other lines, such as warnings, are passed over."""
    if not Path(path).is_file():
        raise JaxdiffError(f"There is no file {path}.")
    lines = [json.loads(line) for line in Path(path).read_text().splitlines() if line.startswith("{")]
    if {line.get("images") for line in lines} != {"real", "drawn"}:
        raise JaxdiffError(f"{path} needs the lines that this script prints, of real and of drawn images.")
    return lines


def real_images(classifier, dataset, each):
    """The first `each` test images of every class, and their labels."""
    if dataset.class_names != classifier.class_names:
        raise JaxdiffError(f"The classifier knows {classifier.class_names}, and --data has {dataset.class_names}.")
    test = dataset.read(np.arange(dataset.size))
    rows = [np.flatnonzero(test["label"] == i)[:each] for i in range(len(classifier.class_names))]
    return tuple(test[name][np.concatenate(rows)] for name in ("image", "label"))


def save_picture(lines, path):
    """Draw agreement and diversity against the scale, the real images' as dashed lines."""
    try:
        import matplotlib
    except ImportError as error:
        raise JaxdiffError('The picture needs matplotlib: pip install -e ".[plots]".') from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    real = next(line for line in lines if line["images"] == "real")
    drawn = sorted((line for line in lines if line["images"] == "drawn"), key=lambda line: line["guidance_scale"])
    scales = [line["guidance_scale"] for line in drawn]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.plot(scales, [100 * line["agreement"] for line in drawn], "o-")
    left.axhline(100 * real["agreement"], linestyle="--", color="grey", label="real test images")
    left.set(xlabel="guidance_scale", ylabel="%", title="the classifier reads the asked class", ylim=(0, 102))
    for name, label in (("diversity", "of pixels"), ("feature_diversity", "of the classifier's features")):
        right.plot(scales, [line[name] / real[name] for line in drawn], "o-", label=label)
    right.axhline(1.0, linestyle="--", color="grey", label="real test images")
    right.set(xlabel="guidance_scale", ylabel="share of the real", title="variance within a class")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


@told_in_a_sentence
def main(argv):
    """Draw, judge and tell; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="runs/fashion_mnist_latent_text")
    parser.add_argument("--classifier", default="runs/fashion_mnist_classifier.npz")
    parser.add_argument("--scales", type=float, nargs="+", default=[0, 0.5, 1, 1.5, 2, 3, 4, 5, 6, 8])
    parser.add_argument("--num", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--data", default="fashion_mnist")
    parser.add_argument("--data-dir")
    parser.add_argument("--keep", help="a folder for what is drawn, for another classifier to judge the same images")
    parser.add_argument("--picture")
    parser.add_argument("--from-lines")
    args, rest = parser.parse_known_args(argv)

    if args.from_lines:
        if not args.picture:
            raise JaxdiffError("--from-lines draws a picture: say where to by --picture FILE.png.")
        save_picture(lines_from(args.from_lines), args.picture)
        return 0
    if any(option.startswith("--guidance-scale") for option in rest):
        raise JaxdiffError("--scales has the guidance_scale of each line; there is no --guidance-scale beside it.")
    classifier = load_classifier(args.classifier)
    classes = len(classifier.class_names)
    if args.num < 2 * classes or args.num % classes:  # of one image there is no variance
        raise JaxdiffError(f"--num is equally many images of {classes} classes, two or more of each, not {args.num}.")
    diffuser, params, step = load_run(args.workdir)
    sampling = override(diffuser.config.sampling, rest, "guidance.py")
    labels = np.arange(args.num) % classes
    draw = make_drawing(diffuser, params, sampling, prompts_for(diffuser, classifier, labels), args.batch_size)
    real = real_images(classifier, open_dataset(args.data, "test", data_dir=args.data_dir), args.num // classes)
    lines = [{"benchmark": "guidance", "images": "real", **measure(classifier, *real)}]
    print(json.dumps(lines[0]), flush=True)
    told = {"benchmark": "guidance", "images": "drawn", "workdir": args.workdir, "step": step, "seed": args.seed}
    told |= vars(sampling)
    for scale in args.scales:
        images = kept(args.keep, scale, lambda scale=scale: draw(scale, args.seed))
        lines.append(told | {"guidance_scale": scale, **measure(classifier, images, labels)})
        print(json.dumps(lines[-1]), flush=True)
    if args.picture:
        save_picture(lines, args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
