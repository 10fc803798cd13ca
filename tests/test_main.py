"""The command line: what it says unasked, and one line with exit code 2 for each mistake, with nothing compiled."""

import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import mae_jax
from mae_jax.__main__ import main
from mae_jax.config import flatten, load
from mae_jax.jobs import JOBS, models, pretrain, runs

ROOT = Path(__file__).parents[1]
DIGITS = "configs/pretrain.py:digits"
IMAGENET = "configs/pretrain.py:vit_b16"
SYNTHETIC = "--config.data.source=synthetic --config.data.image_size=(32,32) --config.data.batch_size=8"
FOLDER = "--config.data.source=folder --config.data.split=all[:50%] --config.data.held_out=all[50%:]"
FOLDER += " --config.data.batch_size=8"
TFDS = "--config.data.source=tfds --config.data.data_dir={tmp}/tfds"
USER = """
import runpy
def get_config():
    config = runpy.run_path({recipes!r})["get_config"]("digits,tiny")
    {change}
    return config
"""

# What is typed after "pretrain" and a good --workdir, and what the one line of the answer must hold. A first word
# without "--" is what goes into --config=; {tmp} is a folder of the test.
MISTAKES = {
    # the command
    "no config": ("", ["--config is missing", "--config=PATH"]),
    "config without value": ("--config", ["--config has no value", "--config=..."]),
    "config after a space": ("--config configs/pretrain.py", ["--config has no value", "--config=..."]),
    "no such file": ("configs/pretrian.py", ["'configs/pretrian.py'", "did you mean configs/pretrain.py?"]),
    "a folder": ("{tmp}", ["no file", "{tmp}"]),
    "no such recipe": ("configs/pretrain.py:digts", ["'digts'", "did you mean digits?"]),
    "no such variant": (DIGITS + ",tinny", ["'tinny'", "did you mean tiny?"]),
    # keys
    "unknown key": (f"{DIGITS} --config.mask.ratoi=0.5", ["mask.ratoi", "did you mean mask.ratio?"]),
    "key without value": (f"{DIGITS} --config.mask.ratio", ["--config.mask.ratio=VALUE"]),
    "key before a space": (f"{DIGITS} --config.mask.ratio 0.5", None),
    "group overwritten": (f"{DIGITS} --config.data=5", ["config.data is a group", "--config.data.KEY=VALUE"]),
    "stray word": (f"{DIGITS} digits", ["digits: not understood", "--config.GROUP.KEY=VALUE"]),
    # types
    "not an int": (f"{DIGITS} --config.train.steps=1.5", ["config.train.steps", "1.5"]),
    "not a float": (f"{DIGITS} --config.mask.ratio=half", ["config.mask.ratio", "half"]),
    "not a bool": (f"{DIGITS} --config.data.flip=maybe", ["config.data.flip", "maybe"]),
    "not a tuple of ints": (f"{DIGITS} --config.data.image_size=(8,a)", ["config.data.image_size"]),
    "a tuple of floats": (f"{DIGITS} --config.data.image_size=(8,8.5)", ["config.data.image_size", "Sequence[int]"]),
    "None": (f"{DIGITS} --config.seed=None", ["config.seed", "None"]),
    # the model
    "image not divisible": (f"{DIGITS} --config.encoder.patch_size=3", ["config.data.image_size", "patch_size 3"]),
    "no image size": (f"{DIGITS} --config.data.image_size=()", ["config.data.image_size", "()", "(height, width)"]),
    "one image size": (f"{DIGITS} --config.data.image_size=(8,)", ["config.data.image_size", "(height, width)"]),
    "three image sizes": (f"{DIGITS} --config.data.image_size=(8,8,8)", ["config.data.image_size", "(height, width)"]),
    "image size 0": (f"{DIGITS} --config.data.image_size=(0,0)", ["config.data.image_size", "(0, 0)"]),
    "negative image size": (f"{DIGITS} --config.data.image_size=(-8,8)", ["config.data.image_size", "-8"]),
    "patch 0": (f"{DIGITS} --config.encoder.patch_size=0", ["patch_size 0"]),
    "negative patch": (f"{DIGITS} --config.encoder.patch_size=-2", ["patch_size -2"]),
    "patch of the whole image": (f"{DIGITS} --config.encoder.patch_size=8", ["config.mask.ratio", "of 1 patches"]),
    "heads": (f"{DIGITS} --config.encoder.heads=3", ["config.encoder.width", "config.encoder.heads 3"]),
    "heads 0": (f"{DIGITS} --config.encoder.heads=0", ["config.encoder.heads 0"]),
    "decoder heads": (f"{DIGITS} --config.decoder.heads=7", ["config.decoder.width", "config.decoder.heads 7"]),
    "width 0": (f"{DIGITS} --config.encoder.width=0", ["config.encoder.width"]),
    "negative width": (f"{DIGITS} --config.decoder.width=-64", ["config.decoder.width", "-64"]),
    "width not divisible by 4": (f"{DIGITS} --config.encoder.width=30 --config.encoder.heads=2", ["30", "by 4"]),
    "depth 0": (f"{DIGITS} --config.encoder.depth=0", ["config.encoder.depth", "below 1"]),
    "negative depth": (f"{DIGITS} --config.decoder.depth=-1", ["config.decoder.depth", "below 0"]),
    "no hidden unit": (f"{DIGITS} --config.encoder.mlp_ratio=0.001", ["config.encoder.mlp_ratio"]),
    "mlp_ratio nan": (f"{DIGITS} --config.decoder.mlp_ratio=nan", ["config.decoder.mlp_ratio", "nan"]),
    "ratio 0": (f"{DIGITS} --config.mask.ratio=0", ["config.mask.ratio", "hides no patch", "config.loss.patches=all"]),
    "ratio 1": (f"{DIGITS} --config.mask.ratio=1", ["config.mask.ratio", "between 0 and 1"]),
    "ratio that keeps none": (f"{DIGITS} --config.mask.ratio=0.99", ["config.mask.ratio", "0 of 16"]),
    "negative ratio": (f"{DIGITS} --config.mask.ratio=-0.5", ["config.mask.ratio", "-0.5"]),
    "ratio nan": (f"{DIGITS} --config.mask.ratio=nan", ["config.mask.ratio", "nan"]),
    "ratio inf": (f"{DIGITS} --config.mask.ratio=inf", ["config.mask.ratio", "inf"]),
    "mask unit 0": (f"{DIGITS} --config.mask.unit=0", ["config.mask.unit: 0", "4x4"]),
    "mask unit of the whole image": (f"{DIGITS} --config.mask.unit=4", ["config.mask.unit: 4", "4x4"]),
    "temperature 0": (f"{DIGITS} --config.mask.temperature=0", ["config.mask.temperature: 0", "not above 0"]),
    "ratio to begin with": (f"{DIGITS} --config.mask_schedule.start=1.5", ["config.mask_schedule.start", "1.5"]),
    "one stage": (f"{DIGITS} --config.mask_schedule.stages=1", ["config.mask_schedule.stages: 1 is below 2"]),
    "unknown sampler": (f"{DIGITS} --config.mask.name=rnadom", ["config.mask.name", "did you mean random?"]),
    "unknown target": (f"{DIGITS} --config.target.name=pixles", ["config.target.name", "did you mean pixels?"]),
    "size of pixels": (f"{DIGITS} --config.target.size=3", ["config.target.size", "pixels has no size"]),
    "size 0": (f"{DIGITS} --config.target.name=tokens --config.target.size=0", ["config.target.size: 0 is below 1"]),
    "components": (f"{DIGITS} --config.target.name=pca", ["config.target.size: 96, the default", "the 4 here"]),
    "tokens": (
        f"{DIGITS} --config.target.name=tokens --config.target.size=30000",
        ["config.target.size: 30000", "23008"],
    ),
    "unknown loss": (f"{DIGITS} --config.loss.name=l3", ["config.loss.name", "smooth_l1"]),
    "loss of tokens": (f"{DIGITS} --config.loss.name=cross_entropy", ["config.loss.name", "use l2, l1, smooth_l1"]),
    "loss of values": (
        f"{DIGITS} --config.target.name=tokens --config.loss.name=l1",
        ["config.loss.name: l1 is not for the target tokens; use cross_entropy"],
    ),
    "unknown positions": (f"{DIGITS} --config.encoder.positions=rotray", ["config.encoder.positions", "mean rotary?"]),
    "unknown decoder": (f"{DIGITS} --config.decoder.kind=corss", ["config.decoder.kind", "did you mean cross?"]),
    "unknown mask tokens": (f"{DIGITS} --config.decoder.mask_tokens=encodr", ["mask_tokens", "did you mean encoder?"]),
    "linear head": (f"{DIGITS} --config.decoder.depth=0", ["config.decoder.depth: 0", "mask_tokens to encoder"]),
    "cross without queries": (
        f"{DIGITS} --config.decoder.kind=cross --config.decoder.mask_tokens=encoder",
        ["config.decoder.kind: cross", "set config.decoder.mask_tokens to decoder"],
    ),
    "mask tokens all alike": (f"{DIGITS} --config.decoder.positions=none", ["config.decoder.positions: none"]),
    "mask tokens all alike at first": (
        f"{DIGITS} --config.decoder.positions=none --config.mask_schedule.start=0.5 --config.mask.ratio=0 "
        "--config.loss.patches=all",
        ["config.decoder.positions: none"],
    ),
    "mask tokens all alike in the encoder": (
        f"{DIGITS} --config.decoder.mask_tokens=encoder --config.decoder.depth=0 --config.encoder.positions=none",
        ["config.encoder.positions: none, so that nothing tells one hidden patch from another"],
    ),
    "odd heads": (f"{DIGITS} --config.encoder.positions=rotary --config.encoder.heads=64", ["by 4, not 2"]),
    "a kernel for a bias": (
        f"{DIGITS} --config.encoder.positions=relative --config.encoder.attention=fused",
        ["config.encoder.attention: fused, but no kernel adds a bias"],
    ),
    "none decoded": (f"{DIGITS} --config.mask.decoded=0", ["config.mask.decoded: 0", "above 0, up to 1"]),
    "more decoded than hidden": (f"{DIGITS} --config.mask.decoded=1.5", ["config.mask.decoded: 1.5"]),
    "some decoded of all": (
        f"{DIGITS} --config.mask.decoded=0.5 --config.loss.patches=all",
        ["config.mask.decoded: is for a loss of hidden patches"],
    ),
    "nothing hidden to begin with": (
        f"{DIGITS} --config.mask_schedule.start=0.0",
        ["config.mask_schedule.start: a mask ratio of 0.0 hides no patch"],
    ),
    "unknown patches": (f"{DIGITS} --config.loss.patches=hiden", ["config.loss.patches", "did you mean hidden?"]),
    "unknown dtype": (f"{DIGITS} --config.dtype=float16", ["config.dtype", "'float16'", "bfloat16"]),
    # the data
    "unknown source": (f"{DIGITS} --config.data.source=fodler", ["config.data.source", "did you mean folder?"]),
    "unknown augmentation": (f"{DIGITS} --config.data.augment=crop", ["config.data.augment", "fixed_crop"]),
    "unknown held-out augmentation": (
        f"{DIGITS} --config.data.held_out_augment=center_crop",
        ["config.data.held_out_augment", "did you mean centre_crop?"],
    ),
    "a held-out augmentation that draws": (
        f"{DIGITS} --config.data.held_out_augment=fixed_crop",
        ["config.data.held_out_augment", "none, centre_crop"],
    ),
    "unknown split": (f"{DIGITS} --config.data.split=trian", ["split", "'trian'", "train"]),
    "unknown held-out split": (f"{DIGITS} --config.data.held_out=validation", ["'validation'", "test"]),
    "empty split": (f"{DIGITS} --config.data.split=train[:0]", ["'train[:0]'", "0 images", "batch_size"]),
    "empty held-out split": (f"{DIGITS} --config.data.held_out=test[:0]", ["'test[:0]'", "0 images"]),
    "batch larger than the set": (f"{DIGITS} --config.data.batch_size=1440", ["1438 images", "batch_size 1440"]),
    "huge batch": (f"{DIGITS} --config.data.batch_size=8000000000000000000", ["1438 images"]),
    "batch versus devices": (f"{DIGITS} --config.data.batch_size=12", ["config.data.batch_size", "12", "8 device"]),
    "batch 0": (f"{DIGITS} --config.data.batch_size=0", ["config.data.batch_size: 0"]),
    "negative batch": (f"{DIGITS} --config.data.batch_size=-8", ["config.data.batch_size: -8"]),
    "channels of the source": (
        f"{DIGITS} --config.data.channels=3 --config.pixels.mean=(0.,0.,0.) --config.pixels.std=(1.,1.,1.)",
        ["config.data.channels", "digits", "1 channel"],
    ),
    "channels 0": (f"{DIGITS} --config.data.channels=0", ["config.data.channels: 0"]),
    "channels 0 with fitting pixels": (
        f"{DIGITS} --config.data.channels=0 --config.pixels.mean=() --config.pixels.std=()",
        ["config.data.channels: 0"],
    ),
    "channels of files": (f"{DIGITS} {FOLDER} --config.data.path={{tmp}}/some --config.data.channels=4", ["1 or 3"]),
    "length of mean": (f"{DIGITS} --config.pixels.mean=(0.5,0.5)", ["config.pixels.mean", "channels 1"]),
    "length of std": (f"{DIGITS} --config.pixels.std=(0.5,0.5)", ["config.pixels.std", "channels 1"]),
    "std 0": (f"{DIGITS} --config.pixels.std=(0.0,)", ["config.pixels.std", "above 0"]),
    "crop scale": (f"{DIGITS} --config.data.scale=(0.5,1.5)", ["config.data.scale", "(0.5, 1.5)"]),
    "crop ratio": (f"{DIGITS} --config.data.ratio=(2.0,1.0)", ["config.data.ratio", "(2.0, 1.0)"]),
    "crop ratio inf": (f"{DIGITS} --config.data.ratio=(1.0,1e999)", ["config.data.ratio", "inf"]),
    "no folder given": (f"{DIGITS} {FOLDER}", ["config.data.path", "''"]),
    "missing folder": (f"{DIGITS} {FOLDER} --config.data.path={{tmp}}/gone", ["config.data.path", "{tmp}/gone"]),
    "folder of nobody": (f"{DIGITS} {FOLDER} --config.data.path=~no_such_user_here", ["config.data.path"]),
    "a file for a folder": (f"{DIGITS} {FOLDER} --config.data.path={{tmp}}/file", ["config.data.path", "{tmp}/file"]),
    "empty folder": (f"{DIGITS} {FOLDER} --config.data.path={{tmp}}/empty", ["config.data.path", "no image file"]),
    "no such folder split": (
        f"{DIGITS} {FOLDER} --config.data.path={{tmp}}/some --config.data.held_out=val",
        ["'val'", "{tmp}/some", "'all'"],
    ),
    "no files": (f"{DIGITS} --config.data.source=files --config.data.path={{tmp}}/*.png", ["{tmp}/*.png"]),
    "unknown data set": (f"{DIGITS} {TFDS} --config.data.name=fashion_mnst", ["did you mean fashion_mnist?"]),
    "no data set": (f"{DIGITS} {TFDS}", ["config.data.name", "''"]),
    "unknown version": (f"{DIGITS} {TFDS} --config.data.name=mnist:99.0.0", ["config.data.name", "mnist:99.0.0"]),
    "data set not prepared": (
        f"{DIGITS} {TFDS} --config.data.name=mnist",
        ["mae-jax prepare --config=configs/prepare.py:mnist --config.data.data_dir={tmp}/tfds"],
    ),
    # the run
    "steps 0": (f"{DIGITS} --config.train.steps=0", ["config.train.steps", "0"]),
    "steps 0 despite epochs": (f"{IMAGENET} {SYNTHETIC} --config.train.steps=0", ["config.train.steps", "0"]),
    "negative steps": (f"{DIGITS} --config.train.steps=-1", ["config.train.steps", "-1"]),
    "huge steps": (f"{DIGITS} --config.train.steps=9999999999", ["config.train", "9999999999"]),
    "epochs 0": (f"{IMAGENET} {SYNTHETIC} --config.train.epochs=0", ["config.train.epochs", "0"]),
    "epochs that make no step": (f"{IMAGENET} {SYNTHETIC} --config.train.epochs=1e-9", ["config.train", "0 steps"]),
    "epochs nan": (f"{IMAGENET} {SYNTHETIC} --config.train.epochs=nan", ["config.train.epochs", "nan"]),
    "epochs inf": (f"{IMAGENET} {SYNTHETIC} --config.train.epochs=inf", ["config.train.epochs", "inf"]),
    "huge epochs": (f"{IMAGENET} {SYNTHETIC} --config.train.epochs=1e300", ["config.train", "steps in all"]),
    "unknown optimizer": (f"{DIGITS} --config.optim.name=adam", ["config.optim.name", "did you mean adamw?"]),
    "learning rate nan": (f"{DIGITS} --config.optim.base_learning_rate=nan", ["optim.base_learning_rate", "nan"]),
    "learning rate inf": (f"{DIGITS} --config.optim.base_learning_rate=inf", ["optim.base_learning_rate", "inf"]),
    "negative learning rate": (f"{DIGITS} --config.optim.base_learning_rate=-1", ["optim.base_learning_rate", "-1"]),
    "negative warm-up": (f"{DIGITS} --config.optim.warmup_epochs=-1", ["config.optim.warmup_epochs", "-1"]),
    "warm-up inf": (f"{DIGITS} --config.optim.warmup_epochs=inf", ["config.optim.warmup_epochs", "inf"]),
    "negative weight decay": (f"{DIGITS} --config.optim.weight_decay=-1", ["config.optim.weight_decay", "-1"]),
    "b1 of 1": (f"{DIGITS} --config.optim.b1=1", ["config.optim.b1", "1"]),
    "b2 nan": (f"{DIGITS} --config.optim.b2=nan", ["config.optim.b2", "nan"]),
    "negative seed": (f"{DIGITS} --config.seed=-1", ["config.seed", "-1"]),
    "huge seed": (f"{DIGITS} --config.seed=4294967296", ["config.seed", "4294967296"]),
    "log every 0": (f"{DIGITS} --config.log.every=0", ["config.log.every", "0"]),
    "evaluation before time": (f"{DIGITS} --config.eval.every=-1", ["config.eval.every", "-1"]),
    "evaluation of nothing": (f"{DIGITS} --config.eval.images=0", ["config.eval.images", "0"]),
    "monitor before time": (f"{DIGITS} --config.monitor.every=-1", ["config.monitor.every", "-1"]),
    "monitor without a bank": (f"{DIGITS} --config.monitor.bank=0", ["config.monitor.bank", "0"]),
    "monitor without queries": (f"{DIGITS} --config.monitor.queries=0", ["config.monitor.queries", "0"]),
    "monitor without neighbours": (f"{DIGITS} --config.monitor.k=0", ["config.monitor.k", "0"]),
    "unknown pooling of the monitor": (f"{DIGITS} --config.monitor.pool=man", ["config.monitor.pool", "mean?"]),
    "no pictures": (f"{DIGITS} --config.pictures.count=0", ["config.pictures.count", "0"]),
    "no checkpoints": (f"{DIGITS} --config.checkpoint.keep=0", ["config.checkpoint.keep", "0"]),
    "negative minutes": (f"{DIGITS} --config.checkpoint.minutes=-1", ["config.checkpoint.minutes", "-1"]),
    "negative keep_every": (f"{DIGITS} --config.checkpoint.keep_every=-1", ["config.checkpoint.keep_every", "-1"]),
    "mesh of 0": (f"{DIGITS} --config.mesh.data=0", ["config.mesh.data", "0", "8 device"]),
    "mesh of 9": (f"{DIGITS} --config.mesh.data=9", ["config.mesh.data", "9", "8 device"]),
    "negative mesh": (f"{DIGITS} --config.mesh.data=-2", ["config.mesh.data", "-2", "8 device"]),
    "mesh of which nothing fits": (
        f"{DIGITS} --config.mesh.data=-2 --config.mesh.fsdp=0",
        ["config.mesh", "product 8"],
    ),
    "mesh that leaves a rest": (f"{DIGITS} --config.mesh.fsdp=3", ["config.mesh", "fsdp 1, 2, 4, 8", "8 device"]),
    "mesh of two open axes": (f"{DIGITS} --config.mesh.tensor=-1", ["config.mesh", "data 1, 2, 4, 8", "tensor 1, 2"]),
    "mesh of too many": (f"{DIGITS} --config.mesh.data=4 --config.mesh.fsdp=4", ["data 1, 2 or fsdp 1, 2", "8 device"]),
    "unknown rematerialisation": (
        f"{DIGITS} --config.decoder.remat=dot",
        ["config.decoder.remat", "did you mean dots?"],
    ),
    "unknown attention": (f"{DIGITS} --config.encoder.attention=flash", ["config.encoder.attention", "fused"]),
    "attention without a kernel": (
        f"{DIGITS} --config.decoder.attention=fused",
        ["config.decoder.attention: fused, but no kernel for float32 and heads of 32 on 8 cpu device(s)", "use auto"],
    ),
    "no parts": (f"{DIGITS} --config.accumulate=0", ["config.accumulate", "0 is below 1"]),
    "parts versus batch": (
        f"{DIGITS} --config.accumulate=3",
        ["config.data.batch_size", "128", "8 device", "3 parts of config.accumulate"],
    ),
    "mesh versus batch": (
        f"{DIGITS} --config.mesh.data=3 --config.data.batch_size=16",
        ["config.data.batch_size", "16", "3 device"],
    ),
    # what no machine holds
    **{
        told: (f"{DIGITS} --config.{key}={value}", [told])
        for key, value, told in (
            ("encoder.width", 10**11, "config.encoder.width: 100000000000 makes 3.6e+23 parameters"),
            ("encoder.width", "9" * 400, "config.encoder.width: a number of 1329 bits"),
            ("encoder.depth", 10**12, "config.encoder.depth: 1000000000000 is above 256"),
            ("encoder.depth", 1000, "config.encoder.depth: 1000 is above 256"),
            ("encoder.mlp_ratio", 1e300, "config.encoder.mlp_ratio 1e+300; more than 1.1e+12 are too many"),
            ("decoder.width", 2**30, "config.decoder.width: 1073741824 makes"),
            ("decoder.depth", 257, "config.decoder.depth: 257 is above 256"),
            ("decoder.positions", "relative --config.data.image_size=(1024,1024)", "a table of 68720001025 numbers"),
            ("data.image_size", "(1000000,1000000)", "config.data.image_size: (1000000, 1000000) times 1 channel(s)"),
            ("data.image_size", "(2,99999999999999999999)", "config.data.image_size: a number of 67 bits"),
            ("mask_schedule.stages", 10**11, "config.mask_schedule.stages: 100000000000 is above 256"),
            (
                "target.size",
                f"{10**12} --config.target.name=tokens",
                "config.target.size: 1000000000000 is above",
            ),
            ("target.size", f"{10**12} --config.target.name=pca", "target.size: 1000000000000 is above 65536"),
            ("seed", -(10**400), "config.seed: a number of 1329 bits"),
            ("data.split", f"train[:{'9' * 5000}]", "config.data: no split 'train[:99"),
        )
    },
    # what no one types twice
    "two lines": (f"{DIGITS} --config.data.split=tr\nain", ["split"]),
    "two lines in a key": (f"{DIGITS} --config.da\nta=3", ["--config.GROUP.KEY=VALUE"]),
    "a long path": ("x" * 5000, ["xxx"]),
    "workdir of nobody": (f"{DIGITS} --workdir=~no_such_user_here/x", ["--workdir", "no_such_user_here"]),
    "a file for a workdir": (f"{DIGITS} --workdir={{tmp}}/file", ["--workdir={tmp}/file"]),
    "a workdir in a file": (f"{DIGITS} --workdir={{tmp}}/file/below", ["--workdir={tmp}/file/below"]),
    "a workdir nobody can make": (f"{DIGITS} --workdir=/proc/no/such/folder", ["--workdir=/proc/no/such/folder"]),
}

# A change to the config in a file of one's own, and what the one line of the answer must hold.
MISTAKES_IN_FILES = {
    "config.mask.ratoi = 0.5": ["config.mask.ratoi", "did you mean ratio?"],
    "config.data.batchsize = 8": ["config.data.batchsize", "did you mean batch_size?"],
    "del config.mask": ["config.mask: missing"],
    "del config.encoder.width": ["config.encoder.width: missing"],
    "del config.pixels.std": ["config.pixels.std: missing"],
    "del config.seed": ["config.seed: missing"],
    "config.maks = config.mask": ["config.maks", "did you mean mask?"],
    "config.extra = 1": ["config.extra"],
    "del config.data.batch_size; config.data.batch_size = '8'": ["config.data.batch_size", "'8'", "int"],
    "config.data.batch_size = '8'": ["batch_size", "8", "int"],
    "del config.data.image_size; config.data.image_size = 8": ["config.data.image_size", "Sequence[int]"],
    "del config.mask; config.mask = 0.75": ["config.mask"],
    "config.mask.ratio = None": ["config.mask.ratio", "None"],
    "config.encoder.dtype = 'bfloat16'": ["config.encoder.dtype"],
    "config.encoder.name = 'x'": ["config.encoder.name"],
    "config.train.steps = None; config.train.epochs = None": ["config.train"],
    "config.data.image_size = (8, 8.0)": ["config.data.image_size", "8.0"],
    "config.pixels.std = (float('nan'),)": ["config.pixels.std", "nan"],
    "config.data.per_class = -1": ["config.data.per_class", "-1"],
    "config.data.per_class = 2000": ["config.data.per_class: 2000", "class '8'", "127"],
    "config.data.subset_seed = -1": ["config.data.subset_seed", "-1"],
    "config.noise.std = -0.5": ["config.noise.std", "-0.5", "0 is off"],
    "config.data.jitter = -0.1": ["config.data.jitter", "-0.1", "0 is off"],
    "config.data.randaugment = 11.0": ["config.data.randaugment", "11.0", "between 0 (off) and 10"],
    "config.guard.unreadable = 1.5": ["config.guard.unreadable", "1.5", "between 0 and 1 (off)"],
    "config.encoder.positions = 'learnt'": ["config.encoder.positions", "did you mean learned?"],
    "config.encoder.drop_path = 0.1": ["config.encoder", "drop_path", "fine-tuning"],
    "config.encoder.final_norm = False": ["config.encoder", "final_norm", "fine-tuning"],
    "config.encoder.encoder = 3": ["config.encoder.encoder"],
    "config.optim.layer_decay = 0.75": ["config.optim.layer_decay", "fine-tuning"],
    "config.optim.min_learning_rate = -1e-6": ["config.optim.min_learning_rate", "-1e-06"],
    "del config.monitor": ["config.monitor: missing"],
    "raise ValueError('what?')": ["--config=", "what?"],
    "config = None": ["--config=", "NoneType"],
    "config = config.to_dict()": ["--config=", "dict"],
    "exit()": ["--config=", "SystemExit"],
}


class PastTheChecks(BaseException):
    """Raised where training would begin."""


@pytest.fixture(scope="module")
def compilations():
    """A list that grows with everything that XLA compiles."""
    events = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: events.append(event) if "backend_compile" in event else None
    )
    jax.jit(lambda x: x * 3 + 1)(2.0)
    assert events, "the event's name has changed"
    return events


@pytest.fixture
def command(tmp_path, monkeypatch, capsys, compilations):
    """Run a job that must fail, and check how: exit code 2, nothing compiled, nothing made. Gives the lines it says."""
    for folder in ("empty", "some"):
        (tmp_path / folder).mkdir()
    (tmp_path / "file").write_text("")
    for i in range(20):
        (tmp_path / f"some/{i}.png").write_bytes(b"not looked at so early")
    before = set(tmp_path.rglob("*"))
    monkeypatch.chdir(ROOT)

    def run(job, arguments, workdir=True):
        arguments = [a.replace("{tmp}", str(tmp_path)) for a in arguments]
        if workdir and not any(a.startswith("--workdir") for a in arguments):
            arguments.append(f"--workdir={tmp_path}/work")
        compilations.clear()
        assert main([job, *arguments]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        lines = said.err.splitlines()
        assert lines and all(line.startswith("mae-jax: ") for line in lines)
        assert not compilations
        assert not (tmp_path / "work").exists()
        assert set(tmp_path.rglob("*")) - {tmp_path / "own.py"} == before
        return lines

    return run


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, command, tmp_path):
    typed, words = MISTAKES[name]
    arguments = typed.split(" ")
    if not arguments[0].startswith("--"):
        arguments[0] = f"--config={arguments[0]}"
    lines = command("pretrain", [a for a in arguments if a != "--config="])
    if words is None:  # two mistakes
        assert len(lines) == 2
        return
    (line,) = lines
    assert all(word.replace("{tmp}", str(tmp_path)) in line for word in words)


@pytest.mark.parametrize("change", MISTAKES_IN_FILES)
def test_a_mistake_in_a_file_of_ones_own_is_one_line(change, command, tmp_path):
    path = tmp_path / "own.py"
    path.write_text(USER.format(recipes=str(ROOT / "configs" / "pretrain.py"), change=change))
    (line,) = command("pretrain", [f"--config={path}"])
    assert all(word in line for word in MISTAKES_IN_FILES[change])


@pytest.mark.parametrize(
    "job", ["", "pretran", "Pretrain", "--config=configs/pretrain.py", "models", "__init__", "check"]
)
def test_an_unknown_job_is_one_line_with_those_there_are(job, command):
    (line,) = command(job, [], workdir=False)
    assert repr(job) in line and all(known in line for known in JOBS)
    assert ("did you mean pretrain?" in line) == (job.lower() in ("pretran", "pretrain"))


@pytest.mark.parametrize("argument", [None, "--workdir", "--workdir="])
def test_a_missing_workdir_is_one_line(argument, command):
    (line,) = command("pretrain", [f"--config={DIGITS}", *[argument] * bool(argument)], workdir=False)
    assert "--workdir" in line and ("missing" in line or "no value" in line)


@pytest.mark.parametrize(
    ("arguments", "words"),
    {
        "": ["config.init", "workdir of a training run"],
        "--config.mask.ratoi=0.5": ["did you mean mask.ratio?"],
        "--config.count=few": ["config.count", "few"],
        "--config.init": ["--config.init=VALUE"],
    }.items(),
)
def test_a_mistake_in_reconstruct_is_one_line(arguments, words, command):
    line, *more = command("reconstruct", ["--config=configs/reconstruct.py", *arguments.split()])
    assert all(word in line for word in words)
    assert len(more) == bool(arguments) and all("config.init: empty" in line for line in more)


@pytest.mark.parametrize(
    ("job", "arguments", "words"),
    [
        ("knn", "", []),
        ("knn", "--config.k=()", ["config.k: ()", "above 0"]),
        ("knn", "--config.k=(5,0)", ["config.k: (5, 0)", "above 0"]),
        ("knn", "--config.temperature=0", ["config.temperature: 0.0", "above 0"]),
        ("knn", "--config.temperature=nan", ["config.temperature", "nan"]),
        ("knn", "--config.features=pixel", ["config.features", "did you mean pixels?"]),
        ("knn", "--config.data.per_class=-1", ["config.data.per_class", "-1"]),
        ("evaluate", "", []),
        ("evaluate", "--config.data.splti=test", ["did you mean data.split?"]),
        ("probe", "", []),
        ("probe", "--config.head.pol=mean", ["did you mean head.pool?"]),
        ("finetune", "", []),
        ("finetune", "--config.trainabel=all", ["did you mean trainable?"]),
    ],
)
def test_a_mistake_in_a_job_that_needs_a_model_is_told_though_the_model_is_missing(job, arguments, words, command):
    *lines, last = command(job, [f"--config=configs/{job}.py", *arguments.split()])
    if "nan" not in words:
        assert "config.init: empty" in last and "workdir of a training run" in last
    else:
        lines.append(last)
    assert len(lines) == bool(words)
    assert all(word in line for line in lines for word in words)


FROM_NOTHING = "configs/finetune.py:digits,scratch,tiny"


@pytest.mark.parametrize(
    ("arguments", "words"),
    {
        "--config.head.pool=man": ["config.head.pool", "did you mean mean?"],
        "--config.head.norm=bach": ["config.head.norm", "did you mean batch?"],
        "--config.head.head_std=-1": ["config.head.head_std", "-1"],
        "--config.trainable=5": ["config.trainable", "'5'", "1 to 2"],
        "--config.trainable=0": ["config.trainable", "'0'"],
        "--config.ema=1": ["config.ema", "1.0"],
        "--config.ema=nan": ["config.ema", "nan"],
        "--config.mixup.mixup=-1": ["config.mixup.mixup", "-1"],
        "--config.mixup.label_smoothing=2": ["config.mixup.label_smoothing", "2.0"],
        "--config.erasing.probability=1.5": ["config.erasing.probability", "1.5"],
        "--config.encoder.drop_path=1": ["config.encoder.drop_path", "1.0"],
        "--config.encoder.positions=learnt": ["config.encoder.positions", "did you mean learned?"],
        "--config.data.randaugment=11": ["config.data.randaugment", "11.0"],
        "--config.data.per_class=2000": ["config.data.per_class: 2000", "class '8'"],
        "--config.data.held_out=tset": ["'tset'", "test"],
        "--config.optim.layer_decay=0": ["config.optim.layer_decay", "0.0"],
        "--config.optim.name=lras": ["config.optim.name", "did you mean lars?"],
        "--config.data.image_size=(9,9)": ["config.data.image_size", "patch_size 2"],
        "--config.data.source=files --config.data.path={tmp}/some/*.png": ["no labels"],
    }.items(),
)
def test_a_mistake_in_finetune_is_one_line(arguments, words, command):
    line, *more = command("finetune", [f"--config={FROM_NOTHING}", *arguments.split()])
    assert all(word in line for word in words)
    assert all("no labels" in line and "split" in line for line in more) and len(more) == ("no labels" in words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    {
        "--config.data.name=fashion_mnst": ["did you mean fashion_mnist?"],
        "--config.data.name=": ["config.data.name", "''"],
        "--config.data.manual_dir={tmp}/gone": ["config.data.manual_dir", "{tmp}/gone"],
        "--config.data.manual_dir={tmp}/empty": ["config.data.manual_dir", "{tmp}/empty", "apt-get install"],
        "--config.data.manual=x": ["did you mean data.manual_dir?"],
        "--config.data.names=x": ["did you mean data.name?"],
    }.items(),
)
def test_a_mistake_in_prepare_is_one_line(arguments, words, command, tmp_path):
    there = "--config.data.data_dir={tmp}/tfds"
    (line,) = command("prepare", ["--config=configs/prepare.py", there, *arguments.split()], workdir=False)
    assert all(word.replace("{tmp}", str(tmp_path)) in line for word in words)


def test_all_mistakes_of_model_data_and_run_are_listed_together(command):
    wrong = {
        "mask.ratio": "2.0",
        "encoder.heads": "3",
        "target.name": "tokns",
        "data.source": "folder",
        "data.path": "/no/such/folder",
        "optim.name": "sgd",
        "train.steps": "0",
        "log.every": "-1",
        "mesh.data": "100",
        "seed": "-5",
    }
    lines = command("pretrain", [f"--config={DIGITS}", *(f"--config.{key}={value}" for key, value in wrong.items())])
    assert len(lines) == len(set(lines)) == 9
    for key in {*wrong} - {"data.source"}:
        assert sum(f"config.{key}" in line for line in lines) == 1, key


def test_a_bad_image_size_hides_no_mistake_that_has_nothing_to_do_with_it(command):
    wrong = ["--config.data.image_size=(7,7)", "--config.seed=-1", "--config.mask.name=x"]
    lines = command("pretrain", [f"--config={DIGITS}", *wrong])
    for key in ("data.image_size", "seed", "mask.name"):
        assert sum(f"config.{key}:" in line for line in lines) == 1, key


def test_all_mistakes_in_keys_and_types_are_listed_together(command, tmp_path):
    path = tmp_path / "own.py"
    change = "config.mask.ratoi = 1; config.mask.ratio = None; del config.data.source; config.extra = 1"
    path.write_text(USER.format(recipes=str(ROOT / "configs" / "pretrain.py"), change=change))
    lines = command("pretrain", [f"--config={path}"])
    assert len(lines) == 4, "without a source there is nothing more to look at"
    for key in ("mask.ratoi", "mask.ratio:", "data.source", "extra"):
        assert sum(f"config.{key}" in line for line in lines) == 1


def test_mistakes_of_every_kind_are_listed_together(command, tmp_path):
    path = tmp_path / "own.py"
    change = "config.mask.ratoi = 1; config.optim.b1 = None; config.data.flip = None; config.encoder.heads = 3"
    path.write_text(USER.format(recipes=str(ROOT / "configs" / "pretrain.py"), change=change))
    wrong = ["--config.sed=1", "--config.seed=x", "--config.data=1", "--config.mask.ratio=2", "--config.mesh.data=9"]
    lines = command("pretrain", [f"--config={path}", *wrong])
    keys = ["sed", "seed", "data=", "mask.ratoi", "optim.b1", "data.flip", "encoder.heads", "mask.ratio:", "mesh.data"]
    assert len(lines) == len(keys)
    for key in keys:
        assert sum(f"config.{key}" in line for line in lines) == 1, key
    wrong = ["--config.cuont=1", "--config.count=0", "--config.mask.name=x", "--config.init=/no/such/run"]
    lines = command("reconstruct", ["--config=configs/reconstruct.py", *wrong])
    assert len(lines) == 4 and "/no/such/run" in lines[-1], "which patches there are is not known without the model"
    for line, key in zip(lines, ("config.cuont", "config.count:", "config.mask.name:"), strict=False):
        assert key in line


@pytest.fixture
def past_the_checks(monkeypatch):
    """Raise where all checks are passed, of the config and of what is in the workdir."""

    def make_mesh(**_):
        raise PastTheChecks

    monkeypatch.setattr(runs, "make_mesh", make_mesh)


NASTY = ["", "0", "-1", "1", "3", "nan", "inf", "-inf", "1e999", "1e-300", "99999999999", "9" * 20, "abc", "()", "(1,)"]
NASTY += [
    "(1,2,3)",
    "(-1,-1)",
    "(0.5,0.5)",
    "[]",
    "{}",
    "None",
    "True",
    "é",
    "a b",
    "~nobody_here/x",
    "/dev/null",
    "..",
    "%s",
]
NASTY += [
    "'",
    '"',
    "\\",
    "\n",
    "\0",
    "$HOME",
    "train[",
    "all",
    "tfds",
    "x" * 300,
    "(" * 50,
    "1_000",
    "0x10",
    "-0",
    "1,2",
]


def bad_commands(recipe, count):
    choose = random.Random(0)
    keys = sorted(flatten(load(recipe)[0]))
    for _ in range(count):
        changed = choose.sample(keys, choose.choice([1, 1, 2, 4]))
        yield [f"--config.{key}={choose.choice(NASTY)}" for key in changed]


@pytest.mark.parametrize("count", [100, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("job", "recipe"), {"pretrain": f"{DIGITS},tiny", "finetune": FROM_NOTHING}.items())
def test_no_override_ends_in_a_traceback(job, recipe, count, past_the_checks, tmp_path, capsys, monkeypatch):
    """Thrown at random: each is taken, or refused with one line a problem and exit code 2, or 4 for a wrong path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    codes = []
    for arguments in bad_commands(recipe, count):
        try:
            codes.append(main([job, f"--config={recipe}", f"--workdir={tmp_path}/work", *arguments]))
        except PastTheChecks:
            codes.append(None)
        except Exception as error:
            raise AssertionError(f"a traceback from {arguments}") from error
        said = capsys.readouterr()
        lines = said.err.splitlines()
        wrong = (2, 4) if any(argument.startswith("--config.init=") for argument in arguments) else (2,)
        assert codes[-1] in (wrong if lines else (None,)), arguments
        assert all(line.startswith("mae-jax: ") for line in lines) and said.out == "", arguments
    assert codes.count(2) > count / 3 and codes.count(None) > count / 40


def test_no_words_end_in_a_traceback(past_the_checks, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    choose = random.Random(1)
    words = [*JOBS, *NASTY, f"--config={DIGITS}", "--config", "--config=", f"--workdir={tmp_path}/w", "--workdir", "-h"]
    words += ["--config.seed=1", "--config.seed", "--help", "-", "--", "=", "--=", "--config.=", "--config.data.=1"]
    for _ in range(400):
        arguments = choose.choices(words, k=choose.choice([1, 2, 3, 5]))
        if arguments[0] == "prepare":
            continue  # its defaults are good, so it would go and prepare
        try:
            code = main(arguments)
        except PastTheChecks:
            continue
        said = capsys.readouterr()
        assert (code == 0 and said.out and not said.err) or (code == 2 and said.err and not said.out), arguments
        assert all(line.startswith("mae-jax: ") for line in said.err.splitlines()), arguments


def test_every_key_with_a_default_may_be_left_out(tmp_path, past_the_checks):
    """What `complete` lets pass, the job must not stumble over."""
    path = tmp_path / "own.py"
    change = """
    required = {"source", "batch_size", "image_size", "patch_size", "width", "depth", "heads", "every", "steps"}
    for group in sorted({*config} - {"seed", "dtype", "accumulate", "pixels", "target", "train"}):
        for key in list(config[group]):
            if key not in required:
                del config[group][key]
    config.pixels = {"mean": (0.5,) * 3, "std": (0.5,) * 3}; config.data.update(source="synthetic")
    """
    path.write_text(USER.format(recipes=str(ROOT / "configs" / "pretrain.py"), change=change))
    with pytest.raises(PastTheChecks):
        main(["pretrain", f"--config={path}", f"--workdir={tmp_path}/work"])


def test_a_model_can_be_built_without_the_optional_keys(tmp_path):
    config, _ = load(DIGITS)
    config.unlock()
    config.data.update(source="synthetic", image_size=(8, 8))
    config.pixels = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    del config.data.channels, config.mask.name, config.mask.ratio, config.encoder.mlp_ratio, config.decoder.mlp_ratio
    config, _, _ = pretrain.check(config)
    assert config.data.channels == 3
    model, _ = models.build(config)
    assert model.decoder.target_width == 2 * 2 * 3
    jax.eval_shape(lambda: models.init(model, config, jax.random.key(0)))


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_alone_it_lists_the_jobs(arguments, capsys):
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: mae-jax JOB")
    for name, what in JOBS.items():
        assert f"{name} " in out and what in out


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_says_what_a_job_reads_and_writes(job, flag, capsys):
    assert main([job, "--config=not looked at", flag]) == 0
    out = capsys.readouterr().out
    first = {"import": "--from", "export": "--checkpoint", "verify": "--workdir", "sweep": "--sweep"}.get(
        job, "--config"
    )
    assert out.startswith(f"usage: mae-jax {job} {first}=")
    assert "Reads" in out or "reads" in out
    assert "rites" in out
    assert f"mae-jax {job} {first}=" in out
    assert "\\\\" not in out and max(map(len, out.splitlines())) <= 120


def process(*words):
    """Run a command as from a shell: exit code, output, error lines, seconds of processor time."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TF_CPP_MIN_LOG_LEVEL", "TF_ENABLE_ONEDNN_OPTS")}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        words, capture_output=True, text=True, env=environment | {"JAX_PLATFORMS": "cpu"}, timeout=300
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return done.returncode, done.stdout, done.stderr.splitlines(), seconds


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([f"--config={DIGITS}", "--config.mask.ratoi=0.5"], "did you mean mask.ratio?"),
        (["--config=configs/pretrain.py:fashion_mnist", "--config.data.data_dir={tmp}"], "mae-jax prepare"),
    ],
)
def test_a_shell_gets_one_line_and_exit_code_2_within_10_seconds(arguments, word, tmp_path):
    arguments = [a.replace("{tmp}", str(tmp_path)) for a in arguments]
    code, out, lines, seconds = process(
        sys.executable, "-m", "mae_jax", "pretrain", f"--workdir={tmp_path}/work", *arguments
    )
    assert code == 2 and out == "" and seconds < 10
    (line,) = lines
    assert line.startswith("mae-jax: ") and word in line


def test_the_console_script_lists_the_jobs_at_once():
    script = Path(sys.executable).with_name("mae-jax")
    if not script.exists():
        pytest.skip("mae_jax is not installed beside this Python")
    code, out, lines, seconds = process(str(script))
    assert code == 0 and lines == [] and seconds < 2
    assert all(name in out for name in JOBS)
    code, out, lines, seconds = process(str(script), "pretran")
    assert code == 2 and out == "" and len(lines) == 1 and seconds < 2


def test_the_package_names_what_it_offers():
    assert {"load", "load_encoder", "load_config", "normalize"} <= set(mae_jax.__all__)
    with pytest.raises(AttributeError, match="no_such_thing"):
        mae_jax.no_such_thing  # noqa: B018
