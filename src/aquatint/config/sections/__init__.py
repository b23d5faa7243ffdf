"""The sections of a config. `schema` puts them together."""
