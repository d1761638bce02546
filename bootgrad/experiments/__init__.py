"""The experiments of arXiv 2512.07676 and what it left open, one file each: ``bootgrad experiment list``."""
