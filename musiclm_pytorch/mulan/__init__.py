"""The joint embedding of music and text."""
