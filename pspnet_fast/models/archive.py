"""What is asked of a checkpoint's file before `torch.load` reads it: that its bytes are those that were written, and that it
asks for no more memory than it is long.

PyTorch's own reader looks at neither. It is built without the checksums of zip files, so that a flipped bit is another weight;
it takes the size of a tensor from the pickle, and not from the memory that is there for it.

Past 300 lines, because archive and pickle are one promise: each is asked only what the other leaves open.
"""

from __future__ import annotations

import io
import itertools
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, NamedTuple

ZIP = b"PK\x03\x04"
_END = struct.Struct("<4s4H2LH")
"""The last bytes: signature, disks, entries of this disk and of all, the directory's size and offset, a comment's length."""
_LOCAL = struct.Struct("<4s5H3L2H")
"""Before an entry: signature, version, flags, method, time, date, checksum, size stored, size, lengths of name and extra."""
_PLAIN_FLAGS = 0x0808  # sizes and checksum stand behind the data; the name is UTF-8
_DIRECTORY = 0x10  # PyTorch's reader leaves the memory of a directory's "content" as it found it
_CHUNK = 1 << 20
_SHARED = 64
"""How many times a file's bytes all tensors together may be, by sharing memory."""
_MOST_AXES = 64
_MOST_IN_KEY = 64
_MOST_CLASSES = 4096
_HASHING = ("builtins.set", "collections.Counter")

OTHER_PROTOCOL = (
    "its pickle has what torch.load does not read with weights_only=True, as those of pickle_protocol=4 do: where the file is "
    "trusted, save it anew, once: torch.save(torch.load(IN, map_location='cpu', weights_only=False), OUT)"
)


class RefusedError(ValueError):
    """Why a file is not read."""


class Archive(NamedTuple):
    """A zip file that holds what was written into it.

    Attributes:
        sizes: of the entries, in bytes, by their names without the folder that PyTorch puts before them.
        data_pkl: the content of "data.pkl"; None where there is none.
    """

    sizes: dict[str, int]
    data_pkl: bytes | None


def verified(file: BinaryIO) -> Archive:
    """Read every byte of a zip file against its checksums.

    PyTorch stores entries as they are, one after another, and writes nothing behind the directory. Anything else two readers
    could read differently, and is refused: compression, encryption and other flags, headers that disagree, entries that share
    bytes or a name.

    Raises:
        RefusedError: it is truncated or damaged, or not written plainly.
    """
    length = file.seek(0, io.SEEK_END)
    try:
        with zipfile.ZipFile(file) as archive:
            return _verified(file, length, archive)
    except RefusedError:
        raise
    except Exception as error:
        # BadZipFile, and what it trips over: NotImplementedError, UnicodeDecodeError, OSError...
        raise RefusedError(f"truncated or damaged: {error}") from error


def names_in(file: BinaryIO) -> list[str]:
    """The names in a zip file, none where it cannot be read."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.namelist()
    except Exception:  # `verified` says which
        return []


def _verified(file: BinaryIO, length: int, archive: zipfile.ZipFile) -> Archive:
    entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    _check_end(file, length, archive, len(entries))
    # PyTorch's reader finds names whatever their case.
    if len({entry.orig_filename.lower() for entry in entries}) < len(entries):
        raise RefusedError("damaged: two entries of one name")
    end = 0
    for entry in entries:
        start = _check_entry(file, entry)
        if entry.header_offset < end or start + entry.file_size > archive.start_dir:
            raise RefusedError(f"damaged: {entry.filename} lies over another entry")
        end = start + entry.file_size
    for entry in entries:
        with archive.open(entry) as content:
            while content.read(_CHUNK):  # raises BadZipFile at the end, where the checksum is another
                pass
    folder = archive.infolist()[0].filename.partition("/")[0] + "/" if entries else ""
    inside = [entry for entry in entries if entry.filename.startswith(folder)]
    sizes = {entry.filename.removeprefix(folder): entry.file_size for entry in inside}
    return Archive(sizes, archive.read(f"{folder}data.pkl") if "data.pkl" in sizes else None)


def _check_end(file: BinaryIO, length: int, archive: zipfile.ZipFile, entries: int) -> None:
    """The directory is where the file's last bytes say, and the file ends with them."""
    file.seek(length - _END.size)
    signature, _, _, _, count, size, offset, comment = _END.unpack(file.read(_END.size))
    if signature != b"PK\x05\x06" or comment:
        raise RefusedError("damaged: there are bytes behind its end")
    if count not in (entries, 0xFFFF) or offset not in (archive.start_dir, 0xFFFFFFFF) or not size:
        raise RefusedError("damaged: its directory is not where it says")


def _check_entry(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """An entry is stored as it is, and both of its headers say so. Returns where its bytes begin."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise RefusedError(
            f"{entry.filename} is compressed, which torch.save never does: unpack the archive, and pack it without compression"
        )
    file.seek(entry.header_offset)
    signature, _, flags, method, _, _, checksum, stored, size, name, extra = _LOCAL.unpack(file.read(_LOCAL.size))
    written = file.read(name).decode("utf-8", "replace")
    # Where sizes and checksum stand behind the data, the header has 0 for them; where they are in an extra field, all ones.
    behind = flags & 0x0008
    sizes_agree = all(each in (entry.file_size, 0xFFFFFFFF, *([0] if behind else [])) for each in (stored, size))
    if (
        signature != ZIP
        or entry.flag_bits & ~_PLAIN_FLAGS
        or entry.is_dir()
        or entry.external_attr & _DIRECTORY
        or flags != entry.flag_bits
        or method != entry.compress_type
        or written != entry.orig_filename
        or not sizes_agree
        or checksum not in (entry.CRC, *([0] if behind else []))
    ):
        raise RefusedError(
            f"damaged: the headers of {entry.filename} do not agree, or are not those of a file stored plainly"
        )
    return entry.header_offset + _LOCAL.size + int(name) + int(extra)


_ITEMSIZES = {
    **{"ComplexDoubleStorage": 16, "ComplexFloatStorage": 8, "DoubleStorage": 8, "LongStorage": 8},
    **{"FloatStorage": 4, "IntStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "ShortStorage": 2},
    **{"CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1, "UntypedStorage": 1},
}
"""Bytes of an element, by the storage's class."""


class _Storage(NamedTuple):
    numel: int
    itemsize: int


class Stub(dict[Any, Any]):
    """In place of whatever a pickle would make: takes what it is given, and does nothing.

    Attributes:
        called: the name of the class or function.
        module: whether it is a network, by what it was given.
    """

    called: str = ""
    module = False

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls.called == "torch._tensor._rebuild_from_type_v2":  # (function, type, its arguments, state)
            return args[0](*args[2])
        _check_call(cls.called, args)
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __call__(self, *args: Any) -> Any:
        return Stub()

    def __setstate__(self, state: Any) -> None:
        self.module = isinstance(state, dict) and "_modules" in state

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)


class TensorStub(Stub):
    """In place of a tensor."""

    def __setstate__(self, state: Any) -> None:
        raise RefusedError("a tensor that is made another afterwards, which no file of weights does")


_VIEWS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
_PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")


def _check_call(name: str, args: Sequence[Any]) -> None:
    """Refuse the calls that PyTorch allows, and that make as much memory as a number says."""
    if name == "_codecs.encode":  # how pickles of protocol 2 hold bytes; others may double them at every call
        if [*args[1:]] != ["latin1"]:
            raise RefusedError(f"it calls {name} for another encoding than latin1, which no file of weights does")
    elif (
        name in ("builtins.bytearray", "torch.Tensor")
        or name.startswith(("torch._utils._rebuild", "torch.storage."))
        or (name.startswith("torch.") and name.endswith("Tensor") and not name.startswith("torch.nn."))
    ):
        raise RefusedError(
            f"it calls {name}, and tensors that are not plain (sparse, quantised, 8-bit floats) are not read"
        )


def _is_count(value: object) -> bool:
    """Whether it is a number as memory has them: longer ones take memory and time to multiply and to print."""
    return type(value) is int and 0 <= value < 1 << 63


def _is_shape(value: object) -> bool:
    return isinstance(value, (tuple, list)) and len(value) <= _MOST_AXES and all(map(_is_count, value))


def _size(value: Any) -> tuple[Any, ...]:
    """In place of torch.Size."""
    if not _is_shape(value):
        raise RefusedError("a size that is none of a tensor")
    return tuple(value)


def _check_key(key: Any) -> None:
    """Refuse what takes long to hash: a tuple twice in a tuple twice in a tuple..."""
    inside, count = [key], 0
    while inside:
        each = inside.pop()
        count += len(each) if isinstance(each, tuple) else 0
        if count > _MOST_IN_KEY:
            raise RefusedError("a tuple of very many parts as a key")
        inside.extend(each if isinstance(each, tuple) else ())


class DryRun(pickle._Unpickler):  # the one in C sets aside as much memory as a number says
    """Walk through a pickle and make nothing of it, to see what it would make.

    Attributes:
        storages: how many elements of how many bytes each storage has, by its key.
        viewed: bytes of all tensors, each counted by itself.
        copied: items of all that calls are given, and may copy.
    """

    stack: list[Any]

    def __init__(self, file: BinaryIO, length: int) -> None:
        super().__init__(file, encoding="utf-8")
        self.length = length
        self.storages: dict[str, _Storage] = {}
        self.viewed = 0
        self.copied = 0
        self._classes: dict[str, type[Stub]] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if full == "collections.OrderedDict":
            return OrderedDict
        if full == "torch.Size":
            return _size
        if full in _VIEWS:
            return self._view
        if full in _PARAMETERS:
            return lambda tensor, *rest: tensor
        if len(self._classes) >= _MOST_CLASSES and full not in self._classes:
            raise RefusedError(f"it names more than {_MOST_CLASSES} classes and functions")
        return self._classes.setdefault(full, type(name, (Stub,), {"called": full}))

    def check_copies(self) -> None:
        """Before a call: the last of the stack is given to what is before it."""
        given = self.stack[-1]
        for each in (given, *given) if isinstance(given, tuple) else (given,):
            self.copied += len(each) if isinstance(each, (str, bytes, list, tuple, dict)) else 0
        if self.copied > self.length:
            raise RefusedError("it copies the same again and again, which no file of weights does")

    def check_call(self) -> None:
        self.check_copies()
        function, given = self.stack[-2:]
        if function is OrderedDict or getattr(function, "called", None) in _HASHING:
            for each in itertools.chain.from_iterable(given):
                _check_key(each)
                _check_key(each[0] if isinstance(each, list) and each else None)  # a pair

    def check_item(self) -> None:
        _check_key(self.stack[-2])

    def check_items(self) -> None:
        for key in self.stack[::2]:
            _check_key(key)

    def refuse(self) -> None:
        raise RefusedError(OTHER_PROTOCOL)

    def persistent_load(self, saved: Any) -> Any:
        """A storage: ("storage", its class, key, device, number of elements, ...)."""
        if saved[0] == "module":  # a class with its source, which torch.load refuses
            return saved[1]
        kind, key, numel = saved[1].called.rpartition(".")[2], saved[2], saved[4]
        if not isinstance(key, str) or not _is_count(numel):
            raise RefusedError("a storage without a key or a number of elements")
        if kind not in _ITEMSIZES:
            raise RefusedError(f"{kind}: tensors that are not plain (sparse, quantised, 8-bit floats) are not read")
        storage = _Storage(numel, _ITEMSIZES[kind])
        if self.storages.setdefault(key, storage) != storage:
            raise RefusedError(f"two storages of one key, {key!r}")
        return storage

    def _view(self, storage: Any, offset: int, size: Sequence[int], stride: Sequence[int], *rest: Any) -> Any:
        if not isinstance(storage, _Storage):
            raise RefusedError(f"a tensor made of {type(storage).__name__}")
        if not (_is_shape(size) and _is_shape(stride) and _is_count(offset)) or len(size) != len(stride):
            raise RefusedError("a tensor whose size, strides and offset are none")
        numel = math.prod(size)
        end = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) + 1 if numel else 0
        if max(numel, end) > storage.numel:
            raise RefusedError(
                f"a tensor of size {tuple(size)} and strides {tuple(stride)} in a storage of {storage.numel} elements"
            )
        self.viewed += numel * storage.itemsize
        return TensorStub()


def _checked(code: bytes, check: Callable[[DryRun], None]) -> Callable[[Any], None]:
    """What the unpickler does at a code, after a check."""
    load: Callable[[Any], None] = pickle._Unpickler.dispatch[code[0]]

    def checked(walk: DryRun) -> None:
        check(walk)
        load(walk)

    return checked


DryRun.dispatch = {
    **pickle._Unpickler.dispatch,
    **{
        code[0]: _checked(code, check)
        for codes, check in (
            ((pickle.REDUCE,), DryRun.check_call),
            ((pickle.NEWOBJ, pickle.BUILD), DryRun.check_copies),
            ((pickle.SETITEM,), DryRun.check_item),
            ((pickle.SETITEMS,), DryRun.check_items),
            ((pickle.DICT, pickle.FROZENSET, pickle.ADDITEMS, pickle.BYTEARRAY8), DryRun.refuse),
        )
        for code in codes
    },
}


def dry_run(file: BinaryIO, length: int, sizes: dict[str, int] | None = None) -> Any:
    """Walk through the next pickle in a file.

    Args:
        file: at the pickle's first byte.
        length: bytes of the checkpoint's whole file.
        sizes: bytes that there are for every storage, by "data/" and its key; None where nothing says.

    Returns:
        What it holds, with stubs for tensors and objects.

    Raises:
        RefusedError: it would take more memory than the file has bytes.
    """
    return _walked(file, length, sizes)[0]


def dry_run_legacy(file: BinaryIO, length: int) -> Any:
    """The same of a file that torch.save wrote before 1.6: five pickles, the fourth the content, then the storages' bytes.

    PyTorch leaves the memory of a storage as it found it, where the list of those that follow lacks it.
    """
    for _ in range(3):  # a number to know it by, a version, what wrote it
        dry_run(file, length)
    content, storages = _walked(file, length)
    if sorted(dry_run(file, length)) != sorted(storages):
        raise RefusedError("damaged: its storages are not those that follow")
    return content


def _walked(file: BinaryIO, length: int, sizes: dict[str, int] | None = None) -> tuple[Any, dict[str, _Storage]]:
    walk = DryRun(file, length)
    content = walk.load()
    for key, storage in walk.storages.items():
        declared = storage.numel * storage.itemsize
        held = length if sizes is None else sizes.get(f"data/{key}", 0)
        if declared > held:
            raise RefusedError(f"storage {key!r} of {declared} bytes, for which the file has {held}")
    declared = sum(storage.numel * storage.itemsize for storage in walk.storages.values())
    if declared > length or walk.viewed > _SHARED * length:
        raise RefusedError(f"its tensors are {max(declared, walk.viewed)} bytes, and the file {length}")
    return content, walk.storages
