"""``python -m optin_deploy``."""

from optin_deploy.cli.main import main

main()
