"""Print the table of published checkpoints for docs/checkpoints.md."""

from dino_hf.conversion.published import table

if __name__ == "__main__":
    print(table(), end="")
