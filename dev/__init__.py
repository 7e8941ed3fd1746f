"""What only developers and CI run: lint, locks, the commands of the pages, making models/tiny."""
