"""Run the command line: ``python -m pyro_vae``."""

from pyro_vae.cli import main

if __name__ == "__main__":
    main()
