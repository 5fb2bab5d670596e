"""Helpers that know nothing of detection: files, text, images, drawing, progress. They import only each other."""
