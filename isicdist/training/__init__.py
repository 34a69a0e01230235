"""The parts of the training loop: state, checkpoints, optimizer, micro batches, meters, tracking."""
