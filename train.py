"""Train a diffusion model: python train.py --config configs/digits.py --workdir runs/digits --train.steps 2000.

Every value of the recipe is an option; --help lists them. The same command after an interruption goes on where the run
was. Leaves with status 0 when the run is done, 75 when it was asked to stop and has saved its state, 1 with a sentence
when something is wrong. On several hosts the same command is given to each, with --hosts.auto or where to find them.
"""

import sys

from jaxdiff.cli import parse_train_options, told_in_a_sentence
from jaxdiff.hosts import join
from jaxdiff.training import fit

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: run the same command again


@told_in_a_sentence
def main(args: list[str]) -> int:
    """Train, and return the exit status."""
    options = parse_train_options(args, description=__doc__)
    join(options.hosts)
    step = fit(options.recipe, options.workdir)
    return 0 if step >= options.recipe.train.steps else STOPPED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
