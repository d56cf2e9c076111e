"""The pipeline's stages side by side: DVC says what follows what and what has changed, this says when."""
