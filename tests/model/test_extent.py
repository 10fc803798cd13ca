"""How large a model would be, from its numbers: beside the parameters and tables of models that are made."""

import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict

from mae_jax.model.extent import parameter_count, table_size
from mae_jax.model.positions import POSITIONS
from mae_jax.model.vit import SIZES, ViT


def leaves(**options):
    """The shapes of all parameters of an encoder for images of 224 pixels, by path."""
    encoder = ViT(patch_size=16, **options)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    return flatten_dict(jax.eval_shape(encoder.init, jax.random.key(0), images)["params"], sep="/")


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_counted_to_a_few_percent(size):
    options = SIZES[size]
    counted = parameter_count(options["depth"], options["width"], options.get("mlp_ratio", 4.0), 16 * 16 * 3)
    assert counted == pytest.approx(sum(x.size for x in leaves(**options).values()), rel=0.02)


def test_a_table_has_a_row_for_each_token():
    table = leaves(**SIZES["Ti"], positions="learned")["positions"]
    assert table_size((224, 224), 16, 192) == table.size == 197 * 192


def test_relative_positions_are_of_pairs_where_there_are_more_of_them():
    assert "relative" in POSITIONS
    assert table_size((224, 224), 16, 192, "relative") == 197 * 197
    assert table_size((32, 32), 16, 192, "relative") == 5 * 192


def test_numbers_of_any_size_give_a_number():
    assert parameter_count(10**12, 10**12, 4.0) > 2**40
    assert parameter_count(1, 4, 1e300) > 2**40
    assert table_size((10**12, 10**12), 1, 4) > 2**40
