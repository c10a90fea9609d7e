"""The standalone server: it adds up what it cannot read, and keeps the state of rounds."""
