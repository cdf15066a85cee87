"""From a network and calibration batches to a smaller network, in memory."""
