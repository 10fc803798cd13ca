"""The tasks of other papers, on the same data, model and schedule.

    mae-jax sweep --sweep=configs/sweeps/objectives.py:fashion_mnist --workdir=runs/objectives

What their papers report is of other schedules and is not repeated here.
"""

from ml_collections import ConfigDict

OBJECTIVES = ("denoising", "context_encoder", "beit", "simmim", "maskfeat", "crossmae")


def get_config(chain: str = "digits") -> ConfigDict:
    config = ConfigDict({"title": "Objectives", "axis": "objective", "chain": f"configs/sweeps/chains.py:{chain}"})
    config.reference = "mae"
    own = f"{chain},ablation" if chain == "vit_l16" else chain  # the recipe of the chain
    others = (
        {
            "name": name,
            "label": name.replace("_", " "),
            "pretrain": {"recipe": f"configs/pretrain.py:{own},{name}"},
        }
        for name in OBJECTIVES
    )
    config.trials = ({"name": "mae"}, *others)
    return config
