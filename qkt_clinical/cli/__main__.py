"""``python -m qkt_clinical.cli``: the same as ``qkt``."""

from qkt_clinical.cli import main

if __name__ == "__main__":
    main()
