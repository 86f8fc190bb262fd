"""Training: one pytree of state, one pure step, one loop around them; what is learned is a Learner."""

from jaxdiff.training.autoencoder import autoencoder_learner
from jaxdiff.training.diffusion import diffusion_learner
from jaxdiff.training.learner import Learner, Place
from jaxdiff.training.loop import fit
from jaxdiff.training.state import TrainState, init_state, make_optimizer
from jaxdiff.training.step import make_eval_losses, make_train_step

__all__ = [
    "Learner",
    "Place",
    "TrainState",
    "autoencoder_learner",
    "diffusion_learner",
    "fit",
    "init_state",
    "make_eval_losses",
    "make_optimizer",
    "make_train_step",
]
