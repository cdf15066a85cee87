"""Where the time of a dense and a pruned network goes, and why the pruned one is not faster."""
