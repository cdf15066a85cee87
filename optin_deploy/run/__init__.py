"""One run from the recipe to the report, in a directory of its own."""
