"""`python -m ash` is the command `ash`."""

from ash.cli import main

if __name__ == "__main__":
    main()
