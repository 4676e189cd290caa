"""``python -m lemo`` is the command ``lemo``."""

from lemo.cli.main import main

if __name__ == "__main__":
    main()
