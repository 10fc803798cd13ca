"""Small TFDS data sets, prepared once for all tests of the data."""

import numpy as np
import pytest
import tensorflow_datasets as tfds


class MiniPictures(tfds.core.GeneratorBasedBuilder):
    """A grey picture of size 5x7 for each number, whose pixels and label tell the number."""

    VERSION = tfds.core.Version("1.0.0")
    SIZES = {"train": 20, "test": 5}  # noqa: RUF012

    def _info(self):
        features = {"image": tfds.features.Image(shape=(5, 7, 1)), "label": tfds.features.ClassLabel(num_classes=20)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(size) for name, size in self.SIZES.items()}

    def _generate_examples(self, size):
        for i in range(size):
            yield i, {"image": np.full((5, 7, 1), 10 * i, np.uint8), "label": i}


class MiniPairs(MiniPictures):
    """Two pictures an example: nothing says which one to train on."""

    SIZES = {"train": 1}  # noqa: RUF012

    def _info(self):
        image = tfds.features.Image(shape=(5, 7, 1))
        features = tfds.features.FeaturesDict({"left": image, "right": image})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _generate_examples(self, size):
        yield 0, dict.fromkeys(("left", "right"), np.zeros((5, 7, 1), np.uint8))


@pytest.fixture(scope="session")
def tfds_dir(tmp_path_factory):
    """A data_dir that holds mini_pictures and mini_pairs."""
    folder = tmp_path_factory.mktemp("tfds")
    for name in ("mini_pictures", "mini_pairs"):
        tfds.builder(name, data_dir=folder, file_format="array_record").download_and_prepare()
    return str(folder)
