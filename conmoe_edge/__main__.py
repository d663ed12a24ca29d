"""``python -m conmoe_edge`` is the program ``conmoe-edge``."""

from conmoe_edge.cli.main import main

if __name__ == "__main__":
    main()
