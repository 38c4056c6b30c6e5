"""The loss along lines and over planes, and the directions worth looking along."""
