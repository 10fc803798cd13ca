"""The operations of ops.py in C++ (native.cc), for float32 on one CPU, where XLA reaches half the speed of PyTorch.

On GPUs and TPUs, on several devices, for other dtypes and without a C++ compiler, the formulas in ops.py are what runs.
They have second derivatives, which the C++ has not: take those within `unused()`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from mae_jax import compiled

FUNCTIONS = (
    "linear",
    "linear_gelu",
    "input_gradient",
    "gelu_gradient",
    "kernel_gradient",
    "attention",
    "attention_gradient",
    "layer_norm",
    "layer_norm_gradient",
)
M_MMAP_THRESHOLD, M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX = -3, -4, -1, -8  # <malloc.h>

_wanted = True


@contextlib.contextmanager
def unused() -> Iterator[None]:
    """What is traced within is plain JAX: to count its operations, to export it, to compare."""
    global _wanted
    before, _wanted = _wanted, False
    try:
        yield
    finally:
        _wanted = before


def wanted() -> bool:
    """Whether kernels may be used that are not XLA's; not within `unused()`."""
    return _wanted


def serves(*args: jax.Array) -> bool:
    """Whether the functions of native.cc are to be used for these arguments."""
    return (
        _wanted
        and all(x.dtype == jnp.float32 for x in args)
        and jax.default_backend() == "cpu"
        and jax.device_count() == 1  # on several, XLA would gather all shards of the arguments on each
        and _registered()
    )


def call(name: str, shapes, *args: jax.Array, **attributes: float):
    """One of `FUNCTIONS`, whose results have the `shapes` (a tree of tuples) given; all float32."""
    results = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes, is_leaf=lambda x: isinstance(x[0], int)
    )
    attributes = {key: np.float32(value) for key, value in attributes.items()}
    return jax.ffi.ffi_call(f"mae_{name}", results, vmap_method="sequential")(*args, **attributes)


def or_plain(plain: Callable) -> Callable:
    """The function of native.cc with the name of `plain`, without its underscore; `plain` itself where that is unused.

    `plain` takes arrays, and numbers by keyword, and says by its own results which shapes there are.
    """
    name = plain.__name__.removeprefix("_")
    assert name in FUNCTIONS

    @functools.cache  # a model has the same shapes in many places
    def shapes(attributes: tuple, *args: jax.ShapeDtypeStruct):
        return jax.tree.map(lambda x: x.shape, jax.eval_shape(functools.partial(plain, **dict(attributes)), *args))

    @functools.wraps(plain)
    def chosen(*args, **attributes):
        if not serves(*args):
            return plain(*args, **attributes)
        given = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args)
        return call(name, shapes(tuple(attributes.items()), *given), *args, **attributes)

    return chosen


def keep_freed_memory() -> None:
    """Keep what a step frees for the next: glibc gives large blocks back, and the kernel clears them anew every time.

    To be called before JAX starts its threads.
    """
    _mallopt({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_ARENA_MAX: 1})


def return_freed_memory() -> None:
    """Give large blocks back as soon as they are freed: for what must not need more memory than it has to."""
    _mallopt({M_MMAP_THRESHOLD: 2**20})


def _mallopt(options: dict[int, int]) -> None:
    """Set options of glibc's malloc; elsewhere nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    for option, value in options.items() if mallopt else ():
        mallopt(option, value)


@functools.cache
def _registered() -> bool:
    """Make native.cc known to JAX; False if it cannot be."""
    options = f"-isystem{jax.ffi.include_dir()}", f"-DJAXLIB={jaxlib.__version__}"
    library = compiled.library(Path(__file__).with_suffix(".cc"), ctypes.CDLL, *options)
    if library is None:
        return False
    for name in FUNCTIONS:
        jax.ffi.register_ffi_target(f"mae_{name}", jax.ffi.pycapsule(getattr(library, f"mae_{name}")), platform="cpu")
    return True
