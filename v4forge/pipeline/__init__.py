"""Operating a run: stages, stamps, runner, progress, plan, doctor, release check. Imports any package."""
