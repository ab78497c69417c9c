"""The embedded model: its data, its trainer, its files, its examination."""
