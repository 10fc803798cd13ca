"""The only code that reads a config. A command is a file here with `run(config, workdir)` and a docstring as its help.

Beside the commands: `checks`, what can be wrong with a config; `models`, from a config or a path to a model;
`panels`, pictures of reconstructions.
"""

# name -> what `mae-jax` says of it; the module mae_jax.jobs.NAME runs it
JOBS = {
    "prepare": "download or read a TFDS data set and store it for random access",
    "pretrain": "train a masked autoencoder",
    "reconstruct": "picture what a trained autoencoder makes of images, at any mask ratio",
}
