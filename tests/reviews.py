"""A small dataset of TensorFlow Datasets, and what it holds: the tests build it and read it."""

import numpy as np
import tensorflow_datasets as tfds

LANGUAGES = ("en", "de", "fr")
SIZES = {
    "short": {"train": 203, "validation": 31, "test": 17},
    "long": {"train": 400},
    "other": {"train": 60, "validation": 10, "broken": 5},
}


def rows(config, split):
    """The examples of a split, in order: plain Python values."""
    return [
        {
            "text": f"{config} {split} {i}: naïve – {'wörd ' * (i % 7)}\n日本語 {i * i}",
            "label": i % 3,
            "language": LANGUAGES[(i // 2) % 3],
            "ok": i % 5 == 0,
            "score": i % 4 / 10,  # which float32 has not exactly
            "data": {"body": f"body {i}", "stars": i % 6},
            "tags": ["x"] * (i % 2),
        }
        for i in range(SIZES[config][split])
    ]


class DemixReviews(tfds.core.GeneratorBasedBuilder):
    """Its splits differ from config to config; split broken has texts that are not UTF-8."""

    VERSION = tfds.core.Version("1.2.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in SIZES]

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "text": tfds.features.Text(),
                "label": tfds.features.ClassLabel(names=["bad", "fair", "good"]),
                "language": tfds.features.Text(),
                "ok": tfds.features.Scalar(np.bool_),
                "score": tfds.features.Scalar(np.float32),
                "data": {"body": tfds.features.Text(), "stars": tfds.features.Scalar(np.int32)},
                "tags": tfds.features.Sequence(tfds.features.Text()),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._examples(split) for split in SIZES[self.builder_config.name]}

    def _examples(self, split):
        for i, row in enumerate(rows(self.builder_config.name, split)):
            if split == "broken" and i % 2:
                row["text"] = b"\xff\xfe" + row["text"].encode()
            yield i, row

    def _generate_examples(self):
        raise NotImplementedError


class DemixUnreachable(tfds.core.GeneratorBasedBuilder):
    """A dataset that cannot be prepared."""

    VERSION = tfds.core.Version("2.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        raise OSError("the archive\nis offline")

    def _generate_examples(self):
        raise NotImplementedError


def build(folder, config, file_format, num_shards=4):
    """Prepares a config below `folder` and returns where: the folder of its version."""
    tfds.disable_progress_bar()
    name = f"demix_reviews/{config}"
    builder = tfds.builder(name, data_dir=str(folder), file_format=file_format)
    wish = tfds.download.DownloadConfig(num_shards=num_shards)
    builder.download_and_prepare(download_config=wish)
    return str(builder.data_dir)
