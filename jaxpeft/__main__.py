"""`python -m jaxpeft`."""

from jaxpeft.cli import main

if __name__ == "__main__":
    main()
