"""Files that somebody else may have written: what they claim is checked before memory is taken for it."""

import hashlib
import json
import stat
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

LONGEST_HEADER = 2 ** 23  # bytes; about 100 a tensor


def read_json(path: Path, most: int):
    """What a JSON file of at most so many bytes holds.

    Raises:
        OSError: it cannot be read. ValueError: it is longer, or no JSON; NaN and Infinity are none.
    """
    try:
        return json.loads(read(path, most), parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None


def read(path: Path, most: int) -> str:
    """The text of a file of at most so many bytes.

    Raises:
        OSError: it cannot be read. ValueError: it is longer, no regular file, or not UTF-8.
    """
    _size(path)
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path.name} is longer than {most:,} bytes")
    return content.decode("utf-8")


def sha256(path: Path) -> str:
    """The digest of a file of any length."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def open_tensors(path: Path):
    """Open a safetensors file, of which nothing but the header is read.

    Yields:
        The open file of safetensors, and by name the dtype (safetensors' word) and shape of what it holds. The file
        is as long as these say.

    Raises:
        OSError: it cannot be read. ValueError: it is damaged, in the header or in what is read within the block.
    """
    size = _size(path)
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > min(size, LONGEST_HEADER):
        raise ValueError(f"{path.name} has a header of {header:,} bytes")
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            yield file, {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{path.name}: {error}") from error


def _size(path: Path) -> int:
    """In bytes; a pipe or a device would have none, and reading it no end."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path.name} is no regular file")
    return status.st_size


def _refuse_constant(name: str):
    raise ValueError(f"{name} is no number of JSON")
