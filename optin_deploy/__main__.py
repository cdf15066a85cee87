"""``python -m optin_deploy``."""

from optin_deploy.cli import main

main()
