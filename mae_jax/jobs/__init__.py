"""The only code that reads a config. A command is a file here with `run(config, workdir)` and a docstring as its help.

Commands that have no config, sweep, import, verify and export, have `FLAGS` and `run(flags)`.

Beside the commands: `runs`, what all training has in common; `classification`, what jobs with a classifier have;
`checks`, what can be wrong with a config; `models`, from a config or a path to a model; `features`, of images;
`planned`, a config compiled for machines that are not there, and `remedies`, what would serve them better;
`trials`, the chains of a sweep, `forecast`, what they cost, and `tables`, what comes out of them; `foreign`, models
made elsewhere; `panels`, pictures of reconstructions; `plots`, curves and confusion matrices.
"""

# name -> what `mae-jax` says of it; the module mae_jax.jobs.NAME runs it (or NAME_, where Python has the word; - is _)
JOBS = {
    "prepare": "download or read a TFDS data set and store it for random access",
    "plan": "say what pre-training would need and cost on other machines, before it is paid for",
    "check-data": "read a whole data set once; say what is in it and what cannot be read",
    "pretrain": "train a masked autoencoder",
    "probe": "train a linear classifier on a frozen encoder",
    "finetune": "train an encoder with a classifier on it, whole or in part, or from nothing",
    "knn": "classify by nearest neighbours among an encoder's features",
    "evaluate": "evaluate a probed or fine-tuned model on any split or data set",
    "reconstruct": "picture what a trained autoencoder makes of images, at any mask ratio",
    "sweep": "run a chain of jobs with one setting after another, and make a table of what comes out",
    "import": "read a model of Hugging Face's, of the original code or of timm",
    "verify": "say of each checkpoint of a run whether it is as it was written",
    "export": "write a model for Hugging Face, timm and others, or to run without this project",
}
