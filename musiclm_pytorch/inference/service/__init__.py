"""MuLaN and MusicLM over HTTP."""
