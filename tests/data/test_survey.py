"""What a survey says of a folder is what was put there."""

import numpy as np
from PIL import Image

from mae_jax.data.pipeline import Dataset
from mae_jax.data.survey import survey


def test_what_is_in_a_folder(tmp_path, caplog):
    for name, count in (("cat", 3), ("dog", 1)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("RGB", (8 + i, 8), (51, 102, 255)).save(tmp_path / name / f"{i}.png")
    Image.new("L", (20, 10), 51).save(tmp_path / "dog" / "grey.jpg")
    (tmp_path / "cat" / "empty.png").write_bytes(b"")
    (tmp_path / "cat" / "none.png").write_bytes(b"no picture")
    Image.new("1", (20_000, 10_000)).save(tmp_path / "dog" / "huge.png")
    settings = {"source": "folder", "path": str(tmp_path), "split": "all", "batch_size": 4, "image_size": (8, 8)}
    found = survey(Dataset(**settings, augment="random_resized_crop", flip=True, cache="memory"))
    assert found.size == 8 and found.seconds > 0
    reasons = dict(zip(found.unreadable, found.reasons, strict=True))
    assert reasons == {
        f"{tmp_path}/cat/empty.png": "no file that can be opened, or an empty one, or one of more than 512 MiB",
        f"{tmp_path}/cat/none.png": "cannot identify image file",
        f"{tmp_path}/dog/huge.png": "200000000 pixels are too many",
    }
    assert found.sizes.tolist() == [[8, 8], [8, 8], [8, 9], [8, 10], [10, 20]]
    assert found.kinds == {"PNG RGB": 4, "JPEG L": 1} and found.per_class == {"cat": 5, "dog": 3}
    pixels = np.array([[51, 102, 255]] * 4 + [[51] * 3]) / 255
    np.testing.assert_allclose(found.mean, pixels.mean(axis=0), atol=1e-9)
    np.testing.assert_allclose(found.std, pixels.std(axis=0), atol=1e-9)
    assert not caplog.records
    assert len(survey(Dataset(**settings), told=1).reasons) == 1


def test_what_is_in_a_set_that_is_in_memory():
    data = Dataset(source="digits", batch_size=8, image_size=(8, 8), channels=1, split="train[:100]")
    found = survey(data)
    images, labels = data.opened.read(np.arange(100))
    assert (found.size, found.unreadable, found.kinds) == (100, [], {"array of 1 channel(s)": 100})
    assert [*found.per_class.values()] == np.bincount(labels).tolist()
    np.testing.assert_allclose([found.mean, found.std], [[images.mean() / 255], [images.std() / 255]])


def test_a_set_in_which_nothing_can_be_read(tmp_path):
    (tmp_path / "1.png").write_bytes(b"")
    settings = {"source": "folder", "path": str(tmp_path), "split": "all", "batch_size": 4, "image_size": (8, 8)}
    found = survey(Dataset(**settings))
    assert len(found.unreadable) == 1 and len(found.sizes) == 0 and not found.kinds
