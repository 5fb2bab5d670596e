"""Published checkpoints -> folders that `from_pretrained` loads, and back."""
