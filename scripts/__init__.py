"""What you run: one program a stage, `python -m scripts.<stage>`."""
