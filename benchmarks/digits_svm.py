"""Whether drawn digits are the digits that were asked for, judged by an SVM that was trained on the real ones.

python sample.py --workdir runs/digits --num 1000 --out digits.npz && python benchmarks/digits_svm.py digits.npz

Prints one JSON line: the agreement over all samples and by digit, and the SVM's own on real digits it has not seen.
"""

import json
import sys

import numpy as np
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from jaxdiff.data import open_dataset


def agreement(images: np.ndarray, labels: np.ndarray) -> dict:
    """The judgement on images uint8 [N, 8, 8, 1] that should show labels [N]."""
    real = load_digits()
    judge = SVC(gamma=0.001).fit(real.data, real.target)
    agrees = judge.predict(images.reshape(len(images), 64) * (16 / 255)) == labels
    unseen = open_dataset("digits", "test")
    half = SVC(gamma=0.001).fit(real.data[: -unseen.size], real.target[: -unseen.size])
    return {
        "samples": len(images),
        "agreement": round(float(agrees.mean()), 4),
        "by_digit": [round(float(agrees[labels == digit].mean()), 3) for digit in range(10)],
        "svm_on_unseen_real": round(half.score(real.data[-unseen.size :], real.target[-unseen.size :]), 4),
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("error: give the .npz that sample.py wrote.")
    drawn = np.load(sys.argv[1])
    print(json.dumps(agreement(drawn["images"], drawn["labels"])))
