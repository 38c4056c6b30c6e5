"""The main job: from a model and its data to numbers with their errors, pictures and one page. Nothing imports it."""
