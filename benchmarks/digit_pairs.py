"""Whether a model of digit pairs draws what a caption says, judged by an SVM that was trained on real digits.

python benchmarks/digit_pairs.py --workdir runs/digit_pairs_text --split test

Draws an image for each of 1,000 captions, of pairs that training never showed (--split test) or of those that it did,
and has the SVM read both halves. One JSON line: how often each half is right, and both, over all and by layout; and
what the SVM makes of real canvases with the same captions, which is the most that a model can reach.
"""

import argparse
import json

import numpy as np
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from jaxdiff.checkpoints import load_run
from jaxdiff.config import override
from jaxdiff.data.digit_pairs import halves, open_digit_pairs, scenes
from jaxdiff.pipelines import Request, generate


def judge(images, shown):
    """For each canvas [N, 16, 16, 1], whether its first and its second half show the digits of a scene: bool [N, 2]."""
    real = load_digits()
    svm = SVC(gamma=0.001).fit(real.data, real.target)
    right = np.zeros((len(images), 2), bool)
    for stacked in (False, True):
        rows = np.array([scene.stacked == stacked for scene in shown])
        for place, half in enumerate(halves(images[rows], stacked)):
            read = svm.predict(half.reshape(len(half), 64) * (16 / 255))
            right[rows, place] = read == [scene[place] for scene, row in zip(shown, rows, strict=True) if row]
    return right


def shares(right, shown):
    """The shares that are told."""
    stacked = np.array([scene.stacked for scene in shown])
    share = lambda rows: round(float(rows.mean()), 4)  # noqa: E731
    return {
        "first_half": share(right[:, 0]),
        "second_half": share(right[:, 1]),
        "both": share(right.all(1)),
        "both_side_by_side": share(right[~stacked].all(1)),
        "both_stacked": share(right[stacked].all(1)),
    }


def main():
    """Draw, judge and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="runs/digit_pairs_text")
    parser.add_argument("--split", default="test", choices=["train", "test"])
    parser.add_argument("--num", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args, rest = parser.parse_known_args()

    diffuser, params, step = load_run(args.workdir)
    sampling = override(diffuser.config.sampling, rest, "digit_pairs.py")
    index = np.arange(args.num)
    real = open_digit_pairs(args.split).read(index)
    shown = scenes(args.split, index)
    request = Request(diffuser.text.tokenizer.encode(real["caption"].tolist()))
    drawn = [part.images for part in generate(diffuser, params, request, sampling, seed=args.seed, batch_size=250)]
    told = {"benchmark": "digit_pairs", "workdir": args.workdir, "step": step, "split": args.split, "num": args.num}
    told |= shares(judge(np.concatenate(drawn), shown), shown)
    told["both_on_real"] = shares(judge(real["image"], shown), shown)["both"]
    print(json.dumps(told | vars(sampling)))


if __name__ == "__main__":
    main()
