"""Configuration: keys, registered strategies, presets and parameters."""
