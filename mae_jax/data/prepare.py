"""Preparing TFDS data sets: download or read by hand, check, and store for random access."""

from __future__ import annotations

import os
import struct
import tempfile
from pathlib import Path

from etils import epy

from mae_jax.data.sources import is_prepared, tfds_builder
from mae_jax.errors import ConfigError, DataError

with epy.lazy_imports():
    import tensorflow_datasets as tfds

# When the official Fashion-MNIST archives were packed, seconds since 1970 (2017-08-31 10:50:06 and 10:50:27 UTC).
FASHION_MNIST_TIMES = {"train": 1504176606, "t10k": 1504176627}


def prepare(*, name: str, data_dir: str = "", manual_dir: str = "") -> Path:
    """Prepare the TFDS data set `name` as array_record files, unless it is.

    Args:
      data_dir: where to; empty for TFDS's own default.
      manual_dir: a folder that holds files which TFDS shall not download, or cannot, such as ImageNet's archives.

    Returns:
      The folder of the prepared data set.

    Raises:
      ConfigError: no such data set, or no such folder.
      DataError: the files are missing, or are not what TFDS expects.
    """
    builder = tfds_builder(name, data_dir)
    if is_prepared(builder):
        return Path(builder.data_path)
    if manual_dir and not os.path.isdir(os.path.expanduser(manual_dir)):
        raise ConfigError(f"config.data.manual_dir: no folder {manual_dir!r}")
    with tempfile.TemporaryDirectory() as restored:
        manual = Path(os.path.expanduser(manual_dir)) if manual_dir else None
        if name == "fashion_mnist" and manual:
            manual = restore_fashion_mnist(manual, Path(restored))
        try:
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual))
        except Exception as error:  # TFDS raises whatever its downloaders and readers do
            reason = " ".join(str(error).split())[:500]
            raise DataError(
                f"cannot prepare {name}: {reason}; give its files with --config.data.manual_dir=..."
            ) from error
    return Path(builder.data_path)


def restore_fashion_mnist(packaged: Path, folder: Path) -> Path:
    """Write the official Fashion-MNIST archives, bit for bit, from those of Debian's dataset-fashion-mnist package.

    Debian's build drops each file name from the gzip header and zeroes its time, and TFDS's checksums no longer
    match; the compressed data are the same. An archive that still has its name is copied as it is.

    Returns:
      `folder`.
    """
    names = [f"{part}-{kind}-ubyte.gz" for part in FASHION_MNIST_TIMES for kind in ("images-idx3", "labels-idx1")]
    missing = [name for name in names if not (packaged / name).is_file()]
    if missing:
        raise ConfigError(
            f"config.data.manual_dir: no {', '.join(missing)} in {str(packaged)!r}; on Debian: "
            "apt-get install dataset-fashion-mnist"
        )
    for name in names:
        data = (packaged / name).read_bytes()
        if data[:4] == b"\x1f\x8b\x08\x00":  # gzip without a name
            time = struct.pack("<I", FASHION_MNIST_TIMES[name.split("-")[0]])
            data = data[:3] + b"\x08" + time + data[8:10] + name.removesuffix(".gz").encode() + b"\0" + data[10:]
        (folder / name).write_bytes(data)
    return folder
