"""What a run writes beside its checkpoints on an object store: held in memory here, behind the names of gs://."""

import json

import fsspec
import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from jaxdiff import checkpoints as ckpt
from jaxdiff.images import save_image
from jaxdiff.training.reporting import Lines

RUN = "gs://bucket/run"


class Store(MemoryFileSystem):
    """Objects in memory, which like those of gs:// can not be added to."""

    protocol = ("gs", "gcs")
    store = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012

    def __init__(self, **options):
        super().__init__()

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("gs://").removeprefix("gcs://").strip("/")

    def _open(self, path, mode="rb", **options):
        assert "a" not in mode
        return super()._open(path, mode, **options)


@pytest.fixture(autouse=True)
def store():
    before = fsspec.registry.registry.get("gcs") if hasattr(fsspec.registry, "registry") else None
    fsspec.register_implementation("gcs", Store, clobber=True)
    yield
    if before is not None:
        fsspec.register_implementation("gcs", before, clobber=True)
    Store.store.clear()


def test_metrics_are_on_the_store_line_by_line_and_cut_where_a_run_goes_on():
    path = epath.Path(RUN) / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = Lines(path, 0)
    for step in (1, 2, 3):
        lines.write(json.dumps({"step": step}))
        assert path.read_text().count("\n") == step
    lines.close()
    lines = Lines(path, 2)
    lines.write(json.dumps({"step": 4}))
    lines.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 4]
    assert [each.name for each in path.parent.iterdir()] == ["metrics.jsonl"]


def test_pictures_are_on_the_store():
    save_image(np.full((4, 8, 8, 1), 200, np.uint8), f"{RUN}/samples/step_1.png")
    (path,) = (epath.Path(RUN) / "samples").iterdir()
    assert path.name == "step_1.png"
    with path.open("rb") as file, Image.open(file) as picture:
        assert picture.getextrema()[1] == 255


def test_checkpoints_keep_their_address_there_and_are_absolute_on_a_disk(tmp_path, monkeypatch):
    assert str(ckpt.folder_of(RUN)) == f"{RUN}/checkpoints"
    monkeypatch.chdir(tmp_path)
    assert str(ckpt.folder_of("runs/a")) == str(tmp_path / "runs" / "a" / "checkpoints")
