"""`python -m dataflex`: the command line without its script."""

from dataflex.cli import main

if __name__ == "__main__":
    main()
