"""`python -m colossal_freqcache`: the command line, as `colossal-freqcache`."""

from .cli import main

if __name__ == "__main__":
    main()
