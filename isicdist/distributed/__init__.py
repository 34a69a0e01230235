"""Processes: launch checks, agreement between ranks, and the sum of the gradients."""
