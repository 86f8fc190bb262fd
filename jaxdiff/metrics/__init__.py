"""How far what is drawn is from what is real, measured on features of images; knows no model of diffusion."""

from jaxdiff.metrics.features import (
    PIXELS,
    Extractor,
    classifier_features,
    dataset_features,
    extract,
    inception_features,
)
from jaxdiff.metrics.frechet import Moments, frechet_distance, merge, moments, moments_of
from jaxdiff.metrics.kernel import KernelDistance, kernel_distance
from jaxdiff.metrics.neighbours import Neighbours, neighbours

__all__ = [
    "PIXELS",
    "Extractor",
    "KernelDistance",
    "Moments",
    "Neighbours",
    "classifier_features",
    "dataset_features",
    "extract",
    "frechet_distance",
    "inception_features",
    "kernel_distance",
    "merge",
    "moments",
    "moments_of",
    "neighbours",
]
