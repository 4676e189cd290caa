"""The command ``lemo``, which is ``python -m lemo``, too."""

import sys


def main() -> None:
    """Run the command line. An interrupt while it is imported is one line, as all others are."""
    try:
        from lemo.cli.main import main as run
    except KeyboardInterrupt:
        print("lemo: interrupted", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
