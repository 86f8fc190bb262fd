"""Train the classifier by which drawn images are judged, on the real training images alone.

python benchmarks/classifier.py --data-dir ~/tensorflow_datasets --out runs/fashion_mnist_classifier.npz

Some minutes on two CPU cores. One JSON line at the end: accuracy on the real test images, over all and by class.
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdiff.data import batches, open_dataset, prefetched
from jaxdiff.images import to_float
from jaxdiff.models.classifier import Classifier, ImageClassifier, judge, save_classifier


def make_step(model, optimizer):
    """step(params, average, opt_state, batch, i) -> (params, average, opt_state, loss), compiled; i counts from 1."""

    @jax.jit
    def step(params, average, opt_state, batch, i):
        x = to_float(batch["image"])
        target = optax.smooth_labels(jax.nn.one_hot(batch["label"], model.num_classes), 0.05)
        loss_of = lambda params: optax.softmax_cross_entropy(judge(model, params, x).logits, target).mean()  # noqa: E731
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return params, optax.incremental_update(params, average, jnp.maximum(0.01, 1 / i)), opt_state, loss

    return step


def accuracies(classifier, dataset, batch_size=500):
    """The share of images of each class that are judged right, and of all."""
    right, labels = [], []
    for begin in range(0, dataset.size, batch_size):
        batch = dataset.read(np.arange(begin, min(begin + batch_size, dataset.size)))
        logits = judge(classifier.model, classifier.params, to_float(batch["image"])).logits
        right.append(np.asarray(logits).argmax(1) == batch["label"])
        labels.append(batch["label"])
    right, labels = np.concatenate(right), np.concatenate(labels)
    by_class = {name: round(float(right[labels == i].mean()), 4) for i, name in enumerate(classifier.class_names)}
    return round(float(right.mean()), 4), by_class


def main():
    """Train, judge, save and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion_mnist")
    parser.add_argument("--data-dir")
    parser.add_argument("--out", default="runs/fashion_mnist_classifier.npz")
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    began = time.perf_counter()
    train, test = (open_dataset(args.data, split, data_dir=args.data_dir) for split in ("train", "test"))
    steps = round(args.epochs * train.size / args.batch_size)
    model = ImageClassifier(len(train.class_names))
    params = jax.jit(model.init)(jax.random.key(args.seed), jnp.zeros((1, *train.image_shape)))["params"]
    rate = optax.warmup_cosine_decay_schedule(0.0, args.learning_rate, steps // 20, steps)
    optimizer = optax.adamw(rate, b2=0.99, weight_decay=0.05)
    average, opt_state, step = params, optimizer.init(params), make_step(model, optimizer)
    source = prefetched(batches(train, args.batch_size, seed=args.seed))
    for i, batch in zip(range(1, steps + 1), source, strict=False):
        params, average, opt_state, loss = step(params, average, opt_state, batch, i)
        if i % 500 == 0:
            print(f"step {i}/{steps}  loss {loss:.4f}  {time.perf_counter() - began:.0f} s", flush=True)
    source.close()
    classifier = Classifier(model, jax.device_get(average), train.class_names, train.image_shape)
    save_classifier(args.out, classifier)
    accuracy, by_class = accuracies(classifier, test)
    told = {"benchmark": "classifier", "data": args.data, "out": args.out, "steps": steps, "test_images": test.size}
    told |= {"accuracy": accuracy, "by_class": by_class, "parameters": sum(x.size for x in jax.tree.leaves(params))}
    print(json.dumps(told | {"seconds": round(time.perf_counter() - began, 1)}))


if __name__ == "__main__":
    main()
