"""PyTorch's files are read without PyTorch, and nothing that one may hold is run."""

import os
import pickle
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxdiff.errors import JaxdiffError
from jaxdiff.torch_files import read_torch_file

FIXTURES = Path(__file__).parent / "fixtures"
FILES = [FIXTURES / "torch_zip.pth", FIXTURES / "torch_legacy.pth"]
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
CUBE = (np.arange(24) / 4).astype(np.float32).reshape(2, 3, 4)


def literal(value) -> bytes:
    """The opcodes that put a plain value on a pickle's stack."""
    return pickle.dumps(value, 2)[2:-1]


def name(path: str) -> bytes:
    module, _, of_it = path.rpartition(".")
    return f"c{module}\n{of_it}\n".encode()


def call(path: str, *args: bytes) -> bytes:
    return name(path) + b"(" + b"".join(args) + b"tR"


def storage(key: str, *view, kind: str = "torch.FloatStorage") -> bytes:
    return b"(" + literal("storage") + name(kind) + b"".join(literal(x) for x in (key, "cuda:0", 1, *view)) + b"tQ"


def tensor(held: bytes, shape, strides, offset: int = 0, version: str = "_v2") -> bytes:
    where = [literal(offset), literal(tuple(shape)), literal(tuple(strides))]
    rest = [literal(False), call("collections.OrderedDict")] if version else []
    return call(f"torch._utils._rebuild_tensor{version}", held, *where, *rest)


def dictionary(entries: dict[str, bytes]) -> bytes:
    return b"}(" + b"".join(literal(key) + value for key, value in entries.items()) + b"u"


def write_zip(path: Path, body: bytes, memory: dict[str, bytes], **more: bytes) -> Path:
    """A file as torch.save writes it since 1.6, from a pickle's opcodes and the bytes of storages."""
    with zipfile.ZipFile(path, "w") as archive:
        for entry, content in {"data.pkl": b"\x80\x02" + body + b"."}.items() | more.items():
            archive.writestr(f"archive/{entry}", content)
        for key, content in memory.items():
            archive.writestr(f"archive/data/{key}", content)
    return path


def write_legacy(path: Path, body: bytes, memory: dict[str, np.ndarray]) -> Path:
    """A file as torch.save wrote it before 1.6."""
    head = b"".join(pickle.dumps(value, 2) for value in (MAGIC, PROTOCOL, {"little_endian": True}))
    storages = b"".join(struct.pack("<q", flat.size) + flat.tobytes() for flat in memory.values())
    path.write_bytes(head + b"\x80\x02" + body + b"." + pickle.dumps(list(memory), 2) + storages)
    return path


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_what_torch_wrote_is_read(path):
    arrays = read_torch_file(path)
    expected = {
        "plain": CUBE,
        "transposed": CUBE.transpose(2, 0, 1),
        "part": CUBE[1:, ::2, 1:3],
        "expanded": np.full((2, 3), 1.25, np.float32),
        "scalar": np.int64(3),
        "empty": np.zeros((0, 3), np.float32),
        "parameter": np.float32([1.5, -2]),
        "bfloat16": np.array([0, 1, 100], ml_dtypes.bfloat16),
        "bool": np.array([False, True, True]),
    }
    kinds = ["float64", "float16", "int64", "int32", "int16", "int8", "uint8"]
    expected |= {kind: np.array([0, 1, 100], kind) for kind in kinds}
    assert set(arrays) == set(expected)
    assert list(arrays)[:7] == list(expected)[:7]  # in the file's order
    for key, array in arrays.items():
        assert (array.shape, array.dtype) == (expected[key].shape, expected[key].dtype), key
        np.testing.assert_array_equal(array, expected[key], err_msg=key)
        assert not array.flags.writeable


def test_files_of_2017_are_read(tmp_path):
    """A list of pairs for the dictionary, tensors of four arguments, parameters as a class, made full or empty."""
    vector = tensor(storage("7", None), [2], [1], offset=1, version="")
    state = b"(" + literal(True) + literal(False) + call("collections.OrderedDict") + b"t"
    full = call("torch.nn.parameter.Parameter", vector) + state + b"b"
    longer = b"(" + vector + literal(None) + call("collections.OrderedDict") + literal(True) + literal(False) + b"t"
    empty = name("torch.nn.parameter.Parameter") + b")\x81" + longer + b"b"
    view = tensor(storage("7", ("8", 2, 2)), [1], [1], offset=1)
    pairs = b"](" + b"".join(b"](" + literal(k) + v + b"e" for k, v in {"full": full, "empty": empty}.items())
    pairs += b"](U\x05plain" + vector + b"e" + b"](" + literal("view") + view + b"ee"
    with_versions = call("collections.OrderedDict", pairs) + literal({"_metadata": {"": {"version": 1}}}) + b"b"
    path = write_legacy(tmp_path / "old.pth", with_versions, {"7": np.float32([5, 6, 7, 8])})
    arrays = read_torch_file(path)
    assert {key: array.tolist() for key, array in arrays.items()} == {
        "full": [6, 7],
        "empty": [6, 7],
        "plain": [6, 7],
        "view": [8],
    }


def test_what_is_not_asked_for_is_passed_over(tmp_path):
    """The state of an optimizer lies between the weights of a checkpoint."""
    weights = dictionary({"a": tensor(storage("1", None), [1], [1]), "c": tensor(storage("3", None), [2], [1])})
    body = dictionary({"optimizer": tensor(storage("2", None, kind="torch.LongStorage"), [9], [1])})
    body = body[:-1] + literal("state_dict") + weights + b"u"
    memory = {"1": np.float32([1]), "2": np.arange(9), "3": np.float32([3, 4])}
    arrays = read_torch_file(write_legacy(tmp_path / "checkpoint.pth", body, memory))
    assert {key: array.tolist() for key, array in arrays.items()} == {"a": [1], "c": [3, 4]}
    zipped = write_zip(tmp_path / "checkpoint.pt", body, {"1": memory["1"].tobytes(), "3": memory["3"].tobytes()})
    assert {key: array.tolist() for key, array in read_torch_file(zipped).items()} == {"a": [1], "c": [3, 4]}


def test_files_of_machines_with_the_other_order_of_bytes_are_read(tmp_path):
    body = dictionary({"x": tensor(storage("0"), [2], [1])})
    path = write_zip(tmp_path / "big.pth", body, {"0": np.array([1.5, -2], ">f4").tobytes()}, byteorder=b"big")
    assert read_torch_file(path)["x"].tolist() == [1.5, -2]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_file_cut_short_anywhere_is_refused(path, tmp_path):
    whole, cut = path.read_bytes(), tmp_path / "cut.pth"
    for size in [*range(0, len(whole), 11), *range(len(whole) - 30, len(whole))]:
        cut.write_bytes(whole[:size])
        with pytest.raises(JaxdiffError, match=r"cut\.pth does not read as"):
            read_torch_file(cut)


def test_bytes_that_changed_are_seen_in_a_zip(tmp_path):
    whole = bytearray(FILES[0].read_bytes())
    whole[whole.index(CUBE.tobytes()) + 5] ^= 1
    path = tmp_path / "changed.pth"
    path.write_bytes(whole)
    with pytest.raises(JaxdiffError, match=r"changed\.pth does not read as .*CRC"):
        read_torch_file(path)


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("where", ["zip", "legacy", "magic", "system", "keys"])
def test_a_malicious_file_runs_nothing(where, protocol, tmp_path):
    marker, path = tmp_path / "was_here", tmp_path / "evil.pth"
    evil = pickle.dumps({"x": Evil(marker)}, protocol)
    good = pickle.dumps({}, 2)
    parts = {"magic": pickle.dumps(MAGIC, 2), "protocol": pickle.dumps(PROTOCOL, 2)}
    parts |= {"system": good, "legacy": good, "keys": pickle.dumps([], 2)}
    if where == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", evil)
    else:
        assert where in parts
        path.write_bytes(b"".join((parts | {where: evil}).values()))
    with pytest.raises(JaxdiffError, match=rf"evil\.pth asks for {os.name}\.mkdir.*was not run"):
        read_torch_file(path)
    assert not marker.exists()
    pickle.loads(evil)
    assert marker.exists()  # it would have been made


@pytest.mark.parametrize("path", ["builtins.eval", "torch.load", "torch._utils._rebuild_tensor_v3", "numpy.ndarray"])
def test_only_what_is_listed_is_known(path, tmp_path):
    file = write_zip(tmp_path / "other.pth", dictionary({"x": call(path, literal("1"))}), {})
    with pytest.raises(JaxdiffError, match=rf"asks for {path}, which is no part of a state dict"):
        read_torch_file(file)


@pytest.mark.parametrize("path", ["collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch.FloatStorage"])
@pytest.mark.parametrize("state", [{"marked": 1}, (None, {"marked": 1}), (None, {"__new__": 1})])
def test_a_file_leaves_nothing_behind_in_the_reader(path, state, tmp_path):
    file = write_zip(tmp_path / "sticky.pth", dictionary({"x": name(path) + literal(state) + b"b"}), {})
    with pytest.raises(JaxdiffError, match=r"sticky\.pth does not read as"):
        read_torch_file(file)
    assert read_torch_file(FILES[0])["plain"].tolist() == CUBE.tolist()


X = tensor(storage("0"), [2], [1])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (literal([1, 2]), "holds a list instead of a state dict: save model.state_dict"),
        (X, "holds a tensor instead of a state dict"),
        (dictionary({"x": X, "epoch": literal(3)}), "holds something else than an array under 'epoch'"),
        (b"}(" + literal(3) + X + b"u", "holds something else than an array under 3"),
        (dictionary({"x": tensor(storage("0"), [3], [1])}), "does not read as"),  # two numbers are there
        (dictionary({"x": tensor(storage("0"), [1], [1], offset=2)}), "does not read as"),
        (dictionary({"x": tensor(storage("0"), [1], [1], offset=-1)}), "does not read as"),
        (dictionary({"x": tensor(storage("0"), [2], [-1])}), "does not read as"),
        (dictionary({"x": tensor(storage("0"), [2], [1, 1])}), "does not read as"),
        (dictionary({"x": tensor(storage("1"), [1], [1])}), "does not read as .*archive/data/1"),
        (dictionary({"x": tensor(literal("0"), [1], [1])}), "does not read as .*a tensor has no storage"),
        (dictionary({"x": tensor(storage("0", kind="torch.ComplexFloatStorage"), [1], [1])}), "ComplexFloatStorage"),
        (b"(" + literal("module") + b"NNNtQ", "does not read as|holds a module"),
    ],
)
def test_what_is_no_state_dict_is_refused(body, said, tmp_path):
    path = write_zip(tmp_path / "odd.pth", body, {"0": np.float32([1, 2]).tobytes()})
    with pytest.raises(JaxdiffError, match=rf"odd\.pth.*{said}"):
        read_torch_file(path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(JaxdiffError, match=r"There is no file .*nowhere\.pth"):
        read_torch_file(tmp_path / "nowhere.pth")
    with pytest.raises(JaxdiffError, match="There is no file"):
        read_torch_file(tmp_path)
    for key, content in {"empty": b"", "text": b"Not Found\n", "pickle": pickle.dumps({"x": 1})}.items():
        path = tmp_path / key
        path.write_bytes(content)
        with pytest.raises(JaxdiffError, match=rf"{key} (does not read as a PyTorch state dict|is no PyTorch file)"):
            read_torch_file(path)
    np.savez(tmp_path / "arrays.npz", x=CUBE)
    with pytest.raises(JaxdiffError, match=r"arrays\.npz is a zip archive that torch\.save did not write"):
        read_torch_file(tmp_path / "arrays.npz")
