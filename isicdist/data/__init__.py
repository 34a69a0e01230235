"""Samples for training: global order, stream, decoded cache, augmentation, synthetic images."""
