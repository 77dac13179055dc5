"""The stack file: reading, validating, positions of errors."""
