"""Methods: a file here is a choice of the setting ``method``."""
