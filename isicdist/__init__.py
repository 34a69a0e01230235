"""Train a skin-lesion segmentation network on many GPUs from WebDataset shards, with a Dice that can be believed."""

__version__ = "0.1.0"
