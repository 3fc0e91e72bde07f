"""Read files, and write them either whole or not at all."""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Container, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fastadapt.errors import InputError, counted, form

if TYPE_CHECKING:  # finding images needs no PyTorch
    from torch import Tensor

CONTENT = "content_sha256"  # key of the hash of a JSON object, in the object
_CHUNK = 2**20  # of a text that is read piece by piece
_TEMPORARY = re.compile(r"\.(.+)\.[a-z0-9_]{8}\.tmp")  # as tempfile names them
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; rename it to ``path`` if the block succeeds.

    A failure or an interrupt removes the temporary file and leaves what was at ``path`` alone.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        # mkstemp makes files private; a result is as readable as any file the user makes.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a write to a full disk does not say to what
        raise


def is_temporary(name: str, of: Container[str] | re.Pattern[str]) -> bool:
    """Say whether a file's name is one that :func:`atomic_path` gives a file while it is written.

    Args:
        name: of the file.
        of: the names that the file gets once it is whole, or their pattern.
    """
    found = _TEMPORARY.fullmatch(name)
    if found is None:
        return False
    return bool(of.fullmatch(found[1])) if isinstance(of, re.Pattern) else found[1] in of


def exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two files or folders in one step (renameat2 of Linux).

    Returns:
        Whether it was done: not every system and file system can.
    """
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return function(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a JSON file, indented and in UTF-8; what is no text (names of files) as escapes."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            text = json.dumps(value, indent=2)
    write_text(path, text + "\n")


def content_sha256(values: dict[str, Any]) -> str:
    """Hash what a JSON object holds, its own hash left out, whatever its layout as text."""
    content = {key: value for key, value in values.items() if key != CONTENT}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def seal(values: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON object with the hash of its content, as it is once it was written."""
    plain = json.loads(json.dumps(values))
    return {**plain, CONTENT: content_sha256(plain)}


def read_text(path: str | os.PathLike[str]) -> str:
    r"""Read a text file that a person wrote, in whatever encoding their program chose.

    UTF-8, with or without a byte order mark; UTF-16 and UTF-32 with one, or UTF-16 whose zero
    bytes tell; Windows-1252 where the bytes are no UTF-8. Line ends become ``\n``.

    Raises:
        InputError: the file is missing or is no text.
    """
    path = Path(path)
    with _readable(path):
        content = path.read_bytes()
    for encoding in _encodings(content):
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            return text.replace("\r\n", "\n").replace("\r", "\n")
    raise InputError(
        f"{path} cannot be read as text in UTF-8, UTF-16 or Windows-1252: save it as UTF-8"
    )


@contextlib.contextmanager
def open_text(path: str | os.PathLike[str]) -> Iterator[IO[str]]:
    """Open a text file of any length that a person wrote, in an encoding of :func:`read_text`.

    Raises:
        InputError: the file is missing or is no text.
    """
    path = Path(path)
    with _readable(path), path.open("rb") as file:
        encodings = _encodings(file.read(_CHUNK))
    for encoding in encodings:
        if _is_text(path, encoding):
            with path.open(encoding=encoding) as text:
                yield text
            return
    raise InputError(
        f"{path} cannot be read as text in UTF-8, UTF-16 or Windows-1252: save it as UTF-8"
    )


def check_ordinary(path: str | os.PathLike[str]) -> None:
    """Refuse what is no ordinary file: reading a pipe or a device may never end.

    Raises:
        InputError: it is a folder, a pipe, a socket or a device.
        OSError: it is not there, or cannot be looked at.
    """
    mode = Path(path).stat().st_mode
    if stat.S_ISDIR(mode):
        raise InputError(f"{path} is a folder; expected a file")
    if not stat.S_ISREG(mode):
        raise InputError(f"{path} is a pipe, a socket or a device; expected a file")


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Say in one line that a file is not there, or cannot be read."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder; expected a file") from None
    except (OSError, ValueError) as error:  # no permission; a name with a zero byte
        said = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path} cannot be read: {said}") from None


def _is_text(path: Path, encoding: str) -> bool:
    try:
        with path.open(encoding=encoding) as file:
            return all("\0" not in chunk for chunk in iter(lambda: file.read(_CHUNK), ""))
    except UnicodeDecodeError:
        return False


def _encodings(content: bytes) -> list[str]:
    """Name the encodings to try, the first that fits being right."""
    if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return ["utf-32"]
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return ["utf-16"]
    # Most letters of a table are ASCII: in UTF-16 every other byte is then zero.
    even, odd = content[::2].count(0), content[1::2].count(0)
    if max(even, odd) * 4 > len(content):
        return ["utf-16-be" if even > odd else "utf-16-le"]
    return ["utf-8-sig", "cp1252"]


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """Read a list of names, one a line, as :func:`read_text`; blank lines are dropped."""
    return [line.strip() for line in read_text(path).split("\n") if line.strip()]


def resolve_listed(folder: Path, path: str) -> Path:
    """Return the path of a file that a list or a table names.

    Args:
        folder: of the list; relative paths start there.
        path: as it is written; one with Windows' separators is tried with ours, too.
    """
    found = Path(os.path.normpath(folder / path))
    if "\\" in path and not os.path.exists(found):  # noqa: PTH110 (a name may be too long)
        return Path(os.path.normpath(folder / path.replace("\\", "/")))
    return found


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: the file is missing, or is no JSON object.
    """
    path = Path(path)
    with _readable(path):
        content = path.read_bytes()
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except RecursionError:
        raise InputError(f"{path} is no valid JSON: it is nested too deeply") from None
    except ValueError as error:  # of numbers of thousands of digits, too
        raise InputError(f"{path} is no valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a JSON {type(value).__name__}; expected an object")
    return value


def write_tensors(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file; tensors may live on any device and share memory."""
    from safetensors.torch import save_file

    owned = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            save_file(owned, temporary, metadata=metadata)
        except Exception as error:  # safetensors wraps what the system says in an error of its own
            if found := re.search(r"\(os error (\d+)\)", str(error)):
                number = int(found[1])
                raise OSError(number, os.strerror(number), str(path)) from error
            raise


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file and return its tensors and its metadata.

    Raises:
        InputError: the file is missing, truncated or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        what = "is a folder; expected a file" if path.is_dir() else "does not exist"
        raise InputError(f"{path} {what}")
    try:
        with _readable(path), safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(
            f"{path} is no complete safetensors file ({error}). It may be truncated: copy it again."
        ) from None


def check_finite(tensors: dict[str, Tensor], source: str) -> None:
    """Refuse tensors that hold NaN or infinity.

    Args:
        tensors: by name.
        source: of them, for the error message.

    Raises:
        InputError: naming the first such tensor.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            bad = int((~tensor.isfinite()).sum())
            raise InputError(
                f"{source}: {name} holds {counted(bad, 'value')} that "
                f"{form(bad, 'is', 'are')} NaN or infinite, out of {tensor.numel()}. The training "
                "that made it diverged; lower its learning rate."
            )


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hash a file's bytes; 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_tensors(tensors: dict[str, Tensor]) -> str:
    """Hash names, dtypes, shapes and values, whatever the order and the device."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
