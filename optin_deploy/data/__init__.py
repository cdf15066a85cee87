"""From files of images, texts and tensors to calibration batches."""
