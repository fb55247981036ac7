"""``python -m pyvmm``: the command line."""

from pyvmm.cli import main

if __name__ == "__main__":
    main()
