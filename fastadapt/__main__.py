"""Start the command line: Ctrl-C is answered before anything else is imported."""

from fastadapt import interrupt


def main() -> None:
    """Run the command line. Entry point of ``fastadapt`` and ``python -m fastadapt``."""
    interrupt.install()
    from fastadapt.cli import main as run

    run()


if __name__ == "__main__":  # processes that a command starts import this file, too
    main()
