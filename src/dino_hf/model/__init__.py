"""Everything that a shared model needs: these files are saved beside its weights."""
