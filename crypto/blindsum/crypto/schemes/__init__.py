"""The schemes, one module or package each, all behind the interface in `base`."""
