"""Files that compute what a model does and run without this project, StableHLO and ONNX; and plain arrays.

There is no SavedModel: TensorFlow 2.21 cannot read the StableHLO that JAX 0.10 writes into it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.errors import CheckpointError, ConfigError
from mae_jax.model import native

LIMIT = 2**31 - 2**24  # bytes of parameters: flatbuffers and protocol buffers end at 2 GiB, with the program in them
PLATFORMS = ("cpu", "cuda", "tpu")
Forward = Callable[[jax.Array], jax.Array]  # images f32[N,H,W,C] -> f32[N,...]


def stablehlo(forward: Forward, image_shape: Sequence[int], path: Path) -> None:
    """Write what `jax.export.deserialize` reads: a program with its parameters, for any N and any of `PLATFORMS`.

    The parameters are in memory about seven times at the most.

    Args:
      image_shape: (H, W, C).

    Raises:
      CheckpointError: the parameters have more than `LIMIT` bytes.
    """
    images = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("n"), *image_shape), jnp.float32)
    with native.unused():
        program = jax.jit(forward)
        _check_size(program, images)
        exported = jax.export.export(program, platforms=PLATFORMS)(images)
    path.write_bytes(exported.serialize())


def onnx(forward: Forward, image_shape: Sequence[int], path: Path) -> None:
    """Write an ONNX model with the input "images" and the output "outputs", for any N.

    Args:
      image_shape: (H, W, C).

    Raises:
      ConfigError: jax2onnx is not installed.
      CheckpointError: the parameters have more than `LIMIT` bytes.
    """
    for name in ("jax2onnx", "onnx_ir"):  # they warn of libraries that no model here uses, and of what they left out
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        import jax2onnx
    except ImportError as error:
        raise ConfigError('--format=onnx: needs jax2onnx: pip install "mae_jax[onnx]"') from error
    names = {"input_names": ["images"], "output_names": ["outputs"]}
    with native.unused():
        _check_size(jax.jit(forward), jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))
        model = jax2onnx.to_onnx(forward, [("n", *image_shape)], **names)
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "n"  # or it is named as if it were another number
    path.write_bytes(model.SerializeToString())  # its own writer would put large parameters into a second file


def _check_size(program, images: jax.ShapeDtypeStruct) -> None:
    """Raise a CheckpointError if a jitted function closes over more than fits into one file."""
    size = sum(value.nbytes for value in program.trace(images).jaxpr.consts)
    if size > LIMIT:
        raise CheckpointError(f"its parameters have {size / 2**30:.1f} GiB, and such a file holds less than 2 GiB")


def npz(leaves: Mapping[str, np.ndarray], path: Path) -> None:
    """Write arrays under their names, for numpy.load."""
    with path.open("wb") as file:  # np.savez would add a suffix to a path
        np.savez(file, **leaves)
