"""Data for the examples: the digits of scikit-learn, or MNIST files from a folder.

x_train, y_train, x_test, y_test = load()           # 8 x 8 digits, no download
x_train, y_train, x_test, y_test = load("mnist/")   # train-images-idx3-ubyte(.gz) and so on
"""

import gzip
import pathlib

import numpy as np
from sklearn import datasets


def load(directory=None):
    """Returns x_train, y_train, x_test, y_test: flat float32 images in [0, 1] and int32 labels."""
    if directory is not None:
        return _mnist(pathlib.Path(directory))
    x, y = datasets.load_digits(return_X_y=True)
    x, y = (x / 16).astype(np.float32), y.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(x))
    train, test = np.split(order, [int(0.8 * len(x))])
    return x[train], y[train], x[test], y[test]


def load_images(directory=None):
    """Returns the same with square images of shape (n, side, side, 1)."""
    x, y, x_test, y_test = load(directory)
    side = round(x.shape[1] ** 0.5)
    return x.reshape(-1, side, side, 1), y, x_test.reshape(-1, side, side, 1), y_test


def epoch_order(n, seed, size):
    """Returns the shuffled indices of one epoch, of shape (batches, size)."""
    size = min(size, n)
    order = np.random.default_rng(seed).permutation(n)
    return order[: n // size * size].reshape(-1, size)


def _mnist(directory):
    parts = []
    for part in ("train", "t10k"):
        images = _idx(directory / f"{part}-images-idx3-ubyte", axes=3)
        labels = _idx(directory / f"{part}-labels-idx1-ubyte", axes=1)
        if len(images) != len(labels):
            raise ValueError(
                f"{directory}: the number of {part} labels must be {len(images)}, that of the "
                f"images, got {len(labels)}."
            )
        parts += [images.reshape(len(images), -1).astype(np.float32) / 255, labels.astype(np.int32)]
    return tuple(parts)


def _idx(path, axes):
    packed = path.with_name(path.name + ".gz")
    if path.exists():
        data = path.read_bytes()
    elif packed.exists():
        path, data = packed, gzip.decompress(packed.read_bytes())
    else:
        raise ValueError(f"{path}: neither this file nor {packed.name} exists.")
    magic = bytes([0, 0, 8, axes])  # 8: unsigned bytes
    if data[:4] != magic:
        raise ValueError(f"{path}: the magic number must be {magic.hex()}, got {data[:4].hex()}.")
    head = 4 + 4 * axes
    shape = tuple(int(n) for n in np.frombuffer(data[4:head], ">i4"))
    if len(data) - head != np.prod(shape):
        raise ValueError(
            f"{path}: data of shape {shape} must have {np.prod(shape)} bytes, got "
            f"{len(data) - head}."
        )
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)
