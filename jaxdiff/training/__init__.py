"""Training: one pytree of state, one pure step, one loop around them."""

from jaxdiff.training.loop import fit
from jaxdiff.training.state import TrainState, init_state, make_optimizer
from jaxdiff.training.step import make_eval_loss, make_train_step

__all__ = ["TrainState", "fit", "init_state", "make_eval_loss", "make_optimizer", "make_train_step"]
