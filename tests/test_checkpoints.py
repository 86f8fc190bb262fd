"""Runs on disk: saved and read back exactly; damage is told, names the folder, and costs nothing that was intact."""

import json
import shutil

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from jaxdiff import checkpoints as ckpt
from jaxdiff.config import Config, Data, Train, UNet
from jaxdiff.errors import JaxdiffError

STATE = {"a": {"w": np.arange(12, dtype=np.float32).reshape(3, 4), "n": np.int32(7)}, "b": (np.float32(0.1),)}
EMA = {"w": np.linspace(-1, 1, 5, dtype=np.float32)}
CONFIG = Config(model=UNet(channels=(8,), num_groups=4, layers_per_block=1, attention_levels=(), mid_attention=False))


def save_all(workdir, losses, keep=10):
    checkpoints = ckpt.open_checkpoints(workdir, keep)
    for step, loss in losses.items():
        ckpt.save(checkpoints, step, {"state": STATE, "ema_params": EMA}, loss)
    checkpoints.close()


def steps_in(folder):
    return sorted(int(path.name) for path in folder.iterdir())


@pytest.fixture
def three(tmp_path):
    """A folder with checkpoints 5, 10 (the best) and 15."""
    save_all(tmp_path, {5: 0.3, 10: 0.1, 15: 0.2})
    return tmp_path


def read(workdir, step):
    return ckpt.restore(ckpt.folder_of(workdir), step, {"state": STATE, "ema_params": EMA})


def assert_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.asarray(a).dtype == np.asarray(b).dtype
        np.testing.assert_array_equal(a, b)


def test_a_state_is_read_back_exactly(three):
    for step in (5, 10, 15):
        assert_equal(read(three, step), {"state": STATE, "ema_params": EMA})


def test_one_part_is_read_without_the_other(three):
    shutil.rmtree(three / "checkpoints" / "10" / "state")
    checkpoints = ckpt.folder_of(three)
    assert_equal(ckpt.restore(checkpoints, 10, {"ema_params": EMA}), {"ema_params": EMA})
    with pytest.raises(JaxdiffError, match="damaged"):
        read(three, 10)


def test_other_shapes_are_refused(three):
    checkpoints = ckpt.folder_of(three)
    with pytest.raises(JaxdiffError, match="damaged"):
        ckpt.restore(checkpoints, 10, {"ema_params": {"w": np.zeros(6, np.float32)}})
    with pytest.raises(JaxdiffError, match="damaged"):
        ckpt.restore(checkpoints, 10, {"ema_params": {"v": np.zeros(5, np.float32)}})


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 3, len(content), max(len(content) // 7, 1)):
        content[place] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [cut, empty, flip, lambda path: path.unlink()], ids=["cut", "empty", "flip", "delete"])
def test_damage_to_any_file_is_told_or_harmless(harm, three):
    """Never a wrong array: either the sentence that names the folder, or what was saved."""
    whole = three / "checkpoints" / "10"
    said = []
    for path in [path for path in sorted(whole.rglob("*")) if path.is_file()]:
        backup = shutil.copytree(whole, three / "backup")
        harm(path)
        remains = sorted(p.relative_to(whole) for p in whole.rglob("*"))
        try:
            assert_equal(read(three, 10), {"state": STATE, "ema_params": EMA})
        except JaxdiffError as error:
            said.append(str(error))
        assert sorted(p.relative_to(whole) for p in whole.rglob("*")) == remains
        shutil.rmtree(whole)
        shutil.move(backup, whole)
    assert len(said) >= 3
    for sentence in said:
        assert sentence.startswith(f"The checkpoint {whole} is damaged (")
        assert sentence.endswith("delete that folder to go on from another; there are also 5, 15.")
        assert "\n" not in sentence


def test_an_array_that_reads_but_is_another_is_told(three):
    """A file exchanged for an intact one of other content, which no format notices."""
    checkpoints = ckpt.open_checkpoints(three / "other")
    ckpt.save(checkpoints, 10, {"state": STATE, "ema_params": {"w": EMA["w"] + 1}}, 0.1)
    checkpoints.close()
    whole = three / "checkpoints" / "10"
    shutil.rmtree(whole / "ema_params")
    shutil.copytree(three / "other" / "checkpoints" / "10" / "ema_params", whole / "ema_params")
    with pytest.raises(JaxdiffError, match="its checksum differs"):
        read(three, 10)


def test_an_emptied_checkpoint_is_told(three):
    whole = three / "checkpoints" / "10"
    shutil.rmtree(whole)
    whole.mkdir()
    with pytest.raises(JaxdiffError, match=r"damaged|no checkpoint 10"):
        read(three, 10)
    assert whole.is_dir()


def test_which_checkpoint(three):
    checkpoints = ckpt.folder_of(three)
    assert [ckpt.choose_step(checkpoints, which) for which in ("latest", "best", "5", 10)] == [15, 10, 5, 10]
    for which in ("7", "newest", "-5"):
        with pytest.raises(JaxdiffError, match=rf"no checkpoint {which} .*\[5, 10, 15\]"):
            ckpt.choose_step(checkpoints, which)


def test_a_checkpoint_without_a_loss_is_never_the_best(tmp_path):
    save_all(tmp_path, {5: None, 10: 0.5, 15: None}, keep=1)
    checkpoints = ckpt.folder_of(tmp_path)
    assert steps_in(checkpoints) == [10, 15]
    assert ckpt.choose_step(checkpoints, "best") == 10


def test_the_best_is_the_newest_where_there_are_no_losses(tmp_path):
    save_all(tmp_path, {5: None, 10: None})
    checkpoints = ckpt.folder_of(tmp_path)
    assert ckpt.choose_step(checkpoints, "best") == 10


def test_the_newest_and_the_best_are_kept(tmp_path):
    save_all(tmp_path, {5: 0.3, 10: 0.1, 15: 0.4, 20: 0.2, 25: 0.5}, keep=2)
    checkpoints = ckpt.folder_of(tmp_path)
    assert steps_in(checkpoints) == [10, 20, 25]


def test_the_best_is_kept_by_the_next_process(tmp_path):
    save_all(tmp_path, {5: 0.1, 10: 0.3}, keep=1)
    save_all(tmp_path, {15: 0.4, 20: 0.5}, keep=1)
    checkpoints = ckpt.folder_of(tmp_path)
    assert steps_in(checkpoints) == [5, 20]
    assert ckpt.choose_step(checkpoints, "best") == 5


def test_only_the_loop_asks_jax_for_preemptions(monkeypatch, tmp_path):
    asked = []  # with a smaller number, from Orbax's thread, hosts that run ahead would agree on a step gone by
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
    save_all(tmp_path, {5: 0.3, 10: 0.1})
    assert not asked


def test_the_checksum_sees_every_byte_and_every_name():
    base = ckpt.checksum(STATE)
    other = jax.tree.map(np.copy, STATE)
    assert ckpt.checksum(other) == base
    other["a"]["w"][2, 3] = np.nextafter(other["a"]["w"][2, 3], 99)
    assert ckpt.checksum(other) != base
    assert ckpt.checksum({"A": STATE["a"], "b": STATE["b"]}) != base


# --- config.json ------------------------------------------------------------------------------------------------------


def test_a_config_is_written_once_and_held_to(tmp_path):
    first, taken_over = ckpt.open_run(CONFIG, (8, 8, 1), ("a", "b"), tmp_path)
    again = ckpt.read_run(tmp_path)
    assert (again.config, again.image_shape, again.class_names) == (CONFIG, (8, 8, 1), ("a", "b"))
    assert first.model == again.model
    assert taken_over == {}
    longer = Config(model=CONFIG.model, train=Train(steps=77))
    ckpt.open_run(longer, (8, 8, 1), ("a", "b"), tmp_path)  # may differ, and is what the run now is
    assert ckpt.read_run(tmp_path).config.train.steps == 77
    other = Config(model=CONFIG.model, data=Data(split="test"), train=Train(seed=3))
    with pytest.raises(JaxdiffError, match=r"data.split: train and test; train.seed: 0 and 3"):
        ckpt.open_run(other, (8, 8, 1), ("a", "b"), tmp_path)
    for shape, names in (((16, 16, 1), ("a", "b")), ((8, 8, 1), ("a", "c"))):
        with pytest.raises(JaxdiffError, match="other images or classes"):
            ckpt.open_run(CONFIG, shape, names, tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "null", "{}", '{"config": {}}', '{"kind": "painting", "config": {}}'),
        '{"kind": "diffusion", "config": 1, "image_shape": [8, 8, 1], "class_names": [], "autoencoder": null}',
    ],
)
def test_a_damaged_config_is_told(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(JaxdiffError):
        ckpt.read_run(tmp_path)
    assert (tmp_path / "config.json").read_text() == content


def test_a_config_of_unknown_options_is_told(tmp_path):
    ckpt.open_run(CONFIG, (8, 8, 1), (), tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["config"]["train"]["speed"] = 3
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(JaxdiffError, match=r"There is no option train\.speed"):
        ckpt.read_run(tmp_path)


def test_without_a_run_or_a_checkpoint_there_is_nothing_to_load(tmp_path):
    with pytest.raises(JaxdiffError, match=f"There is no run in {tmp_path}"):
        ckpt.load_run(tmp_path)
    ckpt.open_run(CONFIG, (8, 8, 1), (), tmp_path)
    with pytest.raises(JaxdiffError, match="has no checkpoint yet"):
        ckpt.load_run(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(JaxdiffError, match="has no checkpoint yet"):
        ckpt.load_run(tmp_path)
