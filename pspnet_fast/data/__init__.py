"""Class tables, and pictures that the project draws itself."""
