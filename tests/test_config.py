"""From files and command-line overrides to a config, and what is said of each mistake."""

import importlib.util
import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from mae_jax import config as module
from mae_jax.config import complete, flatten, to_json
from mae_jax.errors import ConfigError, nearest
from mae_jax.jobs import JOBS, pretrain
from mae_jax.model.vit import ViT

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("pretrain_recipes", ROOT / "configs" / "pretrain.py")
recipes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(recipes)

DIGITS = "configs/pretrain.py:digits,tiny"
LEAVES = flatten(recipes.get_config("vit_b16"))
HEAD = "from ml_collections import ConfigDict, FrozenConfigDict\nfrom ml_collections.config_dict import *\n"


def load(*arguments):
    config, wrong = module.load(*arguments)
    if wrong:
        raise ConfigError(wrong)
    return config


def problems(*arguments):
    with pytest.raises(ConfigError) as error:
        load(*arguments)
    return error.value.problems


def problem(*arguments):
    (line,) = problems(*arguments)
    assert "\n" not in line
    return line


def own_file(folder, text):
    path = folder / "own.py"
    path.write_text(HEAD + text)
    return str(path)


WITHOUT = {"import", "verify", "export", "plan", "sweep", "check-data"}  # which have flags, or another's


@pytest.mark.parametrize("job", [*sorted({*JOBS} - WITHOUT), "sweeps/mask_ratio", "sweeps/chains"])
def test_every_job_has_a_config_of_its_name(job, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # outside the checkout, as from an installed wheel
    assert type(load(f"configs/{job}.py")) is ConfigDict


def test_a_file_of_ones_own_comes_before_that_of_the_package(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    own_file(tmp_path, "get_config = lambda: ConfigDict({'mine': 1})")
    (tmp_path / "own.py").rename("configs/pretrain.py")
    assert load("configs/pretrain.py").mine == 1


def test_a_file_may_be_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    own_file(tmp_path, "def get_config(name='a'): return ConfigDict({'name': name})")
    assert load("~/own.py").name == "a"
    assert load("~/own.py:b,c:d").name == "b,c:d"


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("mask.ratio", "0.6", 0.6),
        ("mask.ratio", "1", 1.0),
        ("optim.base_learning_rate", "1e-3", 1e-3),
        ("data.image_size", "(16,24)", (16, 24)),
        ("data.image_size", "(16, 24)", (16, 24)),
        ("data.image_size", "16,24", (16, 24)),
        ("data.image_size", "[16,24]", (16, 24)),
        ("data.scale", "(0.08,1.0)", (0.08, 1.0)),
        ("pixels.mean", "(0.5,0.25,0.75)", (0.5, 0.25, 0.75)),
        ("data.flip", "false", False),
        ("data.flip", "True", True),
        ("data.flip", "0", False),
        ("data.batch_size", "64", 64),
        ("mesh.data", "-1", -1),
        ("train.steps", "7", 7),  # a placeholder
        ("train.epochs", "0.5", 0.5),
        ("train.epochs", "3", 3.0),
        ("data.path", "", ""),
        ("data.path", 'my pictures, and=more (old)/it\'s "here"', 'my pictures, and=more (old)/it\'s "here"'),
        ("data.path", "--config.seed=3", "--config.seed=3"),
        ("data.path", "~/été/*.jpg", "~/été/*.jpg"),
        ("data.path", "two\nlines", "two\nlines"),
        ("data.split", "train[:90%]", "train[:90%]"),
        ("data.name", "5", "5"),
        ("data.name", "None", "None"),
    ],
)
def test_overrides_of_every_type(key, text, value):
    changed = flatten(load("configs/pretrain.py:vit_b16", [f"--config.{key}={text}"]))
    assert changed[key] == value and type(changed[key]) is type(value)
    assert {k: v for k, v in changed.items() if k != key} == {k: v for k, v in LEAVES.items() if k != key}


def test_placeholders_of_integers_take_integers():
    changed = load("configs/pretrain.py:cifar10", ["--config.eval.images=16"])
    assert changed.eval.images == 16
    assert "cannot" not in str(problem("configs/pretrain.py:cifar10", ["--config.eval.images=x"]))


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_any_setting_of_any_recipe_can_be_given_on_the_command_line(name):
    """Each with the value that it has: nothing changes, not even a type."""
    before = flatten(load(f"configs/pretrain.py:{name}"))
    given = {key: value for key, value in before.items() if value is not None}
    after = load(f"configs/pretrain.py:{name}", [f"--config.{key}={value}" for key, value in given.items()])
    assert flatten(after) == before
    assert {k: type(v) for k, v in flatten(after).items()} == {k: type(v) for k, v in before.items()}


@pytest.mark.parametrize("key", LEAVES)
def test_a_typo_in_any_key_gets_the_right_one(key):
    line = problem("configs/pretrain.py:vit_b16", [f"--config.{key}{key[-1]}=1"])
    assert f"--config.{key}{key[-1]}=1" in line and f"did you mean {key}?" in line


def test_a_typo_in_a_group_gets_the_right_one():
    assert "did you mean data.batch_size?" in problem(DIGITS, ["--config.dta.batch_size=3"])


def test_the_last_of_equal_overrides_counts():
    assert load(DIGITS, ["--config.seed=1", "--config.seed=2"]).seed == 2


def test_all_bad_overrides_are_listed_and_the_good_ones_are_not():
    lines = problems(
        DIGITS,
        [
            "--config.mask.ratoi=0.5",
            "--config.seed=1",
            "--config.train.steps=x",
            "--config.data=3",
            "surplus",
            "--config.seed",
        ],
    )
    assert len(lines) == 5
    for line, word in zip(lines, ["ratoi", "train.steps", "config.data", "surplus", "config.seed"], strict=True):
        assert word in line


@pytest.mark.parametrize(
    ("argument", "words"),
    {
        "--config.train.steps=1.5": ["train.steps", "1.5"],
        "--config.train.steps=abc": ["train.steps", "abc"],
        "--config.mask.ratio=half": ["mask.ratio", "half"],
        "--config.mask.ratio=": ["mask.ratio"],
        "--config.data.flip=maybe": ["data.flip", "maybe"],
        "--config.seed=None": ["seed", "None"],
        "--config.mask.ratio": ["mask.ratio", "no value"],
        "--config.data=5": ["config.data", "is a group", "--config.data.KEY=VALUE"],
        "--config.data.image_size[0]=5": ["image_size[0]", "--config.GROUP.KEY=VALUE"],
        "--noconfig.data.flip": ["--noconfig.data.flip", "--config.GROUP.KEY=VALUE"],
        "--config.": ["--config.GROUP.KEY=VALUE"],
        "--config..seed=1": ["..seed"],
        "--Config.seed=1": ["--Config.seed=1"],
        "--config.seed 1": ["--config.seed 1"],
        "-v": ["-v"],
        "": ["--config.GROUP.KEY=VALUE"],
        "--": ["--"],
        "--config.données=1": ["données"],
        "--config.keys=1": ["keys"],  # a method of ConfigDict
        "--config.mask.__class__=1": ["__class__"],
        "--config.seed.x=1": ["seed.x"],
    }.items(),
)
def test_a_bad_override_is_one_line_that_quotes_it(argument, words):
    line = problem(DIGITS, [argument])
    assert all(word in line for word in words)


@pytest.mark.parametrize(
    ("spec", "words"),
    {
        "gone.py": ["'gone.py'"],
        "configs/pretrian.py": ["'configs/pretrian.py'", "did you mean configs/pretrain.py?"],
        "configs": ["'configs'"],
        ".": ["'.'"],
        ":digits": ["''"],
        "~no_such_user_here/x.py": ["~no_such_user_here/x.py"],
        "x" * 5000: ["x" * 50],
        "configs/pretrain.py:digts": ["'digts'", "did you mean digits?", "vit_b16"],
        "configs/pretrain.py:digits,tinny": ["'tinny'", "did you mean tiny?"],
        "configs/pretrain.py:,": ["''"],
        "configs/reconstruct.py:digits": ["get_config"],
    }.items(),
)
def test_a_bad_config_is_one_line_that_names_it(spec, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    line = problem(spec)
    assert all(word in line for word in ["--config", *words])


@pytest.mark.parametrize(
    ("text", "words"),
    {
        "": ["get_config"],
        "get_config = 3": ["not callable"],
        "def get_config(): pass": ["NoneType", "ConfigDict"],
        "def get_config(): return {'seed': 1}": ["dict", "ConfigDict"],
        "def get_config(): return FrozenConfigDict({'seed': 1})": ["FrozenConfigDict"],
        "def get_config(a, b): return ConfigDict()": ["get_config", "'a' and 'b'"],
        "def get_config(:": ["SyntaxError"],
        "raise RuntimeError('two\\nlines')": ["RuntimeError: two lines"],
        "def get_config(): return ConfigDict(1 / 0)": ["ZeroDivisionError"],
        "import no_such_module_here": ["no_such_module_here"],
        "import sys; sys.exit(7)": ["SystemExit", "7"],
        "def get_config():\n c = ConfigDict({'a': 1}); c.a = 'x'; return c": ["'a'", "int"],
        "\0": ["null bytes"],
    }.items(),
)
def test_a_bad_file_is_one_line_that_names_it(text, words, tmp_path):
    line = problem(own_file(tmp_path, text))
    assert all(word in line for word in ["--config=", "own.py", *words])


def test_a_required_placeholder_is_named(tmp_path):
    """ml_collections cannot override it: locking the config already reads it."""
    text = "get_config = lambda: ConfigDict({'seed': 1, 'data': {'path': required_placeholder(str)}})"
    assert "config.data.path: a required placeholder" in problem(own_file(tmp_path, text), ["--config.data.path=here"])


def test_flatten_and_json():
    tree = ConfigDict({"a": 1, "b": {"c": (1, 2), "d": {"e": None}}})
    assert flatten(tree) == {"a": 1, "b.c": (1, 2), "b.d.e": None}
    assert to_json(tree) == {"a": 1, "b": {"c": [1, 2], "d": {"e": None}}}
    assert flatten(to_json(tree))["b.c"] == [1, 2]


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_config_comes_back_from_json(name):
    before = load(f"configs/pretrain.py:{name}")
    after = ConfigDict(json.loads(json.dumps(to_json(before))))
    assert to_json(after) == to_json(before)
    assert complete(after, pretrain.SCHEMA, pretrain.VALUES)[1] == []


def test_nearest():
    assert nearest("ratoi", ["ratio", "name"]) == "; did you mean ratio?"
    assert nearest("zzz", ["ratio", "name"]) == ""


def knobs(given, *, size: int, rate: float = 0.5, name: str = "", on: bool = False, steps: int | None = None):
    """A function whose keyword-only parameters are a group."""


FITTING = {"size": 3, "rate": 0.1, "name": "x", "on": True, "steps": None}


def schema_of(group, **others):
    return complete(ConfigDict({"group": group, "seed": 0} | others), {"group": knobs}, {"seed": int})[1]


@pytest.mark.parametrize("group", [FITTING, {"size": 3}, FITTING | {"rate": 1}, FITTING | {"steps": 4}])
def test_what_fits_a_signature_has_no_problems(group):
    assert schema_of(group) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sizes": 3}, ["config.group.sizes", "knobs", "did you mean size?"]),
        ({"given": 3}, ["config.group.given", "knobs"]),
        ({"size": 3.0}, ["config.group.size", "3.0", "int"]),
        ({"size": "3"}, ["config.group.size", "'3'", "int"]),
        ({"size": True}, ["config.group.size", "True", "int"]),
        ({"size": None}, ["config.group.size", "None", "int"]),
        ({"rate": "0.1"}, ["config.group.rate", "float"]),
        ({"rate": True}, ["config.group.rate", "True", "float"]),
        ({"rate": float("nan")}, ["config.group.rate", "nan", "finite"]),
        ({"rate": float("-inf")}, ["config.group.rate", "-inf", "finite"]),
        ({"name": 3}, ["config.group.name", "str"]),
        ({"on": 1}, ["config.group.on", "bool"]),
        ({"steps": 0.5}, ["config.group.steps", "0.5", "int"]),
        ({"rate": {"a": 1}}, ["config.group.rate", "float"]),
    ],
)
def test_what_does_not_fit_a_signature_is_one_line(change, words):
    (line,) = schema_of(FITTING | change)
    assert all(word in line for word in words)


def test_what_is_missing_or_surplus_is_named():
    assert "config.group.size: missing" in schema_of({})[0]
    assert "config.grup" in schema_of(FITTING, grup={})[0] and "did you mean group?" in schema_of(FITTING, grup={})[0]
    schema, values = {"group": knobs}, {"seed": int}
    config, lines = complete(ConfigDict({"group": 3, "seed": "x"}), schema, values)
    assert config is None and len(lines) == 2 and "config.seed" in lines[0] and "config.group" in lines[1]
    config, lines = complete(ConfigDict(), schema, values)
    assert config is None and len(lines) == 2 and all("missing" in line for line in lines)


@pytest.mark.parametrize(
    ("value", "word"), [(float("nan"), "finite"), (float("inf"), "finite"), ("1", "float")], ids=str
)
def test_a_key_outside_any_group_must_be_of_its_type_and_finite(value, word):
    assert complete(ConfigDict({"rate": 1}), {}, {"rate": float}) == (ConfigDict({"rate": 1}), [])
    config, (line,) = complete(ConfigDict({"rate": value}), {}, {"rate": float})
    assert config is None and line.startswith(f"config.rate: {value!r}") and word in line


@pytest.mark.parametrize(("value", "fits"), [((1, 2), True), ([3], True), ((), True), ((1.5,), False), (3, False)])
def test_a_key_outside_any_group_may_be_a_sequence(value, fits):
    assert (complete(ConfigDict({"k": value}), {}, {"k": module.Sequence[int]})[1] == []) == fits


@pytest.mark.parametrize(
    ("given", "whole"),
    [
        ({"size": 3}, {"size": 3, "rate": 0.5, "name": "", "on": False, "steps": None}),
        (FITTING, FITTING),
        ({"size": 3, "sise": 4}, {"size": 3, "rate": 0.5, "name": "", "on": False, "steps": None}),
        ({"size": 3, "rate": "x", "on": True}, {"size": 3, "rate": 0.5, "name": "", "on": True, "steps": None}),
        ({"size": "x"}, None),
        ({}, None),
    ],
)
def test_what_is_left_out_is_the_signatures_default(given, whole):
    """So is what cannot be used, so that the rest can still be checked."""
    config, _ = complete(ConfigDict({"group": given, "seed": 0}), {"group": knobs}, {"seed": int})
    assert config is None if whole is None else config.to_dict() == {"group": whole, "seed": 0}


@pytest.mark.parametrize("key", sorted(module.GIVEN_TO_MODULES))
def test_what_a_job_gives_a_module_is_no_setting(key):
    settings = {"patch_size": 4, "width": 8, "depth": 1, "heads": 2}
    assert complete(ConfigDict({"encoder": settings}), {"encoder": ViT}, {})[1] == []
    _, (line,) = complete(ConfigDict({"encoder": settings | {key: "x"}}), {"encoder": ViT}, {})
    assert f"config.encoder.{key}" in line


@pytest.mark.parametrize(
    ("sizes", "fits"),
    [((8, 8), True), ([8, 8], True), ((), True), ((8, 8.0), False), (8, False), ("88", False), ((8, True), False)],
)
def test_sequences_are_checked_item_by_item(sizes, fits):
    def function(*, sizes: module.Sequence[int]):
        pass

    assert (complete(ConfigDict({"group": {"sizes": sizes}}), {"group": function}, {})[1] == []) == fits


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_is_without_problems_at_its_tiny_size(name):
    _, data, _ = pretrain.check(load(f"configs/pretrain.py:{name},tiny"))
    assert data.examples.size >= data.batch_size
