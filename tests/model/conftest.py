"""cuDNN's attention without a GPU."""

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as stablehlo
from jax._src.interpreters import mlir

from mae_jax.model import cudnn


def contract(equation, *factors):
    return jnp.einsum(equation, *factors, preferred_element_type=jnp.float32)


@pytest.fixture
def cudnn_here(monkeypatch):
    """The shapes that each device computes attention of, forwards and backwards, as if CPUs were GPUs that can.

    Everything of JAX's around cuDNN is run, also what splits it over a mesh; its two kernels alone are these here.
    """
    shapes = {"forward": set(), "backward": set()}

    def scores_of(q, k, scale, lengths):
        scores = contract("nqhd,nthd->nhqt", q, k) * scale
        if not lengths.size:
            return scores
        counts = jnp.arange(k.shape[1])[None] < lengths[: len(k), None]  # all alike: a device has more than it reads
        return jnp.where(counts[:, None, None], scores, -jnp.inf)

    def forward(q, k, v, bias, _, lengths, *rest, scale, is_training, **options):
        shapes["forward"].add((q.shape, k.shape, v.shape))
        scores = scores_of(q, k, scale, lengths)
        logsum = jax.nn.logsumexp(scores, axis=-1)
        out = contract("nhqt,nthd->nqhd", jnp.exp(scores - logsum[..., None]), v).astype(q.dtype)
        return (out, logsum) if is_training else (out,)

    def backward(q, k, v, bias, _, lengths, *rest, scale, **options):
        *_, logsum, out, g = rest
        shapes["backward"].add((q.shape, k.shape, g.shape))
        weights = jnp.exp(scores_of(q, k, scale, lengths) - logsum[..., None])
        product = contract("nqhd,nqhd->nhq", g.astype(jnp.float32), out.astype(jnp.float32))
        dscores = weights * (contract("nqhd,nthd->nhqt", g, v) - product[..., None]) * scale
        dq, dk = contract("nhqt,nthd->nqhd", dscores, k), contract("nhqt,nqhd->nthd", dscores, q)
        return tuple(x.astype(q.dtype) for x in (dq, dk, contract("nhqt,nqhd->nthd", weights, g)))

    monkeypatch.setattr(cudnn, "capability", lambda: 9.0)
    monkeypatch.setattr(stablehlo, "check_cudnn_version", lambda: 91100)
    kernels = {stablehlo._dot_product_attention_fwd_p: forward, stablehlo._dot_product_attention_bwd_p: backward}
    for primitive, kernel in kernels.items():
        mlir.register_lowering(primitive, mlir.lower_fun(kernel, multiple_results=True), platform="cpu")
    yield shapes
    for primitive in kernels:
        del mlir._platform_specific_lowerings["cpu"][primitive]
