"""Prompts in, images out: a trained model of captions as one function."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import UInt8

from jaxdiff.checkpoints import load_run
from jaxdiff.config import validate
from jaxdiff.errors import JaxdiffError
from jaxdiff.pipelines import Diffuser, Request, generate, make_sampler
from jaxdiff.text import Tokens


class TextToImage(NamedTuple):
    """A trained model of captions, in pixels or in a latent space.

        text_to_image = TextToImage.load("runs/fashion_mnist_latent_text")
        images = text_to_image(["a photo of an ankle boot", "trousers, grey"], guidance_scale=4, seed=1)

    Encoding the prompts, the guided scan over the solver's rows and decoding the latents are one compiled call, `draw`,
    which every call with tables and batches of the same shapes shares.
    """

    diffuser: Diffuser
    params: dict[str, Any]
    draw: Callable

    @classmethod
    def load(cls, workdir: str | Path, checkpoint: str | int = "latest") -> "TextToImage":
        """Read the model of a run, from its checkpoint "latest", "best" or of a step.

        Raises JaxdiffError where there is none, or it reads no prompts.
        """
        diffuser, params, _ = load_run(workdir, checkpoint)
        if diffuser.text is None:
            raise JaxdiffError(f"The model in {workdir} was trained without captions, and takes no prompts.")
        return cls(diffuser, params, make_sampler(diffuser, threshold=diffuser.config.sampling.threshold))

    def __call__(
        self,
        prompts: str | Sequence[str],
        negative: str | Sequence[str] | None = None,
        *,
        seed: int = 0,
        batch_size: int = 128,
        **sampling: Any,
    ) -> UInt8[np.ndarray, "N H W C"]:
        """Draw an image for each prompt, in batches over this host's devices.

        prompts: a text, or N of them; repeat one to draw it more than once. negative: what guidance leads away from
        instead of from nothing, one text or N. seed: the i-th image depends on it, i and the i-th prompt alone.
        sampling: options of `jaxdiff.config.Sampling` in the place of the run's: solver, num_steps, guidance_scale ...
        Raises JaxdiffError for a prompt longer than the model's context (a token that the tokenizer does not know does
        not exist: every text can be written in bytes), a number of negative prompts that does not fit, and options that
        do not exist or can not be.
        """
        config = self.diffuser.config
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise JaxdiffError("There is nothing to draw: give at least one prompt.")
        away = [negative] * len(prompts) if isinstance(negative, str) else negative
        try:
            options = validate(replace(config.sampling, **sampling))
        except TypeError as error:  # of dataclasses.replace, for a name that is none
            raise JaxdiffError(f"{error}: the options are {', '.join(vars(config.sampling))}.") from error
        request = Request(self._tokens(prompts), None if away is None else self._tokens(list(away)))
        draw = self.draw if options.threshold == config.sampling.threshold else None
        drawn = generate(self.diffuser, self.params, request, options, seed=seed, batch_size=batch_size, draw=draw)
        return np.concatenate([part.images for part in drawn])

    def _tokens(self, texts: list[str]) -> Tokens:
        return jax.tree.map(np.asarray, self.diffuser.text.tokenizer.encode(texts))
