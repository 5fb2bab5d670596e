"""Helpers without knowledge of detection. They import nothing of the package except each other and `card_text`."""
