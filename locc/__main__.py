"""`python -m locc`."""

from locc.cli import main

if __name__ == "__main__":
    main()
