"""One file per command. Only these read a config; each has `run(config, workdir)` and a docstring that is its help."""

# name -> what `mae-jax` says of it; the module mae_jax.jobs.NAME runs it
JOBS = {
    "prepare": "download or read a TFDS data set and store it for random access",
    "pretrain": "train a masked autoencoder",
    "reconstruct": "picture what a trained autoencoder makes of images, at any mask ratio",
}
