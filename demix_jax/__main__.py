"""`python -m demix_jax <verb>`: the same program as the `demix` console script."""

from demix_jax.cli.main import main

if __name__ == "__main__":
    main()
