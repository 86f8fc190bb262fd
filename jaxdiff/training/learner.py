"""What training knows of a model: its parameters, the losses of examples, what it reads and what it shows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxdiff.config import AutoencoderConfig, Config
from jaxdiff.data import ImageDataset

Params = dict[str, Any]


class Place(NamedTuple):
    """Where examples stand: all that is drawn for them is a function of it, and not of the split over devices.

    key: of the step. index: [B], the examples' places in the whole batch of `batch_size`. step: updates before this
    one. dropout_key: None where nothing is trained: no dropout of any kind then.
    """

    key: jax.Array
    index: jax.Array
    batch_size: int
    step: jax.Array | int = 0
    dropout_key: jax.Array | None = None


class Learner(NamedTuple):
    """A model as training sees it; there is one for each kind of run.

    config: of the run. init: key -> the parameters to train, by part. averaged: the parts that samples are drawn from,
    of which a moving average is kept. frozen: the parts that are taken over from other runs and not trained.
    metrics: the names of what losses gives. losses: (all params, batch, place) -> {"loss": [B], ...}.
    prepare: (data, cache) -> what the losses read of them; with `cache`, what can be worked out once is.
    make_preview: data -> (averaged params -> uint8 [N, H, W, C], to be looked at eight a row).
    """

    config: Config | AutoencoderConfig
    init: Callable[[jax.Array], Params]
    averaged: tuple[str, ...]
    frozen: Params
    metrics: tuple[str, ...]
    losses: Callable[[Params, dict[str, jax.Array], Place], dict[str, jax.Array]]
    prepare: Callable[..., ImageDataset]
    make_preview: Callable[[ImageDataset], Callable[[Params], np.ndarray]]


COLUMNS = 8
"""Images in a row of a picture to look at."""
