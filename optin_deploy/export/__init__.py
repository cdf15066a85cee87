"""Write the ONNX files and engines of a run, and check that they compute what torch does."""
