"""check-data: any training config, what it prints, and how it ends."""

import pytest
from PIL import Image

from mae_jax.__main__ import main


@pytest.mark.parametrize(
    "spec", ["pretrain.py:digits", "finetune.py:digits", "probe.py:digits", "pretrain.py:vit_b16,tiny"]
)
def test_any_training_config_says_what_to_look_at(spec, capsys):
    assert main(["check-data", f"--config=configs/{spec}", "--config.data.held_out=test[:9]"]) == 0
    told = capsys.readouterr()
    assert "training split 'train" in told.out and "held-out split 'test[:9]'" in told.out and told.err == ""
    assert told.out.count("  unreadable      0, 0.00%") == 2 and told.out.count("the config says (0.") == 4


def test_bad_files_are_named_and_too_many_end_with_3(tmp_path, capsys, refused):
    for i in range(40):
        Image.new("RGB", (9, 9), (i, 2, 3)).save(tmp_path / f"{i}.png")
    for i in range(30, 32):
        (tmp_path / f"{i}.png").write_bytes(b"")
    arguments = [f"--config.data.path={tmp_path}", "--config.data.split=all", "--config.data.held_out=all"]
    arguments = ["check-data", "--config=configs/pretrain.py:folder", *arguments]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert f"'{tmp_path}/31.png': no file" in out and "unreadable      2, 5.00%" in out
    assert "height x width  smallest 9x9, median 9x9, largest 9x9" in out and "kinds           PNG RGB 38" in out
    lines = refused(capsys, main([*arguments, "--config.guard.unreadable=0.02"]), 3, "2 of 40 images of the training")
    assert len(lines) == 2
    for i in range(32):
        (tmp_path / f"{i}.png").write_bytes(b"")
    main(arguments)
    assert "and 12 more" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "word"),
    {
        "--config.data.path=/no/such/folder": "config.data.path",
        "--config.data.source=fodler": "did you mean folder?",
        "--config.data.channels=4": "1 or 3",
        "--config.data.image_size=(8,)": "config.data.image_size",
        "--config.data.pth=x": "did you mean data.path?",
    }.items(),
)
def test_a_mistake_is_told(argument, word, capsys, refused):
    refused(capsys, main(["check-data", "--config=configs/pretrain.py:folder", argument]), 2, word)
