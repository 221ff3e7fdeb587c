"""Makes ``python -m vmatrace`` the same as the ``vmatrace`` command."""

from vmatrace.cli import run

if __name__ == "__main__":
    run()
