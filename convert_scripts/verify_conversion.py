"""Compare two DINO models number by number, stage by stage. See `--help`."""

from dino_hf.cli.command_errors import script_errors
from dino_hf.conversion.verify_conversion import main

if __name__ == "__main__":
    with script_errors():  # after SIGTERM, too, nothing half-written is left
        main()
