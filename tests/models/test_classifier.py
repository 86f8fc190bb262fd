"""The classifier by which images are judged: it learns, judges an image by itself, and is saved and read back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff.data import open_dataset
from jaxdiff.errors import JaxdiffError
from jaxdiff.images import to_float
from jaxdiff.models.classifier import Classifier, ImageClassifier, judge, load_classifier, save_classifier

SMALL = ImageClassifier(10, channels=(32, 32), num_features=16)


@pytest.fixture(scope="module")
def digits():
    batch = open_dataset("digits").read(np.arange(32))
    return to_float(batch["image"]), batch["label"]


@pytest.fixture(scope="module")
def params(digits):
    return SMALL.init(jax.random.key(0), digits[0][:1])["params"]


def test_an_image_is_judged_by_itself(params, digits):
    x = digits[0][:6]
    together, alone = judge(SMALL, params, x), judge(SMALL, params, x[:1])
    assert (together.features.shape, together.logits.shape) == ((6, 16), (6, 10))
    np.testing.assert_allclose(together.logits[:1], alone.logits, atol=1e-5)
    assert float(jnp.abs(together.logits[1] - together.logits[0]).max()) > 1e-3


def test_it_learns_what_it_is_shown(params, digits):
    x, labels = digits
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, opt_state):
        loss_of = lambda p: optax.softmax_cross_entropy_with_integer_labels(  # noqa: E731
            judge(SMALL, p, x).logits, labels
        ).mean()
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state, losses = optimizer.init(params), []
    for _ in range(70):
        params, opt_state, loss = step(params, opt_state)
        losses.append(float(loss))
    assert losses[-1] < 0.2 * losses[0]
    assert np.mean(np.asarray(judge(SMALL, params, x).logits).argmax(1) == labels) > 0.95


def test_it_is_saved_and_read_back(tmp_path):
    model = ImageClassifier(2, channels=(32, 64), num_features=8)
    params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    path = tmp_path / "deep" / "classifier.npz"
    save_classifier(path, Classifier(model, params, ("cat", "dog"), (8, 8, 1)))
    again = load_classifier(path)
    assert (again.model, again.class_names, again.image_shape) == (model, ("cat", "dog"), (8, 8, 1))
    jax.tree.map(np.testing.assert_array_equal, again.params, params)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(JaxdiffError, match="is damaged"):
        load_classifier(path)
    save_classifier(path, Classifier(model, {"norm_out": params["norm_out"]}, ("cat", "dog"), (8, 8, 1)))
    with pytest.raises(JaxdiffError, match="no classifier of the layout"):
        load_classifier(path)
    with pytest.raises(JaxdiffError, match="There is no classifier"):
        load_classifier(tmp_path / "none.npz")


def test_images_that_do_not_halve_twice_are_told(params):
    with pytest.raises(JaxdiffError, match="divide by 4"):
        judge(SMALL, params, jnp.zeros((1, 10, 8, 1)))
