"""ONNX files and engines of a run, and whether they compute what torch does."""
