"""What runs in the engines' own environments: the standard library and one engine, nothing of this project but ours."""
