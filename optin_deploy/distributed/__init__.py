"""Several processes that share the calibration batches."""
