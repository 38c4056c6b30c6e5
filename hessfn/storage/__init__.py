"""Transform: products kept on disk, so that what was killed goes on."""
