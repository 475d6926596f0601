"""Configuration: every key, the values that it takes, and the loading of YAML files."""
