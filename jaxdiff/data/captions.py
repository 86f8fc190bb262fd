"""Captions for images of classes: templates around a class's name or a synonym, a pure function of the index."""

import numpy as np

from jaxdiff.data.dataset import ImageDataset
from jaxdiff.errors import JaxdiffError
from jaxdiff.text import Tokenizer

SYNONYMS = {  # of tensorflow-datasets' class names; any other class is called by its name
    "T-shirt/top": ("a T-shirt", "a top", "a tee"),
    "Trouser": ("trousers", "a pair of trousers", "pants"),
    "Pullover": ("a pullover", "a sweater", "a jumper"),
    "Dress": ("a dress", "a gown", "a frock"),
    "Coat": ("a coat", "a jacket", "an overcoat"),
    "Sandal": ("a sandal", "an open shoe", "a summer sandal"),
    "Shirt": ("a shirt", "a blouse", "a buttoned shirt"),
    "Sneaker": ("a sneaker", "a trainer", "a sports shoe"),
    "Bag": ("a bag", "a handbag", "a purse"),
    "Ankle boot": ("an ankle boot", "a boot", "a short boot"),
}

TEMPLATES = (
    "{}",
    "a photo of {}",
    "a picture of {}",
    "a grey image of {}",
    "this is {}",
    "{}, grey",
    "{} on black",
    "an article of clothing: {}",
)
_ANY_CLASS = 7  # the last template suits clothes alone
NUM_VARIANTS = len(TEMPLATES) * 3


def with_article(name: str) -> str:
    """A class's name in lower case with "a" or "an" before it."""
    name = name.lower().replace("_", " ")
    return f"{'an' if name[:1] in tuple('aeiou8') else 'a'} {name}"


def describe(class_name: str, variant: int) -> str:
    """The caption of a class in one of `NUM_VARIANTS` ways: every template with every synonym in turn."""
    names = SYNONYMS.get(class_name) or (with_article(class_name),)
    templates = TEMPLATES if class_name in SYNONYMS else TEMPLATES[:_ANY_CLASS]
    return templates[variant % len(templates)].format(names[variant // len(templates) % len(names)])


def uncaptioned(dataset: ImageDataset) -> ImageDataset:
    """The same examples without captions."""
    if not dataset.captions:
        return dataset

    def read(indices: np.ndarray) -> dict[str, np.ndarray]:
        batch = dataset.read(indices)
        del batch["caption"]
        return batch

    return dataset._replace(read=read, captions=False)


def tokenized(dataset: ImageDataset, tokenizer: Tokenizer) -> ImageDataset:
    """The same examples with "tokens" and "mask" [B, L] in the place of captions, which are cut where too long."""

    def read(indices: np.ndarray) -> dict[str, np.ndarray]:
        batch = dataset.read(indices)
        tokens, mask = tokenizer.encode(batch.pop("caption").tolist(), truncate=True)
        return batch | {"tokens": tokens, "mask": mask}

    return dataset._replace(read=read, captions=False)


def captioned(dataset: ImageDataset) -> ImageDataset:
    """The same images with captions, each as often as there are ways to say it: an example for every pair of the two.

    Raises JaxdiffError where the data set has no classes to speak of.
    """
    if not dataset.class_names:
        raise JaxdiffError("Captions from templates need images with classes, and these have none.")

    def read(indices: np.ndarray) -> dict[str, np.ndarray]:
        variants, images = np.divmod(np.asarray(indices), dataset.size)
        batch = dataset.read(images)
        names = [dataset.class_names[label] for label in batch["label"]]
        captions = [describe(name, variant) for name, variant in zip(names, variants.tolist(), strict=True)]
        return batch | {"caption": np.array(captions, object)}

    return dataset._replace(read=read, size=dataset.size * NUM_VARIANTS, captions=True)
