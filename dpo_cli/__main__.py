"""``python -m dpo_cli`` is ``dpo``."""

from dpo_cli.cli.app import main

main()
