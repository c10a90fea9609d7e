"""Makes `federation_driver` importable by every test below this folder."""
