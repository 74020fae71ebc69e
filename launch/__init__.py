"""Programs to run from a checkout: ``python -m launch.NAME``."""
