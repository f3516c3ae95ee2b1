"""The command `attend`, and `python -m attend_shared`: says what is missing where click and rich are not installed,
which the packages alone do not need.
"""

import sys


def main() -> None:
    """Run the command. Exit status: its own; 2 if it cannot be loaded."""
    try:
        from attend_shared.command import main as command
    except ModuleNotFoundError as error:
        name = str(error.name).partition(".")[0]
        if name not in ("click", "rich"):
            raise
        sys.stderr.write(f'Error: the command attend needs {name}: pip install "attend-twin[cli]"\n')
        raise SystemExit(2) from error
    command()


if __name__ == "__main__":
    main()
