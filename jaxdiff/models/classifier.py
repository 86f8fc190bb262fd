"""A small convolutional classifier of small images, by which drawn ones are judged; not a diffusion network."""

from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from jaxdiff.errors import JaxdiffError
from jaxdiff.models.layers import GroupNorm, check_sides, conv3x3, space_to_depth
from jaxdiff.models.unet import ResnetBlock


class ClassifierOutput(NamedTuple):
    """features: what images are compared by. logits: unnormalised log-probabilities of the classes."""

    features: Float[Array, "B F"]
    logits: Float[Array, "B K"]


class ImageClassifier(nn.Module):
    """Images [B, H, W, C] in [-1, 1], of sides that divide by 4, to features [B, F] and logits [B, num_classes].

    Residual blocks (He et al. 2016) at a half and a quarter of the size, a mean over space, two dense layers. Groups of
    channels are normalised and not the batch, so that an image is judged by itself.

    num_classes: of the logits.
    channels: width at a half and at a quarter of the size.
    num_features: F.
    """

    num_classes: int
    channels: tuple[int, int] = (64, 128)
    num_features: int = 128

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> ClassifierOutput:
        """Judge. Raises JaxdiffError where the sides do not divide by 4."""
        check_sides("An ImageClassifier", x, levels=2, patch_size=2)
        x = conv3x3(self.channels[0], name="conv_in", dtype=x.dtype)(space_to_depth(x, 2))
        x = ResnetBlock(self.channels[0], name="block_0")(x)
        x = nn.Dense(self.channels[1], name="downsample")(space_to_depth(x, 2))
        for i in (1, 2):
            x = ResnetBlock(self.channels[1], name=f"block_{i}")(x)
        x = nn.silu(GroupNorm(name="norm_out")(x)).mean((1, 2))
        features = nn.silu(nn.Dense(self.num_features, name="features")(x))
        return ClassifierOutput(features, nn.Dense(self.num_classes, name="logits")(features))


class Classifier(NamedTuple):
    """A trained classifier: apply it with `judge`. image_shape: [H, W, C]."""

    model: ImageClassifier
    params: dict[str, Any]
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]


@jax.jit(static_argnums=0)
def judge(model: ImageClassifier, params: dict[str, Any], x: Float[Array, "B H W C"]) -> ClassifierOutput:
    """Features and logits of images in [-1, 1]."""
    return model.apply({"params": params}, x)


def save_classifier(path: str | Path, classifier: Classifier) -> None:
    """Write a classifier as an .npz."""
    arrays = {"/".join(name): np.asarray(x) for name, x in flatten_dict(classifier.params).items()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("wb") as file:
        np.savez(
            file,
            class_names=classifier.class_names,
            image_shape=classifier.image_shape,
            channels=classifier.model.channels,
            num_features=classifier.model.num_features,
            **arrays,
        )


def load_classifier(path: str | Path) -> Classifier:
    """Read what `save_classifier` wrote. Raises JaxdiffError where there is no such file or it does not read."""
    if not Path(path).is_file():
        raise JaxdiffError(f"There is no classifier {path}: python benchmarks/classifier.py --out {path} trains one.")
    try:
        with np.load(path) as content:
            arrays = dict(content)
        names, shape, channels = (
            tuple(arrays.pop(name).tolist()) for name in ("class_names", "image_shape", "channels")
        )
        model = ImageClassifier(len(names), channels, arrays.pop("num_features").item())
        params = unflatten_dict({tuple(name.split("/")): x for name, x in arrays.items()})
        like = jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, *shape), np.float32)))["params"]
        fits = jax.tree.map(np.shape, params) == jax.tree.map(lambda x: x.shape, like)
    except Exception as error:  # whatever a damaged file raises in zipfile, NumPy or above
        raise JaxdiffError(f"The classifier {path} is damaged ({error}): train it again.") from error
    if not fits:
        raise JaxdiffError(f"{path} is no classifier of the layout that this version has: train it again.")
    return Classifier(model, params, names, shape)
