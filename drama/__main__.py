"""`python -m drama`: the `drama` command, also where its script is not on the path."""

from drama.cli import main

if __name__ == "__main__":
    main()
