"""Reading the weights that are published in PyTorch's own files, without PyTorch."""

import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from jaxdiff.errors import JaxdiffError

_MAGIC_NUMBER, _PROTOCOL_VERSION = 0x1950A86A20F9469CFC6C, 1001
"""What a file of the format before torch 1.6 begins with."""

_STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
"""PyTorch's names for flat memory of one type."""


def read_torch_file(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a PyTorch state dict (.pth, .pt) by name, as read-only views of their bytes.

    Reads what torch.save writes since torch 1.6 (a zip archive) and what it wrote before, as torchvision's VGG16 is
    published. Where the top level has a "state_dict", as in a training checkpoint, that is taken. An array has the
    shape and the type that the tensor had; bfloat16 is `ml_dtypes.bfloat16`.

    The file is a pickle, which could ask for any code to be run. This reader knows tensors, parameters, dictionaries
    and Python's plain values, and nothing else: a file that asks for more is refused before it has run anything.

    Raises JaxdiffError, naming the file, where there is none, where it is cut short, damaged or no such file, and
    where it holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise JaxdiffError(f"There is no file {path}: give the path of a PyTorch state dict (.pth or .pt).")
    try:
        with path.open("rb") as file:
            read = _read_zip if file.read(4) == b"PK\x03\x04" else _read_legacy
            file.seek(0)
            return read(file)
    except _Refused as error:
        raise JaxdiffError(f"{path} {error}: save model.state_dict() alone with torch.save.") from error
    except Exception as error:  # whatever damaged bytes raise in pickle, zipfile or NumPy
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise JaxdiffError(
            f"{path} does not read as a PyTorch state dict ({reason}): it may be cut short, fetch or save it again."
        ) from error


class _Refused(Exception):
    """The file may well be whole, and holds what is not read."""


class _Sealed(type):
    """A class that stays as it is: a pickle may set attributes on what it was given, and they would outlive it."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise TypeError(f"{cls.__name__} can not be changed")


class _Storage(NamedTuple):
    """Flat memory in the file: its key there, the type of its elements, and which of them a view begins at."""

    key: str
    dtype: np.dtype
    start: int


class _Tensor(tuple, metaclass=_Sealed):
    """What stands for a tensor until its memory is read: storage, offset, shape, strides, all in elements."""

    __slots__ = ()

    def __new__(cls, storage, offset, shape, strides, requires_grad=False, backward_hooks=None, metadata=None):
        if not isinstance(storage, _Storage):
            raise TypeError("a tensor has no storage")
        if metadata:
            raise _Refused("holds a conjugate or a negative that is yet to be computed")
        return super().__new__(cls, (storage, offset, shape, strides))


class _Parameter(metaclass=_Sealed):
    """A tensor as a module's parameter."""

    def __new__(cls, data=None, requires_grad=True, backward_hooks=None):
        self = super().__new__(cls)
        self.data = data
        return self

    def __setstate__(self, state):
        # In the oldest files (2017) it was made empty and filled from here; elsewhere this only sets requires_grad.
        if len(state) == 5:
            self.data = state[0]


class _Dict(dict, metaclass=_Sealed):
    """Stands for an OrderedDict, which a dictionary is nowadays."""

    def __setstate__(self, state):
        """Drop what modules hang on their state dicts as an attribute: the versions of their layouts."""


_ALLOWED = {
    ("collections", "OrderedDict"): _Dict,
    ("torch._utils", "_rebuild_tensor"): _Tensor,  # until torch 0.3
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
    ("torch._utils", "_rebuild_parameter"): _Parameter,
    ("torch.nn.parameter", "Parameter"): _Parameter,  # until torch 0.3
    **{("torch", name): name for name in _STORAGES},
}
"""All that a file may ask for. Storages are mere names here: nothing can be called or changed through them."""


class _Unpickler(pickle.Unpickler):
    """Python's unpickler, except that names in the file only lead to what `_ALLOWED` has for them."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="utf-8")  # files of Python 2 have its strings
        self.dtypes: dict[str, np.dtype] = {}

    def find_class(self, module_name: str, global_name: str) -> Any:
        try:
            return _ALLOWED[module_name, global_name]
        except KeyError:
            raise _Refused(
                f"asks for {module_name}.{global_name}, which is no part of a state dict, and was not run"
            ) from None

    def persistent_load(self, pid: Any) -> _Storage:
        kind, name, key, _location, _size, *view = pid
        if kind != "storage":
            raise _Refused(f"holds a {kind}, which is no part of a state dict")
        dtype = _STORAGES[name]
        self.dtypes.setdefault(key, dtype)
        start = view[0][1] if view and view[0] is not None else 0  # (key of the view, where it begins, its size)
        return _Storage(key, dtype, start)


def _tensors(top: Any) -> dict[str, _Tensor]:
    """The tensors of an unpickled state dict, or of that inside a checkpoint."""
    if isinstance(top, dict) and isinstance(top.get("state_dict"), dict):
        top = top["state_dict"]
    if not isinstance(top, dict):
        raise _Refused(f"holds a {type(top).__name__.strip('_').lower()} instead of a state dict")
    tensors = {name: value.data if isinstance(value, _Parameter) else value for name, value in top.items()}
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, _Tensor):
            raise _Refused(f"holds something else than an array under {name!r}")
    return tensors


def _arrays(tensors: dict[str, _Tensor], memory: dict[str, bytes]) -> dict[str, np.ndarray]:
    """Views of the memory; NumPy raises ValueError for one that does not lie in it."""
    arrays = {}
    for name, (storage, offset, shape, strides) in tensors.items():
        size = storage.dtype.itemsize
        arrays[name] = np.ndarray(
            shape,
            storage.dtype,
            memory[storage.key],
            (storage.start + offset) * size,
            [stride * size for stride in strides],
        )
    return arrays


def _read_zip(file: BinaryIO) -> dict[str, np.ndarray]:
    """The format since torch 1.6: <any>/data.pkl, and each storage's bytes in <any>/data/<key>."""
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise _Refused("is a zip archive that torch.save did not write")
        root = pickles[0].removesuffix("data.pkl")
        tensors = _tensors(_Unpickler(io.BytesIO(archive.read(pickles[0]))).load())  # all at once: checks its sum
        swap = f"{root}byteorder" in names and archive.read(f"{root}byteorder") == b"big"
        memory = {}
        for storage in {tensor[0].key: tensor[0] for tensor in tensors.values()}.values():
            content = archive.read(f"{root}data/{storage.key}")
            if swap:
                content = np.frombuffer(content, f"u{storage.dtype.itemsize}").byteswap().tobytes()
            memory[storage.key] = content
    return _arrays(tensors, memory)


def _read_legacy(file: BinaryIO) -> dict[str, np.ndarray]:
    """The format before torch 1.6: pickles one after the other, then each storage's size and bytes."""
    end = file.seek(0, io.SEEK_END)
    file.seek(0)
    if _Unpickler(file).load() != _MAGIC_NUMBER or _Unpickler(file).load() != _PROTOCOL_VERSION:
        raise _Refused("is no PyTorch file")
    _Unpickler(file).load()  # the sizes of C's types on the machine that wrote it; storages do not depend on them
    unpickler = _Unpickler(file)
    tensors = _tensors(unpickler.load())
    needed = {storage.key for storage, *_ in tensors.values()}
    memory = {}
    for key in _Unpickler(file).load():
        (count,) = struct.unpack("<q", file.read(8))
        size = count * unpickler.dtypes[key].itemsize
        if not 0 <= size <= end - file.tell():
            raise EOFError("it ends inside of an array")
        if key in needed:
            memory[key] = file.read(size)
        else:
            file.seek(size, io.SEEK_CUR)
    return _arrays(tensors, memory)
