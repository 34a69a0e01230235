"""From integer counts to scores: exact Dice, thresholds, confidence intervals, tables and figures."""
