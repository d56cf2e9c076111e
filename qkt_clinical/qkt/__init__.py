"""The method: masks, screening, merging, refinement, operating point. Nothing here does I/O."""
