"""``python -m gpu``."""

from gpu.main import main

main()
