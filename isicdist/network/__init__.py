"""The Improved UNet: layers, loss, normalisation, test-time augmentation, and the best model of a run."""
