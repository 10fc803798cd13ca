"""What fine-tuning only a part of the encoder saves: trained parameters, moments, temporary memory, time of a step.

    python tests/benchmarks/partial.py [--config configs/finetune.py:fashion_mnist,scratch] [--rounds 7]

One step of each choice of config.trainable, with random weights, on one device, interleaved; times are medians over
rounds, and so are ratios to "all", each of two times in the same round.
"""

import argparse
from functools import partial

import jax
import numpy as np
from step import images_of, repeated, seconds_of

from mae_jax import config as configs
from mae_jax.config import complete
from mae_jax.jobs import classification, finetune
from mae_jax.model import native
from mae_jax.model.classifier import layer_of, trainable
from mae_jax.training import optim
from mae_jax.training.loop import create_state, make_train_step
from mae_jax.training.sharding import make_mesh


def step_of(config, what):
    """run(n), temporary bytes, trained parameters and bytes of moments of fine-tuning `what`."""
    model, mesh = classification.build(config), make_mesh(data=1)
    depth, batch_size = model.encoder.depth, config.data.batch_size
    tx, schedule = optim.make(batch_size, 10_000, 100, partial(layer_of, depth=depth), **config.optim)
    trained = partial(trainable, depth=depth, what=what)
    init = partial(classification.init, model, config, jax.random.key(0))
    abstract, new_state = create_state(init, tx, mesh, trained)
    labels = np.random.default_rng(0).integers(0, model.classes, batch_size).astype(np.int32)
    batch = {"image": images_of(config), "label": labels, "weight": np.ones(batch_size, np.float32)}
    step = make_train_step(
        finetune.make_draw(model, config), finetune.make_loss(model), tx, schedule, jax.random.key(1), mesh, trained
    )
    run, temporary = repeated(step.lower(abstract, batch).compile(), new_state(), jax.device_put(batch))
    parameters = sum(x.size for x in jax.tree.leaves(optim.split(abstract.params, trained)[0]))
    return run, temporary, parameters, sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract.opt_state))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/finetune.py:fashion_mnist,scratch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each choice in each round")
    given = parser.parse_args()
    native.keep_freed_memory()  # as the command line does
    config, _ = configs.load(given.config)
    config, problems = complete(config, finetune.SCHEMA, finetune.VALUES)
    assert not problems, problems
    config.classes = tuple(map(str, range(10)))
    choices = ["head", "norms", "0.5", *map(str, range(1, config.encoder.depth + 1)), "all"]
    found = {what: step_of(config, what) for what in choices}
    steps = {}
    for what, (run, *_) in found.items():
        run(2)
        steps[what] = max(1, round(given.seconds / seconds_of(run, 1)))
    rows = [{what: seconds_of(run, steps[what]) for what, (run, *_) in found.items()} for _ in range(given.rounds)]
    print(f"{'trainable':10} {'parameters':>11} {'ms/step':>8} {'of all':>7} {'temporary':>10} {'moments':>9}")
    for what, (_, temporary, parameters, moments) in found.items():
        took = np.array([row[what] for row in rows])
        ratio = np.median(took / np.array([row["all"] for row in rows]))
        sizes = f"{temporary / 1e6:7.1f} MB {moments / 1e6:6.2f} MB"
        print(f"{what:10} {parameters:11,} {1e3 * np.median(took):8.1f} {ratio:7.2f} {sizes}", flush=True)


if __name__ == "__main__":
    main()
