"""Turn DINO checkpoints of other projects into folders that `from_pretrained` loads, and back. See `--help`."""

from dino_hf.cli.command_errors import script_errors
from dino_hf.conversion.convert_checkpoint import main

if __name__ == "__main__":
    with script_errors():  # after SIGTERM, too, nothing half-written is left
        main()
