"""Accuracy on labelled data, and agreement of the dense and the pruned network."""
